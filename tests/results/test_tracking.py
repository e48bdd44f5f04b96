"""Files of JSON lines that a run appends to."""

import json
import sys
from pathlib import Path

import pytest

from finetune.errors import UsageError
from finetune.results.tracking import FAULTS, append_line, check_trackers, log, tracked_run


def test_a_name_with_a_line_separator_breaks_no_line(tmp_path: Path) -> None:
    line = json.dumps({"step": 1, "id": "a\u2028b.png"}, ensure_ascii=False) + "\n"
    (tmp_path / FAULTS).write_text(line * 2 + line.replace(": 1", ": 9"), encoding="utf-8")
    with log(tmp_path, 3):
        pass
    assert (tmp_path / FAULTS).read_text(encoding="utf-8") == line * 2


def test_a_line_that_was_cut_off_is_taken_out_before_the_next(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    append_line(path, {"step": 0})
    with path.open("a") as file:
        file.write('{"step": 1, "los')
    append_line(path, {"step": 1})
    assert [json.loads(line) for line in path.read_text().splitlines()] == [{"step": 0}, {"step": 1}]


def test_a_resumed_run_keeps_its_id_and_a_new_one_gets_another(tmp_path: Path) -> None:
    folder = tmp_path / "my dog: 100%"
    folder.mkdir()
    first = tracked_run(folder, resumed=False)
    assert first.startswith("my-dog--100--")
    assert tracked_run(folder, resumed=True) == first
    assert tracked_run(folder, resumed=False) != first


def test_a_tracker_without_a_login_is_one_line_before_anything_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Weights & Biases is no dependency of the tests: this answers as it does where there is no key and no terminal.
    (tmp_path / "wandb.py").write_text(
        "class errors:\n    class Error(Exception): ...\n\n"
        "def login(verify):\n    raise errors.Error('No API key configured.')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    with pytest.raises(UsageError, match=r"report_to wandb: No API key configured. \(or set WANDB_API_KEY"):
        check_trackers(["wandb"])
