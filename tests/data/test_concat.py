from pathlib import Path

import pytest
from PIL import Image

from finetune.config import TrainConfig
from finetune.data.concat import ConcatDataset, Source, names_of
from finetune.data.image_dataset import ImageDataset
from finetune.data.image_folder import ImageFolder
from finetune.data.source_settings import SourceSettings
from finetune.errors import UsageError
from finetune.models.model_info import locate
from finetune.recipe import fine_tune
from finetune.run.build_dataset import identity, open_pictures


@pytest.fixture
def folders(tmp_path: Path) -> list[str]:
    """Two folders of two pictures each, and a broken one in the second."""
    for name, red in (("dogs", 50), ("cats", 200)):
        (tmp_path / name).mkdir()
        for number in range(2):
            Image.new("RGB", (64, 64), (red, number, 0)).save(tmp_path / name / f"{number}.png")
            (tmp_path / name / f"{number}.txt").write_text(f"{name}, {number}")
    (tmp_path / "cats/broken.png").touch()
    return [str(tmp_path / "dogs"), str(tmp_path / "cats")]


def joined(sources: dict[str, tuple[ImageDataset, int]]) -> ConcatDataset:
    return ConcatDataset(
        [Source(SourceSettings(name=name, repeats=repeats), pictures) for name, (pictures, repeats) in sources.items()]
    )


def test_several_folders_are_one_dataset(folders: list[str]) -> None:
    dogs, cats = (ImageFolder(folder, resolution=64) for folder in folders)
    both = joined({"dogs": (dogs, 3), "cats": (cats, 1)})
    assert both.ids == ["dogs/0.png", "dogs/1.png", "cats/0.png", "cats/1.png"]
    assert both.captions == ["dogs, 0", "dogs, 1", "cats, 0", "cats, 1"]
    assert both.repeats == [3, 3, 1, 1]
    assert [both[index].image.getpixel((0, 0)) for index in range(4)] == [
        (50, 0, 0),
        (50, 1, 0),
        (200, 0, 0),
        (200, 1, 0),
    ]
    assert both[3].id == "cats/1.png"
    assert both.checked(2) == cats.checked(0)
    assert both.sources == {"txt": 4}
    assert [bad.path for bad in both.quarantined] == ["cats/broken.png"]
    assert both.ledger()[:4] == (9, 4, 1, 4)
    assert both.ledger().adds_up()
    assert any(note.startswith("cats: 1 image quarantined") for note in both.notes())
    assert joined({"dogs": (both, 1)}).notes() == both.notes()  # each line has one name in front


def test_the_command_takes_several_folders_with_repeats(folders: list[str], tmp_path: Path) -> None:
    config = TrainConfig(data=folders, repeats=(3, 1), max_bad_fraction=0.5)
    pictures = open_pictures(config, locate("tiny"), None)
    assert pictures.first.repeats == [3, 3, 1, 1]
    assert identity(pictures) != identity(
        open_pictures(TrainConfig(data=folders, max_bad_fraction=0.5), locate("tiny"), None)
    )
    run = fine_tune(
        TrainConfig(
            data=folders,
            repeats=(3, 1),
            max_bad_fraction=0.5,
            num_train_epochs=1,
            train_batch_size=2,
            num_inference_steps=0,
            output_dir=str(tmp_path / "out"),
        )
    )
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 4  # 8 visits


def test_one_folder_may_be_repeated_and_keeps_its_ids_otherwise(folders: list[str]) -> None:
    assert open_pictures(TrainConfig(data=folders[0]), locate("tiny"), None).first.ids == ["0.png", "1.png"]
    repeated = open_pictures(TrainConfig(data=folders[0], repeats=5), locate("tiny"), None).first
    assert (repeated.ids, repeated.repeats) == (["dogs/0.png", "dogs/1.png"], [5, 5])


def test_repeats_are_one_for_each_folder(folders: list[str]) -> None:
    with pytest.raises(UsageError, match=r"^repeats: 1 number for 2 --data$"):
        open_pictures(TrainConfig(data=folders, repeats=5), locate("tiny"), None)
    with pytest.raises(UsageError, match=r"repeats = \(0,\): expected 1 or more"):
        TrainConfig(data=folders[0], repeats=0)


def test_sources_of_one_name_are_told_apart() -> None:
    assert names_of(["a/dogs", "b/dogs", "c/dogs", "cats/"]) == ["dogs", "dogs-2", "dogs-3", "cats"]
