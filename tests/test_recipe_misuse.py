"""What Python callers easily get wrong, each told in one line; and what looks as if it were not meant so."""

import importlib.metadata
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, IterableDataset

import finetune as ft
from finetune import recipe
from finetune.data.image_folder import ImageFolder
from tests.test_recipe import options
from tests.tiny_sdxl import make_tiny_sdxl


class MapDataset(Dataset[Any]):
    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> Any:
        return Image.new("RGB", (64, 64)), "a disc", str(index)


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return iter([])


@pytest.mark.parametrize(
    ("config", "dataset", "message"),
    [
        ({"data": "x"}, None, r"config is a dict: give a finetune.TrainConfig"),
        (ft.TrainConfig(), DataLoader(MapDataset()), "the dataset is a DataLoader, .*: give its .dataset"),
        (ft.TrainConfig(), Stream(), "the dataset is a torch IterableDataset, .*: give a map-style dataset"),
        (ft.TrainConfig(data="x"), MapDataset(), "data and a dataset are given: give one of them"),
    ],
)
def test_what_is_no_config_or_dataset_is_told(config: Any, dataset: Any, message: str) -> None:
    with pytest.raises(ft.UsageError, match=message):
        ft.fine_tune(config, dataset)


def test_a_second_run_in_another_thread_is_refused(pictures: Path, tmp_path: Path) -> None:
    errors: list[BaseException] = []

    def start() -> None:
        try:
            ft.fine_tune(options(pictures, tmp_path / "out"))
        except ft.UsageError as error:
            errors.append(error)

    with recipe._running:
        thread = threading.Thread(target=start)
        thread.start()
        thread.join()
    assert "fine_tune runs in another thread already" in str(errors[0])
    ft.fine_tune(options(pictures, tmp_path / "out"))


@pytest.mark.parametrize("pixels", [torch.full((1, 3, 64, 64), 200.0), torch.zeros(1, 3, 64, 64, dtype=torch.uint8)])
def test_pixels_of_another_range_are_told(pixels: torch.Tensor) -> None:
    with pytest.raises(ft.UsageError, match=r"they should be floats in \[-1, 1\]: pixels / 127.5 - 1"):
        ft.as_batch(ft.load_model("tiny"), pixels, ["a disc"], step=1)


def test_version_errors_and_types_are_public() -> None:
    assert ft.__version__ == importlib.metadata.version("finetune-unet")
    assert issubclass(ft.DataError, ft.FinetuneError)
    assert (Path(ft.__file__).parent / "py.typed").exists()


def test_what_looks_as_if_it_were_not_meant_so_is_noted(
    make_pictures: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = make_pictures(tmp_path / "data", count=3)
    Image.new("L", (80, 64)).save(data / "00_mask.png")
    for number in range(5):
        (data / f"{number}.cr2").touch()
    notes = ImageFolder(data, "a disc").notes()
    assert "most files are ignored: 5 of 9" in notes
    assert "images whose names look like masks are trained on: 00_mask.png; a mask is named NAME.mask.png" in notes
    ft.fine_tune(options(data, tmp_path / "out", prompt="a disc", masked_loss=True, learning_rate=0.5))
    told = capsys.readouterr().out
    assert "--masked_loss is set, but there are no mask files: only alpha channels count" in told
    assert "learning_rate 0.5 is" in told
    assert "times the default" in told


def test_another_clip_skip_than_that_of_xl_is_noted(
    make_pictures: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, model = make_pictures(tmp_path / "data", count=2), str(make_tiny_sdxl(tmp_path / "xl"))
    ft.fine_tune(options(data, tmp_path / "out", model=model, prompt="a disc", resolution=64, clip_skip=1))
    assert "--clip_skip 1: XL is made for 2, and sd-scripts takes 2 whatever it is given" in capsys.readouterr().out
