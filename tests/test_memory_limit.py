"""The memory that a container or a job allows."""

from pathlib import Path

import psutil
import pytest

from finetune.memory_limit import memory_available, memory_limit


@pytest.mark.parametrize(
    ("place", "group", "names"),
    [
        ("", "0::/job/step", ("memory.max", "memory.current")),
        ("memory", "5:cpu,memory:/job/step", ("memory.limit_in_bytes", "memory.usage_in_bytes")),
    ],
    ids=["version 2", "version 1"],
)
def test_the_least_of_the_groups_around_it_counts(
    tmp_path: Path, place: str, group: str, names: tuple[str, str]
) -> None:
    own = tmp_path / "own"
    own.write_text(f"{group}\n")
    for folder, limit in (("job", "3000"), ("job/step", "2000" if place else "max")):
        (tmp_path / place / folder).mkdir(parents=True)
        (tmp_path / place / folder / names[0]).write_text(f"{limit}\n")
        (tmp_path / place / folder / names[1]).write_text("500\n")
    least = 2000 if place else 3000
    assert memory_limit(tmp_path, own) == least
    assert memory_available(tmp_path, own) == least - 500


def test_without_a_limit_it_is_what_the_machine_has(tmp_path: Path) -> None:
    assert memory_limit(tmp_path, tmp_path / "nothing") == psutil.virtual_memory().total
