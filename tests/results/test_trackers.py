"""Trackers: the id of a run, and logins."""

import sys
from pathlib import Path

import pytest

from finetune.errors import UsageError
from finetune.results.trackers import check_trackers, tracker_run_id


def test_a_resumed_run_keeps_its_id_and_a_new_one_gets_another(tmp_path: Path) -> None:
    folder = tmp_path / "my dog: 100%"
    folder.mkdir()
    first = tracker_run_id(folder, resumed=False)
    assert first.startswith("my-dog--100--")
    assert tracker_run_id(folder, resumed=True) == first
    assert tracker_run_id(folder, resumed=False) != first


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
