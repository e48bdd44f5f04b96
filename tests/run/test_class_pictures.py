"""Class pictures: how they count, and how those that are missing are drawn."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from finetune.cache.encode import encode
from finetune.config import TrainConfig
from finetune.data.image_folder import ImageFolder
from finetune.data.joined import with_class_pictures
from finetune.data.loader import training_steps
from finetune.errors import UsageError
from finetune.models.loading import load_model
from finetune.models.locate import locate
from finetune.recipe import fine_tune
from finetune.run.class_pictures import draw_missing
from finetune.run.sources import open_pictures

MakePictures = Callable[..., Path]


def folders(make_pictures: MakePictures, tmp_path: Path, subjects: int, others: int) -> tuple[Path, Path]:
    return make_pictures(tmp_path / "dog", count=subjects), make_pictures(tmp_path / "dogs", count=others)


@pytest.mark.parametrize(("subjects", "others"), [(6, 2), (4, 4), (2, 5)])
def test_in_an_epoch_the_kind_weighs_what_was_asked_however_many_there_are(
    make_pictures: MakePictures, tmp_path: Path, subjects: int, others: int
) -> None:
    dog, dogs = folders(make_pictures, tmp_path, subjects, others)
    both = with_class_pictures("dog", ImageFolder(dog, "sks dog"), ImageFolder(dogs, "a dog"), 0.5)
    assert both.subjects == subjects
    weight = [times * each for times, each in zip(both.repeats, both.weights, strict=True)]
    assert sum(weight[:subjects]) == subjects
    assert sum(weight[subjects:]) == pytest.approx(0.5 * subjects)
    assert both.ids[0] == "dog/00.png"
    assert both.ids[subjects] == "class/00.png"
    assert both.sources == {"prompt": subjects, "class_prompt": others}


def test_batches_carry_the_weights(make_pictures: MakePictures, tmp_path: Path) -> None:
    dog, dogs = folders(make_pictures, tmp_path, 4, 4)
    both = with_class_pictures(
        "dog", ImageFolder(dog, "sks dog", resolution=64), ImageFolder(dogs, "a dog", resolution=64), 0.25
    )
    encoded = encode(both, load_model("tiny"), cache_dir="none")
    (batch,) = next(training_steps(encoded, batch_size=8, steps=1))
    assert {name.split("/")[0]: weight for name, weight in zip(batch.ids, batch.weight.tolist(), strict=True)} == {
        "dog": 1.0,
        "class": 0.25,
    }
    assert len(set(batch.ids)) == 8


def test_missing_ones_are_drawn_once_and_a_cut_off_drawing_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    kind = tmp_path / "kind"
    options = {"model": "tiny", "data": "x", "resolution": 64, "num_inference_steps": 2, "class_data": str(kind)}
    config = TrainConfig(**options, class_prompt="a red circle", num_class_images=3)
    draw_missing(config, locate("tiny"), torch.device("cpu"))
    names = [f"drawn-{seed:05d}.png" for seed in range(3)]
    assert sorted(path.name for path in kind.iterdir()) == names
    drawn = {path.name: path.read_bytes() for path in kind.iterdir()}
    assert Image.open(kind / names[0]).size == (64, 64)
    assert len(set(drawn.values())) == 3
    (kind / names[1]).unlink()
    capsys.readouterr()
    draw_missing(config, locate("tiny"), torch.device("cpu"))
    assert "1 of 'a red circle'" in capsys.readouterr().out
    assert sorted(path.name for path in kind.iterdir()) == names
    draw_missing(config, locate("tiny"), torch.device("cpu"))
    assert capsys.readouterr().out == ""


def test_what_cannot_be_drawn_or_has_no_caption_is_told(make_pictures: MakePictures, tmp_path: Path) -> None:
    dog, dogs = folders(make_pictures, tmp_path, 2, 2)
    config = TrainConfig(model="tiny", data=str(dog), prompt="x", class_data=str(dogs), num_class_images=3)
    with pytest.raises(UsageError, match=r"class_data .*: 2 of 3 pictures; give --class_prompt"):
        draw_missing(config, locate("tiny"), torch.device("cpu"))
    with pytest.raises(UsageError, match=r"class_data: 2 of 2 pictures without a caption; give --class_prompt"):
        open_pictures(config, locate("tiny"), None)


def test_class_pictures_among_those_of_the_subject_are_refused(make_pictures: MakePictures, tmp_path: Path) -> None:
    dog = make_pictures(tmp_path / "dog", count=2)
    config = TrainConfig(model="tiny", data=str(dog), prompt="x", class_data=str(dog / "class"), class_prompt="y")
    with pytest.raises(UsageError, match=r"class_data .*class lies inside --data .*dog, all of which is the subject"):
        fine_tune(config)


def test_a_run_learns_both_and_its_defaults_are_those_of_the_subject(
    make_pictures: MakePictures, tmp_path: Path
) -> None:
    dog, dogs = folders(make_pictures, tmp_path, 3, 3)
    out = fine_tune(
        TrainConfig(
            data=str(dog), prompt="sks dog", class_data=str(dogs), class_prompt="a dog",
            output_dir=str(tmp_path / "out"), max_train_steps=2, train_batch_size=2, rank=2,
            num_inference_steps=0, resolution=64,
        )
    )  # fmt: skip
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]
    assert json.loads((out / "ledger.json").read_text())["found"] == 6
    assert "caption_dropout = 0.0" in (out / "config.toml").read_text()


def test_prior_prediction_teaches_the_kind_as_the_model_knew_it(make_pictures: MakePictures, tmp_path: Path) -> None:
    dog, dogs = folders(make_pictures, tmp_path, 2, 2)
    options = {
        "data": str(dog), "prompt": "sks dog", "class_data": str(dogs), "class_prompt": "a dog", "max_train_steps": 1,
        "train_batch_size": 4, "rank": 2, "num_inference_steps": 0, "resolution": 64,
    }  # fmt: skip
    losses = []
    for name, more in {"noise": {}, "answer": {"prior_prediction": True}}.items():
        out = fine_tune(TrainConfig(**options | more, output_dir=str(tmp_path / name)))
        losses.append(json.loads((out / "metrics.jsonl").read_text())["loss"])
    assert 0 < losses[1] < 0.8 * losses[0]  # two of four answer as they did
    with pytest.raises(UsageError, match="the model does not predict v_prediction yet; leave prediction_type out"):
        fine_tune(TrainConfig(**options, prior_prediction=True, prediction_type="v_prediction"))
