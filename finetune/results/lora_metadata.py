"""Metadata of LoRA files, which programs show and sort by.

`ss_*` is what sd-scripts writes and A1111 reads, `modelspec.*` the Stability AI Model Metadata Standard 1.0.1. Dates
are left out, although the standard asks for one: equal runs make equal files.
"""

import base64
import hashlib
import io
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

MOST_TAGS = 500
"""Of the tags in the captions, the most frequent are told."""

THUMBNAIL = 256
"""Pixels of the longer side of the picture in a file."""

_VERSIONS = {
    "sd15": ("sd_v1", "stable-diffusion-v1"),
    "sd21": ("sd_v2_base", "stable-diffusion-v2-512"),
    "sdxl": ("sdxl_base_v1-0", "stable-diffusion-xl-v1-base"),
}
"""Family -> sd-scripts' name of the base model, and the standard's architecture."""


def architecture(family: str, prediction_type: str) -> tuple[str, str]:
    """sd-scripts' name of a base model, and the standard's; the family's own name where they have none."""
    if family == "sd21" and prediction_type == "v_prediction":
        return "sd_v2_v", "stable-diffusion-v2-768-v"
    return _VERSIONS.get(family, (family, family))


@dataclass(frozen=True)
class LoraFacts:
    """What is known of the run that made a LoRA."""

    model: str
    """The base model, as the user named it."""
    family: str
    prediction_type: str
    resolution: int
    """Pixels per side."""
    batch_size: int
    """Pictures per optimizer step."""
    epoch_steps: float
    """Optimizer steps in an epoch."""
    learning_rate: float
    optimizer: str
    lr_scheduler: str
    seed: int
    trigger: str | None
    data: str
    """What the pictures lie in, without the folders above it."""
    captions: Sequence[str]
    sizes: Sequence[tuple[int, int]] = ()
    """(height, width) of each image that is trained on."""
    repeats: int = 1
    """How often an image comes in an epoch."""
    clip_skip: int | None = None
    model_hash: str | None = None
    """Of a base model in one file, see `short_hash`."""
    thumbnail: Image.Image | None = None
    """What it draws."""

    def metadata(self, title: str, step: int) -> dict[str, str]:
        """The entries for a file called `title` with what was learned in `step` steps."""
        version, kind = architecture(self.family, self.prediction_type)
        velocity = self.prediction_type == "v_prediction"
        facts = {
            "ss_output_name": title,
            "ss_sd_model_name": self.model,
            "ss_base_model_version": version,
            "ss_v2": str(self.family == "sd21"),
            "ss_steps": str(step),
            "ss_epoch": str(int(step / self.epoch_steps)),
            "ss_num_train_images": str(len(self.captions)),
            "ss_total_batch_size": str(self.batch_size),
            "ss_learning_rate": f"{self.learning_rate:g}",
            "ss_unet_lr": f"{self.learning_rate:g}",
            "ss_optimizer": self.optimizer,
            "ss_lr_scheduler": self.lr_scheduler,
            "ss_seed": str(self.seed),
            "ss_resolution": f"({self.resolution}, {self.resolution})",
            "ss_clip_skip": str(self.clip_skip),
            "ss_dataset_dirs": json.dumps({self.data: {"n_repeats": self.repeats, "img_count": len(self.captions)}}),
            "ss_bucket_info": json.dumps({"buckets": self._buckets()}),
            "ss_tag_frequency": json.dumps({self.data: self._tags()}, ensure_ascii=False),
            "modelspec.sai_model_spec": "1.0.1",
            "modelspec.architecture": f"{kind}/lora",
            "modelspec.implementation": "diffusers",
            "modelspec.title": title,
            "modelspec.resolution": f"{self.resolution}x{self.resolution}",
            "modelspec.prediction_type": "v" if velocity else self.prediction_type,
        }
        metadata = {
            "ss_sd_model_hash": self.model_hash,
            "modelspec.trigger_phrase": self.trigger,
            "modelspec.thumbnail": self.thumbnail and _data_url(self.thumbnail),
        }
        return facts | {name: text for name, text in metadata.items() if text}

    def _buckets(self) -> dict[str, dict[str, object]]:
        """How many images have each size, as sd-scripts counts them: from the smallest size on."""
        counts = sorted(Counter((width, height) for height, width in self.sizes).items())
        return {str(place): {"resolution": size, "count": count} for place, (size, count) in enumerate(counts)}

    def _tags(self) -> dict[str, int]:
        """How often each part of the captions between commas comes; of equal ones, that which came first."""
        tags = (part.strip() for caption in self.captions for part in caption.split(","))
        return dict(Counter(part for part in tags if part).most_common(MOST_TAGS))


def short_hash(file: Path) -> str:
    """The eight digits by which sd-scripts and old versions of A1111 know a checkpoint: of 64 KiB of it."""
    with file.open("rb") as opened:
        opened.seek(2**20)
        return hashlib.sha256(opened.read(2**16)).hexdigest()[:8]


def _data_url(picture: Image.Image) -> str:
    small, content = picture.convert("RGB"), io.BytesIO()
    small.thumbnail((THUMBNAIL, THUMBNAIL))
    small.save(content, format="JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(content.getvalue()).decode("ascii")
