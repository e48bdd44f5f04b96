"""What is exported loads in the versions of diffusers that people have; `matrix.py` says how it is measured."""

import json
import os
from pathlib import Path

import pytest

from tests.clients.environments import CLIENTS, make
from tests.clients.files import Case, write_cases
from tests.clients.matrix import PAGE, RESULTS, page_with, read_with, rows

RECORDED = json.loads(RESULTS.read_text())


@pytest.fixture(scope="module")
def clients(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the versions are installed: the folder that FINETUNE_CLIENTS names, or a new one."""
    folder = Path(os.environ.get("FINETUNE_CLIENTS") or tmp_path_factory.mktemp("clients"))
    make(folder)
    return folder


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Case]]:
    folder = tmp_path_factory.mktemp("files")
    return folder, write_cases(folder)


@pytest.mark.slow
@pytest.mark.parametrize("version", CLIENTS)
def test_every_file_is_read_as_it_is_recorded(version: str, clients: Path, written: tuple[Path, list[Case]]) -> None:
    folder, cases = written
    found = rows(cases, {version: read_with(version, clients, folder)})
    recorded = [row | {"read by": {version: row["read by"][version]}} for row in RECORDED]
    assert found == recorded


def test_the_table_in_the_documentation_is_that_of_the_results() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert page == page_with(page, RECORDED)


def test_every_version_reads_the_file_for_diffusers_and_pipelines() -> None:
    for row in RECORDED:
        if (row["form"] == "peft" and row["what"] not in ("LoHa", "LoKr")) or row["form"] in (
            "pipeline",
            "single-file",
        ):
            assert set(row["read by"].values()) == {"yes"}, row
