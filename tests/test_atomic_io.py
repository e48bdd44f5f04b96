"""Files on file systems that lack something."""

import os
from pathlib import Path

import pytest

from finetune.atomic_io import as_readable_as


def test_a_file_gets_the_permissions_of_another(tmp_path: Path) -> None:
    private, ordinary = tmp_path / "private", tmp_path / "ordinary"
    private.touch(mode=0o600)
    ordinary.touch(mode=0o644)
    as_readable_as(private, ordinary)
    assert private.stat().st_mode == ordinary.stat().st_mode


@pytest.mark.parametrize("error", [PermissionError(1, "Operation not permitted"), NotImplementedError()])
def test_a_file_system_without_permissions_ends_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def refusing(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(os, "chmod", refusing)
    as_readable_as(tmp_path, tmp_path)
