"""The page: choose images, start and watch runs, compare them, draw with the results.

It runs finetune-unet as a person would, and reads run folders; it keeps nothing that a run needs.
"""

import base64
import tempfile
import threading
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from urllib.parse import urlencode

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, RedirectResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from finetune.atomic_io import is_inside
from finetune.errors import FinetuneError, UsageError
from finetune.models.families import FAMILIES
from finetune.page.allowed_paths import AllowedPaths
from finetune.page.draw_pages import DrawPages
from finetune.page.form import filled_by, form_words
from finetune.page.image_pages import ImagePages
from finetune.page.machine import Machine
from finetune.page.option_fields import PREFIX, option_fields
from finetune.page.plan_rows import memory_share, plan_rows
from finetune.page.processes import command_line, run_command
from finetune.page.queue import Job, Queue
from finetune.page.responses import Templates, posted, stream
from finetune.page.run_curves import run_curves
from finetune.page.run_options import differing_options
from finetune.page.run_view import RunView
from finetune.page.thumbnails import thumbnail
from finetune.page.worker import Worker
from finetune.results.event_reader import RunEvents

_THUMBNAIL = 320
"""Pixels of a run's picture on the home page."""
_MOST_COMPARED = 6
"""Runs on one chart: each needs a colour."""
_MODELS = ("sd15", "sd21", "sdxl", "ddpm", "tiny")
"""The families that are shown as cards; any other is typed."""
_REPORT_POLICY = (
    "sandbox allow-scripts; default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
)
"""A report has its scripts and styles inside, so it gets an origin of its own, from which nothing here can be asked."""


class Page:
    """The handlers, over the folders that are open to the page."""

    def __init__(self, places: AllowedPaths, devices: Sequence[str] = ()) -> None:
        self.places = places
        self.queue, self.worker, self.machine = Queue(places.work, devices), Worker(places.work), Machine(places.work)
        self._followers: dict[str, RunEvents] = {}
        self._lock = threading.Lock()
        self._templates = Templates()
        self.render, self.answer = self._templates.render, self._templates.answer
        self.images, self.drawing = ImagePages(places, self._templates), DrawPages(places, self._templates)

    def events(self, name: str) -> RunEvents:
        """The run of this name, read up to now. Raises HTTPException where there is none."""
        if not self.places.is_run(name):
            raise HTTPException(404, f"no run {name}")
        with self._lock:
            events = self._followers.setdefault(name, RunEvents(self.places.runs / name))
            events.read()
        return events

    def view(self, name: str) -> RunView:
        return RunView(self.events(name))

    # Home and queue

    def home(self, request: Request) -> Response:
        return self.answer("home.html", live=self._home_live(), deleted=self.places.deleted_runs())

    def machine_bar(self, request: Request) -> Response:
        return self.answer("machine.html", meters=self.machine.meters())

    def _home_live(self) -> str:
        views = [self.view(name) for name in self.places.run_names()]
        return self.render("home_live.html", runs=views, jobs=self.queue.jobs(), edit_of=_edit_of)

    def _home_version(self) -> object:
        versions = [(name, self.events(name).version) for name in self.places.run_names()]
        return versions, self.queue.jobs()

    def home_events(self, request: Request) -> Response:
        return stream(self._home_version, lambda: {"live": self._home_live()})

    def remove_job(self, request: Request) -> Response:
        self.queue.remove(request.path_params["job"])
        return RedirectResponse("/", 303)

    def move_job(self, request: Request) -> Response:
        self.queue.move_up(request.path_params["job"])
        return RedirectResponse("/", 303)

    def delete_run(self, request: Request) -> Response:
        """Move a run to where it can be brought back from."""
        name = request.path_params["name"]
        if self.view(name).state in ("running", "stopping"):
            raise UsageError(f"{name}: it runs; stop it first")
        self.places.delete_run(name)
        return RedirectResponse("/", 303)

    def restore_run(self, request: Request) -> Response:
        self.places.restore_run(request.path_params["name"])
        return RedirectResponse("/", 303)

    # A run

    def run(self, request: Request) -> Response:
        name = request.path_params["name"]
        view, others = self.view(name), [other for other in self.places.run_names() if other != name]
        return self.answer("run.html", run=view, others=others, parts=self._run_parts(view))

    def _run_parts(self, view: RunView) -> dict[str, str]:
        return {"live": self.render("run_live.html", run=view), "samples": self.render("samples.html", run=view)}

    def run_events(self, request: Request) -> Response:
        name = request.path_params["name"]
        self.events(name)
        shown = {"pictures": -1}

        def parts() -> dict[str, str]:
            view = self.view(name)
            parts = {"live": self.render("run_live.html", run=view), "curves": str(view.done)}
            if len(view.samples) != shown["pictures"]:  # not at each step: the slider may be in use
                shown["pictures"] = len(view.samples)
                parts["samples"] = self.render("samples.html", run=view)
            return parts

        return stream(lambda: self.events(name).version, parts)

    def stop(self, request: Request) -> Response:
        events = self.events(request.path_params["name"])
        events.stop()
        return RedirectResponse(f"/runs/{events.folder.name}", 303)

    def resume(self, request: Request) -> Response:
        folder = self.events(request.path_params["name"]).folder
        self.queue.add(["--resume_from_checkpoint", "latest", "--output_dir", str(folder)])
        return RedirectResponse("/", 303)

    def sample(self, request: Request) -> Response:
        """A grid of samples, whole or as a thumbnail."""
        path = self._file(request, [sample.path for sample in self.view(request.path_params["name"]).samples])
        if "small" not in request.query_params:
            return FileResponse(path)
        return Response(thumbnail(path, _THUMBNAIL), media_type="image/jpeg")

    def download(self, request: Request) -> Response:
        path = self._file(request, [file.path for file in self.view(request.path_params["name"]).files])
        return FileResponse(path, filename=path.name)

    def _file(self, request: Request, offered: list[str]) -> Path:
        """A file of a run, one of those that the page offers. Raises HTTPException for any other."""
        name, path = request.path_params["name"], request.path_params["path"]
        if path not in offered:
            raise HTTPException(404, f"{name} has no file {path}")
        return self.places.runs / name / path

    def report(self, request: Request) -> Response:
        path = self.events(request.path_params["name"]).folder / "report.html"
        if not path.is_file() or not is_inside(path, self.places.runs):
            raise HTTPException(404, "this run has no report yet; it is written at its end")
        return FileResponse(path, headers={"content-security-policy": _REPORT_POLICY})

    def curves(self, request: Request) -> Response:
        events = self.events(request.path_params["name"])
        return JSONResponse([asdict(curve) for curve in run_curves(events)], headers={"cache-control": "no-store"})

    def compare(self, request: Request) -> Response:
        names = list(dict.fromkeys(request.query_params.getlist("run")))[:_MOST_COMPARED]
        views = [self.view(name) for name in names]
        differing = differing_options([view.events.folder for view in views])
        return self.answer("compare.html", runs=views, names=self.places.run_names(), chosen=names, differing=differing)

    # A new run

    def new(self, request: Request) -> Response:
        threading.Thread(target=self.worker.warm_up, daemon=True).start()
        return self._form_page(dict(request.query_params))

    def _form_page(self, filled: Mapping[str, str], error: str = "") -> Response:
        return self.answer(
            "new.html",
            status=400 if error else 200,
            error=error,
            filled=filled,
            folders=self.places.picture_folders(),
            models=[FAMILIES[name] for name in _MODELS],
            names=list(FAMILIES),
            sections=option_fields(),
            changed=sum(bool(value) for name, value in filled.items() if name.startswith(PREFIX)),
        )

    def start(self, filled: Mapping[str, str]) -> Response:
        try:
            self.queue.add(form_words(filled, self.places))
            self.worker.end()
        except UsageError as error:
            return self._form_page(filled, str(error))
        return RedirectResponse("/", 303)

    def look(self, filled: Mapping[str, str]) -> Response:
        """A contact sheet of the images, and what is to be noticed about them."""
        words = form_words(filled, self.places)
        with tempfile.TemporaryDirectory() as scratch:
            sheet = Path(scratch) / "sheet.png"
            answer = self.worker.run(["preview", *words, "--output", str(sheet)])
            picture = _embedded(sheet) if answer.ok else ""
        text = answer.text.replace(f"{sheet}: ", "")
        return self.answer("answer.html", text=text, pictures=[picture] * answer.ok, failed=not answer.ok)

    def plan(self, filled: Mapping[str, str]) -> Response:
        """What the form, as it is now, would train: in a second, so without a measured speed."""
        try:
            words = form_words(filled, self.places)
        except UsageError as error:
            return self.answer("plan.html", rows=[], memory=None, error=str(error), complete=False, command="")
        answer = self.worker.run(["plan", "--timed_steps", "0", *words])
        rows = plan_rows(answer.text) if answer.ok else []
        error = "" if answer.ok else answer.text
        return self.answer(
            "plan.html",
            rows=rows,
            memory=memory_share(dict(rows).get("Memory", "")),
            error=error,
            complete=True,
            command=command_line(words),
        )

    def trial(self, filled: Mapping[str, str]) -> Response:
        answer = run_command(["plan", *form_words(filled, self.places)], self.places.work)
        time = dict(plan_rows(answer.text)).get("Time", "") if answer.ok else answer.text
        return self.answer("answer.html", text=time, pictures=[], failed=not answer.ok)


def _edit_of(job: Job) -> str:
    """The address of a form filled in with what a job's command says, as far as the form has fields for it."""
    return "/new?" + urlencode(filled_by(job.words))


def _embedded(path: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()


def build(page: Page) -> Starlette:
    """The page as an ASGI application, without its `Guard`."""

    async def refused(request: Request, error: Exception) -> Response:
        status = error.status_code if isinstance(error, HTTPException) else 400
        text = error.detail if isinstance(error, HTTPException) else str(error)
        if request.headers.get("accept") == "application/json":
            return JSONResponse({"error": text}, status)
        if request.headers.get("hx-request"):  # htmx shows nothing of an answer with another status
            return page.answer("answer.html", text=text, pictures=[], failed=True)
        return page.answer("error.html", status=status, text=text)

    static = StaticFiles(directory=str(Path(__file__).parent / "static"))
    routes = [
        Route("/", page.home),
        Route("/events", page.home_events),
        Route("/machine", page.machine_bar),
        Route("/deleted/{name}/restore", page.restore_run, methods=["POST"]),
        Route("/runs/{name}/delete", page.delete_run, methods=["POST"]),
        Route("/queue/{job}/up", page.move_job, methods=["POST"]),
        Route("/queue/{job}/remove", page.remove_job, methods=["POST"]),
        Route("/runs/{name}", page.run),
        Route("/runs/{name}/events", page.run_events),
        Route("/runs/{name}/curves", page.curves),
        Route("/runs/{name}/stop", page.stop, methods=["POST"]),
        Route("/runs/{name}/resume", page.resume, methods=["POST"]),
        Route("/runs/{name}/report", page.report),
        Route("/runs/{name}/samples/{path:path}", page.sample),
        Route("/runs/{name}/files/{path:path}", page.download),
        Route("/compare", page.compare),
        Route("/new", page.new),
        Route("/new/start", posted(page.start), methods=["POST"]),
        Route("/new/look", posted(page.look), methods=["POST"]),
        Route("/new/plan", posted(page.plan), methods=["POST"]),
        Route("/new/trial", posted(page.trial), methods=["POST"]),
        *page.images.routes(),
        *page.drawing.routes(),
        Mount("/static", static),
    ]
    return Starlette(
        routes=routes, exception_handlers={FinetuneError: refused, HTTPException: refused, OSError: refused}
    )
