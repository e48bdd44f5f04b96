"""report.html: complete, self-contained, and safe whatever the names and captions are."""

import json
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from finetune.results.report import write_report

NASTY = "</script><script>alert(1)</script>\u202e" + 10_000 * "x"


class Page(HTMLParser):
    """Tags and text of a page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder as a run of 30 steps leaves it, with a picture that could not be read."""
    folder = tmp_path / "a run"
    (folder / "samples").mkdir(parents=True)
    for step in (0, 10, 20, 30):
        Image.new("RGB", (900, 300), (8 * step, 0, 0)).save(folder / f"samples/step-{step}.png")
    metrics = [{"step": step, "loss": 1 / step if step != 7 else None} for step in range(1, 31)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metrics) + '{"step": 31, "lo')
    changes = {key: [-0.2, -0.3, -0.1] for key in ("change", "change_low", "change_middle", "change_high")}
    checks = [{"step": 0, "loss": 0.5}, {"step": 15, "loss": 0.3} | changes, {"step": 30, "loss": 0.4} | changes]
    (folder / "validation.jsonl").write_text("".join(json.dumps(line) + "\n" for line in checks))
    drifts = [{"step": 0, "forgetting": 0.0}, {"step": 30, "forgetting": 0.125, "with_trigger": 0.5}]
    (folder / "forgetting.jsonl").write_text("".join(json.dumps(line) + "\n" for line in drifts))
    copies = [{"step": 0, "pictures": 4, "copies": 0}, {"step": 30, "pictures": 4, "copies": 3}]
    (folder / "copies.jsonl").write_text("".join(json.dumps(line) + "\n" for line in copies))
    Image.new("RGB", (300, 900)).save(folder / "pictures.jpg")
    ledger = {"found": 9, "trained": 7, "quarantined": 1, "held_out": 1, "captions": 0, "skipped": {NASTY: 1}}
    (folder / "ledger.json").write_text(json.dumps(ledger))
    (folder / "quarantine.jsonl").write_text(json.dumps({"path": NASTY, "reason": "truncated"}) + "\n")
    return folder


def written(folder: Path, **more: object) -> Path:
    metadata = {
        "step": 30,
        "facts": {"model": "tiny"},
        "given": {"prompt": NASTY},
        "derived": {"rank": 16},
        "load": {"diffusers": "load(it)"},
    }
    return write_report(folder, **(metadata | more))  # pyright: ignore[reportArgumentType]


def test_it_tells_everything_and_asks_no_network(run: Path) -> None:
    path = written(run)
    page = Page(path)
    for text in (
        "a run",
        "tiny",
        "load(it)",
        "least at step 15: -0.2000",
        "step 10",
        "held out",
        "12.5% of the effect of unrelated prompts has changed, 50.0% with the trigger",
        "rank16",
        "Right: step 30: 3 of 4 are near copies of training images.",
        "truncated",
        "Step 0",
    ):
        assert text.lower() in page.text.lower()
    assert [source["src"].split(",")[0] for source in page.of("img") if source["src"]] == 5 * ["data:image/jpeg;base64"]
    assert not any(attribute in attributes for _, attributes in page.tags for attribute in ("href", "action", "srcset"))
    assert "default-src 'none'" in str(page.of("meta")[2]["content"])
    assert path.stat().st_size < 5e6


def test_nothing_in_it_is_run_or_taken_for_markup(run: Path) -> None:
    page = Page(written(run))
    assert page.of("script") == []
    assert page.text.count(NASTY) == 3  # option, ledger, quarantine


def test_it_can_be_read_without_eyes(run: Path) -> None:
    page = Page(written(run))
    assert page.of("html")[0]["lang"] == "en"
    assert all(attributes.get("alt") for attributes in page.of("img"))
    assert all(attributes.get("aria-label") for attributes in (*page.of("svg"), *page.of("input")))


def test_a_run_that_has_hardly_begun_has_one(tmp_path: Path) -> None:
    page = Page(written(tmp_path, given={}, derived={}, load={}, step=0))
    assert "tiny" in page.text
    assert page.of("img") == page.of("svg") == []


def test_the_pictures_are_those_of_the_step_that_is_exported(run: Path) -> None:
    assert "Right: step 20." in Page(written(run, step=20)).text


def test_many_large_grids_stay_below_five_megabytes(run: Path) -> None:
    noise = Image.effect_noise((1200, 1200), 100).convert("RGB")
    for step in range(0, 301, 10):
        noise.save(run / f"samples/step-{step}.png", compress_level=0)
    assert written(run, step=300).stat().st_size < 5e6
