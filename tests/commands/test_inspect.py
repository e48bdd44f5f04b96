import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from finetune import cli
from finetune.config import TrainConfig
from finetune.recipe import fine_tune


@pytest.fixture(scope="module")
def trained(make_pictures: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Pictures, and a run on them of three steps with a checkpoint after two."""
    place = tmp_path_factory.mktemp("inspected")
    pictures = make_pictures(place / "pictures", captions=True)
    options = {"checkpointing_steps": 2, "random_flip": True, "caption_dropout": 0.4, "num_inference_steps": 0}
    out = fine_tune(
        TrainConfig(data=str(pictures), output_dir=str(place / "out"), max_train_steps=3, train_batch_size=4, **options)
    )
    return pictures, out


@pytest.mark.parametrize("step", [1, 3])
def test_the_loss_of_a_step_is_computed_again(
    trained: tuple[Path, Path], capsys: pytest.CaptureFixture[str], step: int
) -> None:
    _, out = trained
    assert cli.main(["inspect", "--run", str(out), "--step", str(step)]) == 0
    on_progress = capsys.readouterr().out
    found = re.search(rf"step {step}: loss (\S+), in metrics.jsonl (\S+)", on_progress)
    assert found
    logged = [json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert float(found[2]) == pytest.approx(logged[step - 1], abs=1e-6)
    assert float(found[1]) == pytest.approx(logged[step - 1], abs=2e-6)
    rows = re.findall(
        r"^(\S+\.png): timestep (\d+), loss (\S+), (\d+) of 75 tokens, '(.*)'$", on_progress, re.MULTILINE
    )
    assert len(rows) == 4
    assert sum(float(loss) for _, _, loss, _, _ in rows) / 4 == pytest.approx(logged[step - 1], abs=1e-4)
    assert Image.open(out / f"step-{step}.png").size[0] > 600


def test_without_the_weights_all_but_the_loss_is_told(
    trained: tuple[Path, Path], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    _, out = trained
    sheet = tmp_path / "sheet.png"
    assert cli.main(["inspect", "--run", str(out), "--step", "2", "--output", str(sheet)]) == 0
    on_progress = capsys.readouterr().out
    assert "no checkpoint 1; possible for these steps: 1, 3" in on_progress
    assert len(re.findall(r"timestep \d+, \d+ of 75 tokens", on_progress)) == 4
    assert sheet.is_file()


def test_pictures_that_have_changed_are_noticed(trained: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    pictures, out = trained
    caption = pictures / "00.txt"
    before = caption.read_text()
    caption.write_text("another one")
    try:
        assert cli.main(["inspect", "--run", str(out), "--step", "2"]) == 0
    finally:
        caption.write_text(before)
    assert "note: the images, their names or captions differ from those of the run" in capsys.readouterr().out


def test_what_is_no_step_of_a_run_is_told(trained: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    _, out = trained
    assert cli.main(["inspect", "--run", str(out), "--step", "4"]) == 2
    assert "--step 4: expected 1 to 3" in capsys.readouterr().err
    assert cli.main(["inspect", "--run", str(out / "samples"), "--step", "1"]) == 2
    assert "no run folder" in capsys.readouterr().err
