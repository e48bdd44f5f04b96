"""Killed while an export is written or moved in: the same command ends with the export of a run that was not killed."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from finetune.results.export import names_of_exports
from tests.faults.harness import digests, run, typed
from tests.faults.test_killed import killed_everywhere

_PARTS = r"(unet|vae|text_encoder|tokenizer|scheduler)\b|model_index|out\.safetensors|pytorch_lora"
EXPORT = rf"out/(\.export|\.[a-z_]+\.old|exports|{_PARTS})"
"""Paths of an export, in all stages of its way into the folder of a run."""
MOVES = r"out/(\.export\.moving|\.export\.part/[a-z_.]+$|\.[a-z_]+\.old|model_index)"
"""Those of the pipeline's parts while they are moved in."""

FORMS = {
    "pipeline": {"method": "full"},
    "lora": {"rank": 2, "lora_target_modules": "attn2.to_q"},
    "forms": {"rank": 2, "lora_target_modules": "attn2.to_q", "export_formats": ["diffusers", "unet"]},
}
SHARES = 2


@pytest.fixture(scope="session")
def ended(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[list[str], Path]]:
    """The words of a run whose export has a form, and the folder in which it has ended."""
    made: dict[str, tuple[list[str], Path]] = {}

    def of(form: str) -> tuple[list[str], Path]:
        if form not in made:
            given = {"data": pictures, "output_dir": "out", "max_train_steps": 1, "train_batch_size": 1, **FORMS[form]}
            words = typed({**given, "num_inference_steps": 0, "forgetting_prompts": 0, "resolution": 32})
            folder = tmp_path_factory.mktemp(form)
            done = run(words, folder)
            assert done.code == 0, done.said
            made[form] = words, folder / "out"
        return made[form]

    return of


@pytest.mark.slow
@pytest.mark.parametrize("share", range(SHARES))
@pytest.mark.parametrize("replaced", [False, True], ids=["new", "replaced"])
@pytest.mark.parametrize("form", FORMS)
def test_at_every_file_operation_of_an_export(
    form: str, replaced: bool, share: int, ended: Callable[[str], tuple[list[str], Path]], folder: Path
) -> None:
    killed_while_exporting(*ended(form), EXPORT, folder, replaced=replaced, share=share, shares=SHARES)


def test_while_the_parts_of_a_pipeline_are_exchanged(
    ended: Callable[[str], tuple[list[str], Path]], folder: Path
) -> None:
    killed_while_exporting(*ended("pipeline"), MOVES, folder, replaced=True, share=0, shares=2)


def killed_while_exporting(
    words: list[str], whole: Path, part: str, folder: Path, *, replaced: bool, share: int, shares: int
) -> None:
    """Kill the end of a run before each of its file operations on `part`, and end it with the same command."""
    earlier = folder / "earlier"
    shutil.copytree(whole, earlier)
    (earlier / "result.json").unlink()  # the last step is done, and a checkpoint of it is there
    if not replaced:
        for name in (*names_of_exports(), "out.safetensors", "exports"):
            path = earlier / name
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)

    def equal_after(place: Path) -> None:
        again = run(words, place)
        assert again.code == 0, again.said
        assert digests(place / "out") == digests(whole)
        assert [path.name for path in (place / "out").rglob(".*")] == [".lock"]

    points = killed_everywhere(part, share, words, folder, equal_after, shares=shares, earlier=earlier)
    assert points > 10
