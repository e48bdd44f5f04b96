"""A Hugging Face hub on loopback: as much of its API as creating, committing to and downloading a model takes, and
downloading or streaming a dataset.
"""

import base64
import hashlib
import json
import os
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self

TOKEN = "hf_theTokenOfTheTests"
OWNER = "someone"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Repository:
    """What a client has pushed, or what it may download."""

    private: bool = False
    files: dict[str, bytes] = field(default_factory=dict)


class Hub(ThreadingHTTPServer):
    """Serves `repositories` (by "owner/name") at `url` while the `with` block lasts; only TOKEN may write."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.repositories: dict[str, Repository] = {}
        self.downloads: list[str] = []
        """Paths of the files that were sent, in any order."""
        self.breaks_off = False
        """Close each connection without an answer."""

    def __enter__(self) -> Self:
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()


def hub_environment(url: str, home: Path) -> dict[str, str]:
    """The environment of a process that is logged in to the hub at `url` and keeps its cache in `home`."""
    quiet = {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "NO_PROXY": "127.0.0.1"}
    return os.environ | quiet | {"HF_ENDPOINT": url, "HF_TOKEN": TOKEN, "HF_HOME": str(home)}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    @property
    def hub(self) -> Hub:
        assert isinstance(self.server, Hub)
        return self.server

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        authorization = self.headers.get("Authorization", "")
        if self.path == "/api/validate-yaml":
            self._send({})
        elif authorization != f"Bearer {TOKEN}":
            self._send({"error": f"Invalid username or password.\nYou sent {authorization}."}, 401)
        elif self.path == "/api/repos/create":
            self._create(json.loads(body))
        elif match := re.fullmatch(r"/api/models/(\w+/[\w.-]+)/preupload/main", self.path):
            paths = [file["path"] for file in json.loads(body)["files"]]
            self._send({"files": [{"path": path, "uploadMode": "regular", "shouldIgnore": False} for path in paths]})
        elif match := re.fullmatch(r"/api/models/(\w+/[\w.-]+)/commit/main", self.path):
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    content = base64.b64decode(line["value"]["content"])
                    self.hub.repositories[match[1]].files[line["value"]["path"]] = content
            self._send({"commitUrl": f"{self.hub.url}/{match[1]}/commit/{COMMIT}", "commitOid": COMMIT})
        else:
            self._send({"error": f"no such endpoint: POST {self.path}"}, 404)

    def _create(self, wanted: dict[str, Any]) -> None:
        name = f"{wanted['organization'] or OWNER}/{wanted['name']}"
        exists = name in self.hub.repositories
        if not exists:
            asked = wanted.get("visibility") == "private" or wanted.get("private") is True  # as newer and older say it
            self.hub.repositories[name] = Repository(asked)
        self._send({"url": f"{self.hub.url}/{name}"}, 409 if exists else 200)

    def do_GET(self) -> None:
        if self.hub.breaks_off:
            self.close_connection = True
            return
        match = re.match(r"/(?:api/models/|api/datasets/|datasets/)?(\w+/[\w.-]+)", self.path)
        repository = self.hub.repositories.get(match[1]) if match else None
        if match is None or repository is None:
            self._send({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})
            return
        rest = self.path[match.end() :].partition("?")[0]
        if found := re.fullmatch(r"/resolve/\w+/(.+)", rest):
            self._send_file(repository, found[1])
        elif found := re.fullmatch(r"/tree/\w+/?(.*)", rest):
            self._send_tree(repository, f"{found[1]}/".lstrip("/"))
        else:
            siblings = [{"rfilename": path} for path in repository.files]
            tags = re.findall(r"^- (.+)$", repository.files.get("README.md", b"").decode(), re.MULTILINE)
            self._send(
                {"id": match[1], "sha": COMMIT, "private": repository.private, "siblings": siblings, "tags": tags}
            )

    do_HEAD = do_GET

    def _send_tree(self, repository: Repository, folder: str) -> None:
        """All that lies below; repositories have no folders in folders here."""
        inside = {path: content for path, content in repository.files.items() if path.startswith(folder)}
        if folder and not inside:
            self._send({"error": "Entry not found"}, 404, {"X-Error-Code": "EntryNotFound"})
        else:
            self._send([_entry(path, content) for path, content in inside.items()])

    def _send_file(self, repository: Repository, path: str) -> None:
        content = repository.files.get(path)
        if content is None:
            self._send({"error": "Entry not found"}, 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
            return
        if self.command == "GET":
            self.hub.downloads.append(path)
        option_info = {"ETag": f'"{_oid(content)}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        if part := re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", "")):
            first, last = int(part[1]), min(int(part[2]), len(content) - 1)
            option_info["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
            self._send(content[first : last + 1], 206, option_info)
        else:
            self._send(content, 200, option_info)

    def _send(self, answer: object, status: int = 200, headers: dict[str, str] | None = None) -> None:
        content = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        self.send_response(status)
        kind = {} if isinstance(answer, bytes) else {"Content-Type": "application/json"}
        for name, value in (kind | {"Content-Length": str(len(content))} | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


def _entry(path: str, content: bytes) -> dict[str, Any]:
    return {"type": "file", "path": path, "size": len(content), "oid": _oid(content)}


def _oid(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()
