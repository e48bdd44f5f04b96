"""The page that draws images with the result of a run, and keeps them in the run folder."""

import base64
import binascii
import io
import json
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from PIL import Image
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import FileResponse, Response
from starlette.routing import Route

from finetune.atomic_io import each_json_line, is_inside
from finetune.data.images import open_image
from finetune.errors import DataError, UsageError
from finetune.page.allowed_paths import AllowedPaths
from finetune.page.processes import run_command
from finetune.page.responses import Templates, posted

FOLDER = "generated"
"""In the run folder: the images, and `HISTORY`."""
HISTORY = "history.jsonl"
_SHOWN = 48
_MOST_STRENGTHS = 6
_LARGEST_FORM = 32 * 2**20
_OPTIONS = (
    "prompt",
    "negative_prompt",
    "seed",
    "num_inference_steps",
    "guidance_scale",
    "num_images",
    "width",
    "height",
)


@dataclass(frozen=True)
class Drawn:
    """An image that was drawn on the page."""

    file: str
    prompt: str
    settings: str
    """The other options, as on the command line."""
    at: float
    """In seconds since 1970."""


class DrawPages:
    """The handlers, over the runs that have ended."""

    def __init__(self, places: AllowedPaths, templates: Templates) -> None:
        self._places, self._templates = places, templates

    def routes(self) -> list[Route]:
        return [
            Route("/draw", self.form),
            Route("/draw", posted(self.draw, largest=_LARGEST_FORM), methods=["POST"]),
            Route("/runs/{name}/generated/{file}", self.image),
        ]

    def form(self, request: Request) -> Response:
        names = [name for name in self._places.run_names() if (self._places.runs / name / "result.json").is_file()]
        chosen = request.query_params.get("run", "")
        chosen = chosen if chosen in names else names[0] if names else ""
        drawn = self._history(chosen) if chosen else []
        return self._templates.answer("draw.html", names=names, chosen=chosen, drawn=drawn)

    def image(self, request: Request) -> Response:
        name, file = request.path_params["name"], request.path_params["file"]
        folder = self._places.run(name) / FOLDER
        path = folder / file
        if file not in [drawn.file for drawn in self._history(name)] or not is_inside(path, folder):
            raise HTTPException(404, f"{name} has no image {file}")
        return FileResponse(path, headers={"cache-control": "private, max-age=31536000, immutable"})

    def draw(self, filled: Mapping[str, str]) -> Response:
        """Draw the images, for each strength of the run's LoRA, and show them."""
        name = filled.get("run", "")
        run = self._places.run(name)
        words = [f"--{option}={filled[option]}" for option in _OPTIONS if filled.get(option)]
        drawn: list[Drawn] = []
        with tempfile.TemporaryDirectory() as scratch:
            words += self._start(filled, Path(scratch))
            for strength in _strengths(filled.get("strength", "")):
                more = [*words, f"--adapter_strength={strength:g}"] if strength != 1 else words
                answer = run_command(["sample", "--model", str(run), *more, "--output", scratch], self._places.work)
                if not answer.ok:
                    return self._templates.answer("answer.html", text=answer.text, pictures=[], failed=True)
                drawn += _kept(run, [Path(line) for line in answer.text.splitlines()], filled.get("prompt", ""), more)
        return self._templates.answer("drawn.html", run=name, drawn=drawn)

    def _start(self, filled: Mapping[str, str], scratch: Path) -> list[str]:
        """The options of an image to start from, which is written to a folder."""
        if not filled.get("image"):
            return []
        try:
            image = open_image(io.BytesIO(base64.b64decode(filled["image"], validate=True)), "image")
        except binascii.Error as error:
            raise UsageError("image: not base64") from error
        image.save(scratch / "start.png")
        strength = filled.get("denoising_strength") or "0.75"
        return ["--image", str(scratch / "start.png"), f"--denoising_strength={strength}"]

    def _history(self, name: str) -> list[Drawn]:
        """The images that were drawn with a run and are still there, the last first."""
        folder = self._places.runs / name / FOLDER
        try:
            lines = [Drawn(**line) for line in each_json_line(folder / HISTORY)]
        except (OSError, ValueError, TypeError):  # edited by hand
            return []
        there = [drawn for drawn in lines if (folder / Path(drawn.file).name).is_file()]
        return there[::-1][:_SHOWN]


def _strengths(given: str) -> list[float]:
    """One strength or several; 1 where none is given. Raises UsageError for what is no number or too many."""
    try:
        strengths = [float(word) for word in given.replace(",", " ").split()] or [1.0]
    except ValueError as error:
        raise UsageError(f"strength {given!r}: expected numbers") from error
    if len(strengths) > _MOST_STRENGTHS:
        raise UsageError(f"strength {given!r}: at most {_MOST_STRENGTHS} at once")
    return strengths


def _kept(run: Path, files: Sequence[Path], prompt: str, words: Sequence[str]) -> list[Drawn]:
    """The images, moved to the run folder and noted in its history."""
    folder, now = run / FOLDER, time.time()
    hidden = ("--prompt", "--image", "--num_images")
    settings = " ".join(word for word in words if word.startswith("--") and not word.startswith(hidden))
    drawn = []
    try:
        folder.mkdir(exist_ok=True)
        for number, file in enumerate(files):
            kept = Drawn(f"{int(1000 * now)}-{number}.png", prompt, settings, now)
            with Image.open(file) as image:
                image.save(folder / kept.file)
            drawn.append(kept)
        with (folder / HISTORY).open("a", encoding="utf-8") as history:
            history.writelines(json.dumps(asdict(each)) + "\n" for each in drawn)
    except OSError as error:
        raise DataError(f"{folder}: {error.strerror}") from error
    return drawn
