"""What the package logs, and whose handlers it goes to."""

import json
import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from finetune.log_handlers import PACKAGE, JsonHandler, TextHandler, install, labelled, logging_to

_LOG = logging.getLogger("finetune.run.summary")


@pytest.fixture(autouse=True)
def handlers_as_before() -> Iterator[None]:
    yield
    install(TextHandler())


def test_rows_notes_and_lines(capsys: pytest.CaptureFixture[str]) -> None:
    install(TextHandler())
    _LOG.info("a line of 100 %")
    _LOG.info("tiny", extra=labelled("Model"))
    _LOG.warning("%s is slow", "this")
    _LOG.debug("nobody reads this")
    assert capsys.readouterr().out == "a line of 100 %\nModel        tiny\nnote         this is slow\n"


def test_json_has_the_values(capsys: pytest.CaptureFixture[str]) -> None:
    install(JsonHandler())
    _LOG.info("step %s", 4, extra=labelled("", step=4, loss=0.5))
    _LOG.warning("this is slow")
    first, second = map(json.loads, capsys.readouterr().out.splitlines())
    assert (first["level"], first["message"], first["step"], first["loss"]) == ("info", "step 4", 4, 0.5)
    assert first["logger"] == "finetune.run.summary"
    assert first["time"].endswith("+00:00")
    assert (second["level"], second["message"]) == ("warning", "this is slow")


def test_other_processes_log_errors_alone(capsys: pytest.CaptureFixture[str]) -> None:
    with logging_to(silent=True):
        _LOG.warning("said by the main process")
        _LOG.error("this one failed")
    _LOG.warning("afterwards")
    assert capsys.readouterr().out == "note         this one failed\nnote         afterwards\n"


def test_a_reader_who_has_gone_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    class Gone:
        def isatty(self) -> bool:
            return False

        def write(self, text: str) -> int:
            raise BrokenPipeError

        flush = isatty

    monkeypatch.setattr(sys, "stdout", Gone())
    with pytest.raises(BrokenPipeError):
        _LOG.info("a line")


SCRIPT = """
import logging, sys
from finetune.log_handlers import logging_to
if sys.argv[1:]:
    logging.basicConfig(level=sys.argv[1], stream=sys.stdout, format="%(name)s|%(message)s")
log = logging.getLogger("finetune.recipe")
with logging_to():
    log.info("inside")
    log.warning("beware")
log.info("outside")
"""


@pytest.mark.parametrize(
    ("level", "out"),
    [
        ("", "inside\nnote         beware\n"),
        ("INFO", "finetune.recipe|inside\nfinetune.recipe|beware\nfinetune.recipe|outside\n"),
        ("WARNING", "finetune.recipe|beware\n"),
    ],
)
def test_the_configuration_of_a_program_is_respected(level: str, out: str) -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT, *([level] if level else [])], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == (out, "")


def test_a_run_logs_json_for_containers(pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from finetune.cli import main

    train = ["--model", "tiny", "--data", str(pictures), "--max_train_steps", "2", "--num_inference_steps", "0"]
    assert main([*train, "--log_format", "json", "--output_dir", str(tmp_path / "out")]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    labels = {line["label"]: line["message"] for line in lines if "label" in line}
    assert labels["Model"].startswith("tiny (")
    assert labels["Exported"].startswith(f"{tmp_path / 'out'} (verified: reloads ")
    (progress,) = [line for line in lines if line["message"].startswith("step 2 of 2")]
    assert (progress["step"], progress["steps"], progress["seconds_left"]) == (2, 2, 0)
    assert main([*train, "--log_format", "json", "--rank", "99999"]) == 2
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["level"] == "error"
    assert [type(handler) for handler in PACKAGE.handlers] == [JsonHandler]
