"""What the page shows of a run: its state in words, samples and files."""

from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from finetune.atomic_io import is_inside
from finetune.results.event_reader import RunEvents

_HIGH_FORGETTING = 0.3
"""Share of the effect of unrelated prompts that may change before the page warns of it."""


@dataclass(frozen=True)
class Sample:
    """A grid of samples."""

    step: int
    path: str
    """In the run folder."""
    caption: str


@dataclass(frozen=True)
class ResultFile:
    """A file of a run that can be downloaded."""

    path: str
    """In the run folder."""
    size: str
    use: str


class RunView:
    """A run, read up to now.

    Args:
        events: of the run.
    """

    def __init__(self, events: RunEvents) -> None:
        self.events, self.name = events, events.folder.name
        self.state = "stopping" if events.stopping and events.state == "running" else events.state

    @property
    def total(self) -> int:
        return self._progress()[2]

    @property
    def done(self) -> int:
        return self._progress()[1]

    def _progress(self) -> tuple[str, int, int]:
        """What is going on, how much of it is done, and of how much."""
        run = self.events
        if run.phase == "encoding" and run.state == "running" and run.progress:
            return run.progress["name"], run.progress["done"], run.progress["total"]
        done = run.step.get("step", run.begun.get("step", 0))
        return (run.phase if self.state == "running" else self.state), done, run.begun.get("total", 0)

    @property
    def headline(self) -> str:
        """State, progress and time left."""
        run = self.events
        what, done, total = self._progress()
        facts = [what.capitalize()]
        if total:
            facts.append(f"step {done} of {total}" if run.phase != "encoding" else f"{done} of {total}")
        left = run.step.get("left")
        if self.state == "running" and run.phase == "training" and left is not None:
            facts.append(f"{timedelta(seconds=round(min(left, 1e9)))} left")
        return " · ".join(facts)

    @property
    def speed(self) -> str:
        """Speed and memory, as they were last measured."""
        speed, memory = (self.events.step.get(name) for name in ("images_per_second", "peak_memory_gb"))
        return "" if speed is None or memory is None else f"{speed:.3g} images/s · {memory:.1f} GB of memory"

    @property
    def why(self) -> str:
        """Why it is not running."""
        run = self.events
        if run.state == "cut off":
            return "Its process ended without an error message. Resume continues from the last checkpoint."
        return run.end["text"] if run.end else ""

    @property
    def verdicts(self) -> list[str]:
        """What the curves mean, in words."""
        verdicts = []
        changes = [line for line in self._validations() if line["step"]]
        if changes:
            change, low, high = changes[-1]["change"]
            best = min(changes, key=lambda line: line["loss"])["step"]
            if high < 0:
                after = f"; it was lowest at step {best}" if best < changes[-1]["step"] else ""
                verdicts.append(f"Learning: the validation loss has fallen by {-change:.1%}{after}.")
            elif low > 0:
                verdicts.append(f"Overfitting: the validation loss is {change:.1%} above that of the base model.")
            else:
                verdicts.append("The validation loss has not clearly changed yet.")
        forgetting = sorted(self.events.forgetting.items())
        if len(forgetting) > 1:
            share = forgetting[-1][1]["forgetting"]
            advice = (
                ": fewer steps, a lower learning rate or class images keep more" if share > _HIGH_FORGETTING else ""
            )
            verdicts.append(f"Forgetting: {share:.0%} of the effect of unrelated prompts has changed{advice}.")
        return verdicts

    def _validations(self) -> list[dict[str, Any]]:
        return [line for _, line in sorted(self.events.validations.items()) if "change" in line]

    @property
    def samples(self) -> list[Sample]:
        """The grids that lie in the run folder, by step."""
        run = self.events
        return [
            Sample(step, path, _of_copies(run.copies.get(step)))
            for step, path in sorted(run.pictures.items())
            if is_inside(run.folder / path, run.folder) and (run.folder / path).is_file()
        ]

    @property
    def files(self) -> list[ResultFile]:
        """The results of a run that has ended, each with how to use it."""
        folder = self.events.folder
        if self.state == "running":
            return []
        found = sorted(path for pattern in ("*.safetensors", "exports/*.safetensors") for path in folder.glob(pattern))
        return [
            ResultFile(str(path.relative_to(folder)), f"{path.stat().st_size / 1e6:.1f} MB", _use(path, folder))
            for path in found
            if is_inside(path, folder) and path.is_file()
        ]


def _use(path: Path, folder: Path) -> str:
    """Where a program looks for such a file."""
    if path.name == "pytorch_lora_weights.safetensors":
        return 'diffusers: pipeline.load_lora_weights("pytorch_lora_weights.safetensors")'
    if path.parent != folder:
        return "ComfyUI: models/checkpoints/. A1111 and Forge: models/Stable-diffusion/."
    return "ComfyUI: models/loras/. A1111 and Forge: models/Lora/."


def _of_copies(copies: dict[str, int] | None) -> str:
    if not copies or not copies["copies"]:
        return ""
    return f"{copies['copies']} of {copies['pictures']} images look like copies of training images"
