"""ImageDataset: images with captions, as the rest of the package uses them."""

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

from PIL import Image
from torch.utils.data import Dataset

from finetune.data.caption_augmentation import CaptionAugmentation
from finetune.data.captions import TRIGGER, Caption, placed_trigger, with_trigger
from finetune.data.companions import CompanionInfo, checked_companions, has_aspect_of
from finetune.data.image_checks import ImageInfo, RejectedImage, check_images
from finetune.data.image_index import ImageIndex
from finetune.data.image_sample import ImageSample
from finetune.data.images import WHITE, PictureFile, open_alpha, open_image, open_mask
from finetune.data.sampler import Turns
from finetune.data.transforms import Preprocess
from finetune.deprecation import Renamed
from finetune.errors import DataError
from finetune.text import join_limited, pluralize


class Example(NamedTuple):
    """One picture to learn from."""

    image: Image.Image
    """RGB, 8 bit, upright, in its original size."""
    caption: str
    id: str
    """Unique within the dataset and the same wherever the dataset lies; randomness is drawn from it."""


class Ledger(NamedTuple):
    """What became of everything that was found: `found` is the sum of all that follows."""

    found: int
    """Files, or rows of a table."""
    trained: int
    """Pictures."""
    quarantined: int
    """Pictures that cannot be trained on."""
    captions: int = 0
    """Files that captions were read from."""
    masks: int = 0
    """Files that are the mask of a picture."""
    held_out: int = 0
    """Pictures that are kept for validation."""
    skipped: Mapping[str, int] = MappingProxyType({})
    """Why -> how many."""

    def adds_up(self) -> bool:
        total = (
            self.trained + self.quarantined + self.held_out + self.captions + self.masks + sum(self.skipped.values())
        )
        return self.found == total


class ImageDataset(Dataset[Example], ABC):
    """A map-style dataset that is ready to be encoded.

    Args:
        ids: of the pictures.
        captions: theirs.
        contents: a digest of each picture itself, for the identity of a run; none where the dataset vouches for its
            ids.
        trigger: word put in place of every [trigger], or in front of each caption.
        transform: how the pictures become squares; None: they are of one size that the model can take.
        repeats: how many times each comes in an epoch; none: once.

    Raises:
        DataError: an id stands for two pictures.
    """

    num_subject_images: int
    """How many, from the first, are of what is to be learned; class pictures follow."""
    weights: Sequence[float]
    """How much each counts in the loss of a step, beside the others."""
    quarantined: Sequence[RejectedImage] = ()
    """Pictures that were found and cannot be trained on."""
    held_out: Sequence[int] = ()
    """Numbers of pictures that are never trained on, but validated on."""
    masked: bool = False
    """Whether some may have a mask."""
    sampled: Sequence[Turns] = ()
    """Sources of which an epoch visits a number of pictures, in turns, whatever their repeats."""
    passed_over: Sequence[str] = ()
    """What lies there and looks like captions, but is not read."""

    def __init__(
        self,
        ids: Sequence[str],
        captions: Sequence[Caption],
        contents: Sequence[str],
        *,
        trigger: str | None,
        transform: Preprocess | None,
        repeats: Sequence[int] = (),
    ) -> None:
        self.repeats = list(repeats) or [1] * len(ids)
        self.excluded = dict[str, int]()
        """Why pictures are neither trained nor validated on -> how many."""
        self.num_subject_images, self.weights = len(ids), [1.0] * len(ids)
        self.ids, self.contents, self.transform = list(ids), list(contents), transform
        self.captions = [with_trigger(caption.text, trigger) for caption in captions]
        """The first of each, with the trigger word; empty where there is neither a caption nor a prompt."""
        self._more = {
            index: tuple(with_trigger(text, trigger) for text in caption.others)
            for index, caption in enumerate(captions)
            if caption.others
        }
        self.sources = Counter(caption.source for caption in captions)
        """How many captions came from where: txt, caption, metadata, column, prompt, none."""
        self.triggerless = 0 if trigger else sum(TRIGGER in caption.text for caption in captions)
        """How many captions say [trigger] although no trigger word was given."""
        glued = [text for caption in captions if TRIGGER not in (text := caption.text) and placed_trigger(text)]
        self.glued = glued if trigger else []
        """Captions that read badly with the trigger word in front."""
        doubled = [name for name, count in Counter(ids).items() if count > 1]
        if doubled:
            raise DataError(f"two images have the id {doubled[0]!r}")

    def __len__(self) -> int:
        return len(self.ids)

    @abstractmethod
    def __getitem__(self, index: int) -> Example:
        """Raises DataError if the picture can be read no longer."""

    checked = Renamed("image_info")

    @abstractmethod
    def image_info(self, index: int) -> ImageInfo:
        """Size and digest of the picture. Raises DataError as `__getitem__` does, where it must be opened for that."""

    def companions(self, index: int) -> Mapping[str, str]:
        """Return the kinds of the image files that belong to a picture, such as "mask", with the digest of each."""
        return {}

    def companion(self, index: int, kind: str) -> Image.Image | None:
        """Return a companion of the picture, upright and of the picture's shape; None where there is none.

        A "mask" is 8 bit grey: an error counts where it is white. It may come from the picture's alpha channel, which
        `companions` does not list. Raises DataError if the file has changed.
        """
        return None

    def companion_digests(self) -> list[str]:
        """Return the digests of the companions of all pictures, in the order of these."""
        return [digest for index in range(len(self)) for digest in self.companions(index).values()]

    def sample(self, index: int) -> ImageSample:
        """Return what is known of a picture, and how it is opened."""
        return ImageSample(self, index)

    @property
    def flips(self) -> bool:
        """Whether visits to some of the pictures may be mirrored."""
        return self.transform is not None and self.transform.random_flip

    @property
    def background(self) -> str:
        """The colour that shows where a picture is transparent."""
        return WHITE if self.transform is None else self.transform.background

    def captioning(self, index: int, of_run: CaptionAugmentation) -> CaptionAugmentation:
        """Return how the caption of a visit comes from those of the picture: as the run says, or else its source."""
        return of_run

    def texts(self, index: int) -> tuple[str, ...]:
        """All captions of a picture; each visit takes one of them."""
        return (self.captions[index], *self._more.get(index, ()))

    def sizes(self) -> list[tuple[int, int]]:
        """Return the height and width that each picture is trained in; (0, 0): in its own, where all have one size."""
        if self.transform is None:
            return [(0, 0)] * len(self)
        if self.transform.buckets is None:
            return [(self.transform.resolution, self.transform.resolution)] * len(self)
        return [self.transform.size(*self.image_info(index).size) for index in range(len(self))]

    def shapes(self) -> list[int]:
        """Return a number for each picture, the same for all that are trained in the same size."""
        sizes = self.sizes()
        numbers = {size: number for number, size in enumerate(sorted(set(sizes)))}
        return [numbers[size] for size in sizes]

    def hold_out(self, indices: Sequence[int]) -> None:
        """Train on none of these pictures, but validate on them."""
        self.held_out = list(indices)
        for index in indices:
            self.repeats[index] = 0

    def exclude(self, indices: Sequence[int], why: str) -> None:
        """Neither train nor validate on these."""
        if indices:
            self.excluded[why] = len(indices)
        for index in indices:
            self.repeats[index] = 0

    @property
    def trained(self) -> list[int]:
        """Numbers of the pictures that are trained on."""
        return [index for index, times in enumerate(self.repeats) if times]

    @property
    def class_pictures(self) -> list[int]:
        """Numbers of the pictures of the kind, which take turns in being seen as often as those of the subject."""
        return [index for index in range(self.num_subject_images, len(self)) if self.repeats[index]]

    @property
    def turns(self) -> list[Turns]:
        """The groups of pictures that take turns: `sampled`, and class pictures, with as many visits as all others."""
        class_pictures = [Turns(self.class_pictures, self._subject_visits())] if self.class_pictures else []
        return [*self._sampled_turns(), *class_pictures]

    @property
    def epoch_visits(self) -> int:
        """Visits of an epoch."""
        return self._subject_visits() * (2 if self.class_pictures else 1)

    def _sampled_turns(self) -> list[Turns]:
        """The groups of `sampled`, without the pictures that are held out or excluded."""
        groups = [Turns([index for index in some if self.repeats[index]], visits) for some, visits in self.sampled]
        return [group for group in groups if group.examples]

    def _subject_visits(self) -> int:
        """Visits of an epoch but for those of class pictures."""
        repeated = sum(self.repeats[: self.num_subject_images])
        in_turns = sum(visits - sum(self.repeats[index] for index in some) for some, visits in self._sampled_turns())
        return repeated + in_turns

    @property
    def trained_captions(self) -> list[str]:
        """The first of each of these."""
        return [self.captions[index] for index in self.trained]

    def ledger(self) -> Ledger:
        """What became of everything that was found."""
        total, trained, held = len(self) + len(self.quarantined), len(self.trained), len(self.held_out)
        return Ledger(total, trained, len(self.quarantined), held_out=held, skipped=dict(self.excluded))

    def notes(self) -> list[str]:
        """Lines for the user about what was found: what is left out, or looks wrong."""
        lines = []
        if self.passed_over and any(source in ("prompt", "folder", "none") for source in self.sources):
            lines.append(f"not read as captions: {join_limited(self.passed_over)}")
        if self.triggerless:
            captions = pluralize(self.triggerless, "caption")
            lines.append(f"[trigger] is removed from {captions}, because --trigger is not given")
        if self.glued:
            captions, better = pluralize(len(self.glued), "caption"), placed_trigger(self.glued[0])
            lines.append(f"the trigger is put in front of {captions}; to place it yourself: {better!r}")
        return lines


class ImageFileDataset(ImageDataset):
    """What the layouts share: every picture found is decoded once, and those that cannot be read are left out.

    `where`, for messages, is what they are in; `names`, `captions` and `_file` speak of all pictures found, the
    attributes of those that can be read; `memory` is that of `check_images`; `bad` are names of pictures that cannot
    be trained on for another reason, `repeats` is empty or speaks of all found; `more` pictures of the same source are
    elsewhere, so that none of these need be readable.

    Raises:
        DataError: there are no pictures, or none that can be read.
    """

    _companions: Mapping[Any, Mapping[str, PictureFile]] = MappingProxyType({})
    """What `_file` returns for a picture -> kind -> its companion."""
    _companion_infos: Mapping[Any, Mapping[str, CompanionInfo]] = MappingProxyType({})
    """The same -> kind -> what is known of the companion, where companions are used."""
    _alpha = False
    """Whether the alpha channel is the mask of the others."""

    def __init__(
        self,
        where: str,
        names: Sequence[str],
        captions: Sequence[Caption],
        *,
        trigger: str | None,
        transform: Preprocess,
        memory: ImageIndex | None,
        bad: Mapping[str, str] | None = None,
        repeats: Sequence[int] = (),
        orphans: Sequence[str] = (),
        empty: Sequence[str] = (),
        more: bool = False,
    ) -> None:
        checked = check_images(names, self._file, memory)
        for place, name in enumerate(names):
            info = checked[place]
            if bad and name in bad:
                checked[place] = RejectedImage(name, bad[name])
            elif not isinstance(info, RejectedImage) and (why := self._unfit_companion(place, info.size)):
                checked[place] = RejectedImage(name, why)
        good = {place: info for place, info in enumerate(checked) if not isinstance(info, RejectedImage)}
        self.quarantined = [problem for problem in checked if isinstance(problem, RejectedImage)]
        if not good and not more:
            raise DataError(
                f"{where}: none of {pluralize(len(names), 'image')} can be trained on; the first: {self.quarantined[0]}"
            )
        self._places, self._checked = list(good), list(good.values())
        self.orphans = list(orphans)
        """Caption files without a picture, relative to the folder."""
        self.empty = list(empty)
        """Caption files beside a picture that say nothing, likewise."""
        self.small = sum(_is_enlarged(transform, *info.size) for info in good.values())
        """How many pictures are smaller than what they are trained in."""
        super().__init__(
            [names[place] for place in good],
            [captions[place] for place in good],
            [info.digest for info in good.values()],
            trigger=trigger,
            transform=transform,
            repeats=[repeats[place] for place in good] if repeats else (),
        )

    @abstractmethod
    def _file(self, place: int) -> PictureFile:
        """Where the picture at this place of `names` is. Raises ValueError with the reason that there is none."""

    def _open_companions(
        self,
        companions: Mapping[Any, Mapping[str, PictureFile]],
        masks: Literal["files", "files and alpha", "none"],
        memory: ImageIndex | None,
    ) -> dict[Any, str]:
        """Check companions, `_file` of a picture -> kind -> file, and return why those of some cannot be used."""
        self._companions, self._alpha = companions, masks == "files and alpha"
        used = {
            picture: {kind: file for kind, file in some.items() if kind != "mask" or masks != "none"}
            for picture, some in companions.items()
        }
        self.masked = self._alpha or any("mask" in some for some in used.values())
        self._companion_infos, unusable = checked_companions(used, memory)
        return unusable

    def companions(self, index: int) -> Mapping[str, str]:
        if not self._companion_infos:
            return {}
        infos = self._companion_infos.get(self._file(self._places[index]), {})
        return {kind: info.digest for kind, info in infos.items()}

    def companion(self, index: int, kind: str) -> Image.Image | None:
        file, digest = self._file(self._places[index]), self.companions(index).get(kind)
        if digest is not None:
            companion = self._companions[file][kind]
            return open_mask(companion, digest) if kind == "mask" else open_image(companion, digest=digest)
        return open_alpha(file) if kind == "mask" and self._alpha else None

    def _unfit_companion(self, place: int, size: tuple[int, int]) -> str | None:
        """Why a companion at this place of `names` does not fit a picture of this size; None: all do."""
        infos = self._companion_infos.get(self._file(place), {}) if self._companion_infos else {}
        for kind, info in infos.items():
            if not has_aspect_of(info.size, size):
                (width, height), (across, down) = info.size, size
                return f"its {kind} has another shape: {width}x{height} for an image of {across}x{down}"
        return None

    def __getitem__(self, index: int) -> Example:
        digest = self._checked[index].digest
        image = open_image(self._file(self._places[index]), self.ids[index], digest, self.background)
        return Example(image, self.captions[index], self.ids[index])

    def image_info(self, index: int) -> ImageInfo:
        return self._checked[index]

    def notes(self) -> list[str]:
        reasons = [f"{bad.path} ({bad.reason})" for bad in self.quarantined]
        white = sum(info.white for infos in self._companion_infos.values() for info in infos.values())
        lines = {
            f"{pluralize(len(reasons), 'image')} quarantined: {join_limited(reasons)}": reasons,
            f"caption files without an image ({len(self.orphans)}): {join_limited(self.orphans)}": self.orphans,
            f"empty caption files ({len(self.empty)}): {join_limited(self.empty)}": self.empty,
            f"{pluralize(self.small, 'image')} smaller than the training size: upscaled": self.small,
            f"{pluralize(white, 'mask')} entirely white: no effect": white,
        }
        return [line for line, applies in lines.items() if applies] + super().notes()


def _is_enlarged(transform: Preprocess, width: int, height: int) -> bool:
    target_height, target_width = transform.size(width, height)
    return width < target_width or height < target_height
