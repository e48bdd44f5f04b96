"""The pages of images: folders, the wall of a folder, and its captions, edited in place."""

import base64
import binascii
import json
import tempfile
import threading
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast, get_args

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Route

from finetune.data.buckets import Buckets
from finetune.errors import UsageError
from finetune.models.families import bucket_sides
from finetune.page.allowed_paths import AllowedPaths
from finetune.page.caption_edits import ConflictError, TagAction
from finetune.page.image_set import ImageSet, Show, ShownImage, image_size
from finetune.page.mask_edits import delete_mask, write_mask
from finetune.page.processes import run_command
from finetune.page.responses import Templates, posted
from finetune.page.thumbnails import thumbnail

_THUMBNAIL = 320
"""Pixels of the longer side of an image on the wall."""
_MOST_TILES = 500
"""Images that one answer describes."""
_MOST_TAGS = 200
_OPEN_FOLDERS = 8
"""Folders whose list of images is kept in memory."""
_RESOLUTIONS = (512, 768, 1024)
_CHECK_SECONDS = 3600
_VAE_FACTOR = 8
_LARGEST_MASK = 16 * 2**20
"""Bytes of a form with a mask."""
_A_YEAR = "private, max-age=31536000, immutable"


class ImagePages:
    """The handlers, over the folders that are open to the page."""

    def __init__(self, places: AllowedPaths, templates: Templates) -> None:
        self._places, self._templates = places, templates
        self._sets: dict[str, ImageSet] = {}
        self._lock = threading.Lock()

    def routes(self) -> list[Route]:
        return [
            Route("/images", self.folders),
            Route("/images/wall", self.wall),
            Route("/images/tiles", self.tiles),
            Route("/images/tags", self.tags),
            Route("/images/file", self.file),
            Route("/images/caption", self.caption),
            Route("/images/caption", posted(self.write_caption), methods=["POST"]),
            Route("/images/tags", posted(self.edit_tags), methods=["POST"]),
            Route("/images/check", posted(self.check), methods=["POST"]),
            Route("/images/undo", posted(self.undo), methods=["POST"]),
            Route("/images/mask", posted(self.write_mask, largest=_LARGEST_MASK), methods=["POST"]),
            Route("/images/leave-out", posted(self.leave_out), methods=["POST"]),
            Route("/images/put-back", posted(self.put_back), methods=["POST"]),
        ]

    def folders(self, request: Request) -> Response:
        folders = self._places.picture_folders()
        return self._templates.answer("folders.html", folders=folders, given=request.query_params.get("folder", ""))

    def _images(self, fields: Mapping[str, str], *, again: bool = False) -> ImageSet:
        """The images of the folder that a request names, read `again` or as they were last read."""
        folder = self._places.pictures(fields.get("folder", ""))
        if not folder.is_dir():
            raise UsageError(f"{folder}: not a folder")
        with self._lock:
            images = self._sets.pop(str(folder), None)
            if images is None:
                images = ImageSet(folder)
            elif again:
                images.read()
            self._sets[str(folder)] = images  # the last one is kept the longest
            while len(self._sets) > _OPEN_FOLDERS:
                del self._sets[next(iter(self._sets))]
        return images

    def wall(self, request: Request) -> Response:
        images = self._images(request.query_params, again=True)
        total, left_out = len(images.find()), len(images.left_out())
        without = len(images.find(show="without caption"))
        return self._templates.answer(
            "wall.html",
            folder=images.folder,
            total=total,
            without=without,
            left_out=left_out,
            shows=get_args(Show),
            actions=get_args(TagAction),
            resolutions=_RESOLUTIONS,
        )

    def _found(self, images: ImageSet, fields: Mapping[str, str]) -> list[ShownImage]:
        show = fields.get("show") or "all"
        if show not in get_args(Show):
            raise UsageError(f"show {show!r}: choose one of {', '.join(get_args(Show))}")
        return images.find(fields.get("find", ""), cast(Show, show))

    def tiles(self, request: Request) -> Response:
        """Those images, of the ones that were searched for, that a part of the wall shows."""
        fields = request.query_params
        images = self._images(fields)
        found = self._found(images, fields)
        first, count = _number(fields, "first", 0), min(_number(fields, "count", _MOST_TILES), _MOST_TILES)
        tiles = [_tile(images, image) for image in found[first : first + count]]
        return JSONResponse({"total": len(found), "tiles": tiles})

    def tags(self, request: Request) -> Response:
        counts = self._images(request.query_params).tags()
        return JSONResponse({"total": len(counts), "tags": counts[:_MOST_TAGS]})

    def file(self, request: Request) -> Response:
        """An image, whole or as a thumbnail. Its address has a version, so browsers keep it."""
        fields = request.query_params
        path = self._images(fields).path(fields.get("name", ""))
        if not path.is_file():
            raise HTTPException(404, f"{path.name}: no such file")
        headers = {"cache-control": _A_YEAR}
        if "small" in fields:
            return Response(thumbnail(path, _THUMBNAIL), media_type="image/jpeg", headers=headers)
        return FileResponse(path, headers=headers)

    def caption(self, request: Request) -> Response:
        """An image with the text of its caption file, and what training sees of it."""
        fields = request.query_params
        images = self._images(fields)
        image = images.image(fields.get("name", ""))
        size = image_size(images.path(image.name))
        seen = _seen(size, _resolution(fields)) if size else None
        return JSONResponse(asdict(images.edits.read(image.name)) | {"tile": _tile(images, image), "seen": seen})

    def write_caption(self, fields: Mapping[str, str]) -> Response:
        images = self._images(fields)
        image = images.image(fields.get("name", ""))
        text, version = fields.get("text", "").replace("\r\n", "\n"), fields.get("version", "")
        try:
            written = images.edits.write(image.name, text, version=version)
        except ConflictError as error:
            return JSONResponse({"error": str(error)} | asdict(images.edits.read(image.name)), 409)
        images.refresh([image.name])
        return JSONResponse(asdict(written) | {"tile": _tile(images, images.image(image.name))})

    def edit_tags(self, fields: Mapping[str, str]) -> Response:
        """Edit a tag of all images that were searched for."""
        images = self._images(fields)
        action = fields.get("action", "")
        if action not in get_args(TagAction):
            raise UsageError(f"action {action!r}: choose one of {', '.join(get_args(TagAction))}")
        if fields.get("show") == "left out":
            raise UsageError("put the images back before their tags are edited")
        names = [image.name for image in self._found(images, fields)]
        try:
            changed = images.edits.edit_tags(
                names, cast(TagAction, action), fields.get("tag", ""), fields.get("new", "")
            )
        finally:
            images.read()
        return JSONResponse({"changed": changed, "of": len(names)})

    def check(self, fields: Mapping[str, str]) -> Response:
        """Look at every image: which are unreadable, small, blurred or shown twice."""
        images = self._images(fields)
        resolution = _resolution(fields)
        with tempfile.TemporaryDirectory() as scratch:
            output = Path(scratch) / "problems.json"
            words = [
                "check",
                "--no_follow_links",
                "--data",
                str(images.folder),
                "--resolution",
                str(resolution),
                "--output",
                str(output),
            ]
            answer = run_command(words, self._places.work, timeout=_CHECK_SECONDS)
            if not answer.ok:
                raise UsageError(answer.text)
            problems = json.loads(output.read_text(encoding="utf-8"))
        found = dict[str, list[str]]()
        for problem in problems:
            found.setdefault(problem["image"], []).append(problem["text"])
        images.problems = found
        return JSONResponse({"text": answer.text.splitlines()[-1], "images": len(found)})

    def undo(self, fields: Mapping[str, str]) -> Response:
        images = self._images(fields)
        changed = images.edits.undo()
        images.read()
        return JSONResponse({"changed": changed})

    def write_mask(self, fields: Mapping[str, str]) -> Response:
        """Write the mask of an image, a PNG in base64, or delete it where there is none."""
        images, name = self._images(fields), fields.get("name", "")
        if given := fields.get("png", ""):
            try:
                png = base64.b64decode(given, validate=True)
            except binascii.Error as error:
                raise UsageError(f"mask of {name}: not base64") from error
            write_mask(images, name, png)
        else:
            delete_mask(images, name)
        return JSONResponse({"tile": _tile(images, images.image(name))})

    def leave_out(self, fields: Mapping[str, str]) -> Response:
        self._images(fields).leave_out(fields.get("name", ""))
        return JSONResponse({})

    def put_back(self, fields: Mapping[str, str]) -> Response:
        self._images(fields).put_back(fields.get("name", ""))
        return JSONResponse({})


def _number(fields: Mapping[str, str], name: str, default: int) -> int:
    """A whole number of a query. Raises UsageError for what is none."""
    given = fields.get(name) or str(default)
    if not (given.isascii() and given.isdigit()):
        raise UsageError(f"{name} {given!r}: expected a whole number")
    return int(given)


def _resolution(fields: Mapping[str, str]) -> int:
    """The resolution that a request names. Raises UsageError for one that is not offered."""
    resolution = _number(fields, "resolution", _RESOLUTIONS[0])
    if resolution not in _RESOLUTIONS:
        raise UsageError(f"resolution {resolution}: choose one of {', '.join(map(str, _RESOLUTIONS))}")
    return resolution


def _tile(images: ImageSet, image: ShownImage) -> dict[str, Any]:
    """An image as the wall shows it; its version changes with the file."""
    try:
        version = (images.folder / image.name).stat().st_mtime_ns
    except OSError:  # deleted since the folder was read
        version = 0
    problem = "; ".join(filter(None, [image.problem, *images.problems.get(image.name, [])]))
    return asdict(image) | {"version": str(version), "problem": problem}


def _seen(size: tuple[int, int], resolution: int) -> dict[str, Any]:
    """What training with buckets sees of an image: the size that it is trained in, and the crop in shares of it."""
    width, height = size
    sides = bucket_sides(resolution, _VAE_FACTOR)
    buckets = Buckets(resolution, sides["min_bucket_reso"], sides["max_bucket_reso"], sides["bucket_reso_steps"])
    bucket = buckets.size(width, height)
    scale = max(bucket[0] / width, bucket[1] / height)
    shares = bucket[0] / (width * scale), bucket[1] / (height * scale)
    note = "smaller than the resolution" if width * height < resolution**2 else ""
    return {"size": size, "bucket": bucket, "shares": shares, "note": note}
