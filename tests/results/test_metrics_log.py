"""Files of JSON lines that a run appends to."""

import json
from pathlib import Path

from finetune.results.metrics_log import FAULTS, append_line, metrics_log


def test_a_name_with_a_line_separator_breaks_no_line(tmp_path: Path) -> None:
    line = json.dumps({"step": 1, "id": "a\u2028b.png"}, ensure_ascii=False) + "\n"
    (tmp_path / FAULTS).write_text(line * 2 + line.replace(": 1", ": 9"), encoding="utf-8")
    with metrics_log(tmp_path, 3):
        pass
    assert (tmp_path / FAULTS).read_text(encoding="utf-8") == line * 2


def test_a_line_that_was_cut_off_is_taken_out_before_the_next(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    append_line(path, {"step": 0})
    with path.open("a") as file:
        file.write('{"step": 1, "los')
    append_line(path, {"step": 1})
    assert [json.loads(line) for line in path.read_text().splitlines()] == [{"step": 0}, {"step": 1}]
