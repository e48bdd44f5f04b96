"""The page: choose images, start and watch runs, compare them, draw with the results.

It runs finetune-unet as a person would, and reads run folders; it keeps nothing that a run needs.
"""

import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gradio as gr

from finetune.atomic_io import is_inside
from finetune.errors import UsageError
from finetune.models.families import FAMILIES
from finetune.page import views
from finetune.page.allowed_paths import AllowedPaths
from finetune.page.form import form_of
from finetune.page.processes import Queue, command_line, run_command
from finetune.results.event_reader import RunEvents
from finetune.results.report_sections import of_copies

_TICK = 1.0
"""Seconds between two looks at the runs."""


class Page:
    """What the buttons do, over the folders that are open to the page."""

    def __init__(self, places: AllowedPaths) -> None:
        self.places = places
        self.queue = Queue(places.work)
        self._followers: dict[str, RunEvents] = {}
        self._lock = threading.Lock()

    def follower(self, name: str | None) -> RunEvents | None:
        """The run of this name, read up to now; None where there is none."""
        if not name or name not in self.places.run_names():
            return None
        with self._lock:
            follower = self._followers.setdefault(name, RunEvents(self.places.runs / name))
            follower.read()
        return follower

    def preview(self, *filled: Any) -> str:
        """A contact sheet of the pictures, and what is to be noticed about them."""
        words = form_of(filled).words(self.places)
        with tempfile.TemporaryDirectory() as scratch:
            sheet = Path(scratch) / "sheet.png"
            answer = run_command(["preview", *words, "--output", str(sheet)], self.places.work)
            picture = views.of_picture(sheet, "the images as training sees them") if answer.ok else ""
        return picture + views.of_text(answer.text.replace(f"{sheet}: ", ""))

    def plan(self, *filled: Any) -> str:
        """What the run would do and take."""
        return views.of_text(run_command(["plan", *form_of(filled).words(self.places)], self.places.work).text)

    def command(self, *filled: Any) -> str:
        return command_line(form_of(filled).words(self.places))

    def start(self, *filled: Any) -> str:
        """Put the run into the queue."""
        self.queue.add(form_of(filled).words(self.places))
        return views.of_text("Queued. See the Watch tab.")

    def stop(self, name: str | None) -> str:
        self.places.run(name)
        run = self.follower(name)
        assert run is not None
        run.stop()
        return views.of_text(f"{name}: it is stopping, and ends with a checkpoint after this step.")

    def resume(self, name: str | None) -> str:
        run = self.places.run(name)
        self.queue.add(["--resume_from_checkpoint", "latest", "--output_dir", str(run)])
        return views.of_text(f"{name}: it is in the queue, and goes on from its last checkpoint.")

    def draw(self, name: str | None, prompt: str, seed: float, steps: float) -> str:
        run = self.places.run(name)
        with tempfile.TemporaryDirectory() as scratch:
            options = {"prompt": prompt, "seed": str(int(seed)), "num_inference_steps": str(int(steps))}
            words = [f"--{option}={value}" for option, value in options.items() if value]
            answer = run_command(["sample", "--model", str(run), *words, "--output", scratch], self.places.work)
            drawn = sorted(Path(scratch).glob("*.png"))
            return views.of_picture(drawn[0], prompt) if answer.ok and drawn else views.of_text(answer.text)

    def picture(self, name: str | None, number: float) -> str:
        """The grid of this number, from the first."""
        run = self.follower(name)
        steps = sorted(run.pictures) if run else []
        if run is None or not steps:
            return ""
        step = steps[min(int(number), len(steps) - 1)]
        below = f"Step {step}: {of_copies(run.copies[step])}" if step in run.copies else f"Step {step}"
        path = run.folder / run.pictures[step]
        if not is_inside(path, run.folder):
            return ""
        return views.of_picture(path, f"{name}: images at step {step}", below)

    def tick(self, name: str | None, other: str | None, state: dict[str, Any]) -> list[Any]:
        """What has changed since this page was told last: both runs, pictures, the queue, names of runs."""
        runs = {which: self.follower(called) for which, called in (("first", name), ("second", other))}
        now: dict[str, Any] = {which: (run and (run.folder.name, run.version)) for which, run in runs.items()}
        now |= {"queue": self.queue.entries(), "names": self.places.run_names()}
        now["grids"] = [(run.folder.name, len(run.pictures)) if run else None for run in runs.values()]
        new = {part for part in now if now[part] != state.get(part, ())}
        grids = len(runs["first"].pictures) if runs["first"] else 0
        first, second = (views.of_run(runs[which]) if which in new else gr.skip() for which in runs)
        pictures = [self.picture(called, grids) for called in (name, other)] if "grids" in new else [gr.skip()] * 2
        last = max(grids - 1, 0)
        slider = gr.Slider(maximum=max(last, 1), value=last) if "grids" in new else gr.skip()
        names = now["names"]
        begun = [new_one for new_one in names if new_one not in state.get("names", names)]  # since the last look
        chosen = next(iter(begun), name if name in names else next(iter(names), None))
        choice = gr.Dropdown(choices=names, value=chosen) if "names" in new else gr.skip()
        comparison = gr.Dropdown(choices=["", *names]) if "names" in new else gr.skip()
        queue = views.of_queue(*now["queue"]) if "queue" in new else gr.skip()
        return [first, second if other else "", *pictures, slider, choice, comparison, queue, now]


def show_errors(do: Callable[..., str]) -> Callable[..., str]:
    """Wrap `do` so that its usage errors are shown on the page."""

    def doing(*values: Any) -> str:
        try:
            return do(*values)
        except UsageError as error:
            return views.of_text(str(error))

    return doing


def build(page: Page) -> gr.Blocks:
    """The page's layout, and which button does what."""
    with gr.Blocks(title="finetune-unet") as blocks:
        gr.Markdown("# finetune-unet")
        with gr.Tab("Start"):
            _start_tab(page, blocks)
        with gr.Tab("Watch"):
            name = _watch_tab(page)
        with gr.Tab("Generate"):
            prompt = gr.Textbox(label="Prompt")
            with gr.Row():
                seed = gr.Number(0, label="Seed", precision=0)
                steps = gr.Number(20, label="Sampler steps", precision=0)
            draw = gr.Button("Generate with the run of the Watch tab", variant="primary")
            drawn = gr.HTML()
            draw.click(show_errors(page.draw), [name, prompt, seed, steps], drawn)
    return blocks


def _start_tab(page: Page, blocks: gr.Blocks) -> None:
    with gr.Row():
        data = gr.Dropdown(
            page.places.picture_folders(), label="Pictures", allow_custom_value=True, info="a folder or file"
        )
        model = gr.Dropdown(list(FAMILIES), value="tiny", label="Model", allow_custom_value=True)
        method = gr.Dropdown([("default of the model", ""), "lora", "full"], value="", label="Method")
    with gr.Row():
        prompt = gr.Textbox(label="Prompt", info="for images without a caption")
        trigger = gr.Textbox(label="Trigger word")
        steps = gr.Number(0, label="Steps", precision=0, minimum=0, info="0: chosen by the number of images")
    with gr.Row():
        early = gr.Checkbox(label="Stop early when the validation loss rises")
        more = gr.Textbox(label="More options", info="numbers, switches and choices, such as --rank 8")
    filled = [data, model, method, prompt, trigger, steps, early, more]
    with gr.Row():
        preview, plan = gr.Button("Preview images"), gr.Button("Plan")
        start = gr.Button("Start", variant="primary")
    command = gr.Textbox(label="The same command for a terminal", interactive=False, buttons=["copy"], lines=2)
    answer = gr.HTML()
    preview.click(show_errors(page.preview), filled, answer)
    plan.click(show_errors(page.plan), filled, answer)
    start.click(show_errors(page.start), filled, answer)
    update_command = _or_nothing(page.command)
    blocks.load(update_command, filled, command, show_progress="hidden")
    for field in filled:
        field.change(update_command, filled, command, show_progress="hidden")


def _or_nothing(do: Callable[..., str]) -> Callable[..., str]:
    """Wrap `do` so that it returns "" while the form is incomplete."""

    def doing(*values: Any) -> str:
        try:
            return do(*values)
        except UsageError:
            return ""

    return doing


def _watch_tab(page: Page) -> gr.Dropdown:
    names = page.places.run_names()
    with gr.Row():
        name = gr.Dropdown(names, value=next(iter(names), None), label="Run")
        other = gr.Dropdown(["", *names], value="", label="Compare with")
    with gr.Row():
        stopping, resuming = gr.Button("Save a checkpoint and stop"), gr.Button("Resume")
    answer = gr.HTML()
    with gr.Row():
        with gr.Column(min_width=300):
            first = gr.HTML()
        with gr.Column(min_width=300, visible=False) as comparison:
            second = gr.HTML()
    slider = gr.Slider(0, 1, value=0, step=1, label="Sample grid, from first to last")
    with gr.Row():
        with gr.Column(min_width=300):
            grid = gr.HTML()
        with gr.Column(min_width=300, visible=False) as pictures_beside:
            grid_beside = gr.HTML()
    gr.Markdown("## Queue")
    queue = gr.HTML()
    state = gr.State({})
    outputs = [first, second, grid, grid_beside, slider, name, other, queue, state]
    timer = gr.Timer(_TICK)
    timer.tick(page.tick, [name, other, state], outputs, show_progress="hidden")
    slider.input(page.picture, [name, slider], grid, show_progress="hidden")
    slider.input(page.picture, [other, slider], grid_beside, show_progress="hidden")
    other.change(lambda called: 2 * [gr.Column(visible=bool(called))], other, [comparison, pictures_beside])
    stopping.click(show_errors(page.stop), name, answer)
    resuming.click(show_errors(page.resume), name, answer)
    return name
