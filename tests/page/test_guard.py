"""What the page answers to whom, by requests as browsers and others send them."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from finetune.errors import UsageError
from finetune.page.allowed_paths import AllowedPaths
from finetune.page.app import Page, build
from finetune.page.guard import Guard
from finetune.page.visitors import AuditLog, Visitor, read_visitors

HOST = "localhost:7860"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("page")


@pytest.fixture(scope="module")
def visitor(folder: Path) -> Iterator[TestClient]:
    visitors = {"secret": Visitor("anna"), "looking": Visitor("bob", may_change=False)}
    audit = AuditLog(folder / "audit.jsonl")
    page = Guard(build(Page(AllowedPaths([folder], folder))), visitors=visitors, hosts=["train.example"], audit=audit)
    with TestClient(page, base_url=f"http://{HOST}", follow_redirects=False) as client:
        yield client


@pytest.fixture(autouse=True)
def forgotten(visitor: TestClient) -> None:
    visitor.cookies.clear()


def enter(visitor: TestClient) -> None:
    assert visitor.get("/?token=secret").status_code == 303


def test_the_token_in_the_address_becomes_a_cookie_that_scripts_and_other_sites_do_not_get(visitor: TestClient) -> None:
    answer = visitor.get("/?token=secret")
    assert (answer.status_code, answer.headers["location"]) == (303, "/")
    assert answer.headers["set-cookie"] == "finetune_token_7860=secret; HttpOnly; SameSite=Strict; Path=/"
    shown = visitor.get("/")
    assert shown.status_code == 200
    assert "finetune-unet" in shown.text


@pytest.mark.parametrize("path", ["/", "/new", "/?token=wrong", "/?token=", "/static/style.css"])
def test_without_the_token_nothing_is_shown(visitor: TestClient, path: str) -> None:
    answer = visitor.get(path)
    assert answer.status_code == 401
    assert answer.text == "finetune-unet: open the address that finetune-unet ui has printed, with its token\n"


@pytest.mark.parametrize(
    "headers",
    [
        {"host": "evil.example"},
        {"host": "evil.example:7860"},
        {"host": ""},
        {"origin": "http://evil.example"},
        {"origin": "http://localhost:8888"},
        {"origin": "null"},
        {"sec-fetch-site": "cross-site", "sec-fetch-mode": "no-cors"},
        {"sec-fetch-site": "same-site", "sec-fetch-mode": "cors"},
    ],
)
def test_other_hosts_and_other_pages_are_refused(visitor: TestClient, headers: dict[str, str]) -> None:
    enter(visitor)
    assert visitor.get("/new", headers=headers).status_code == 403
    assert visitor.post("/new/start", data={}, headers=headers).status_code == 403


@pytest.mark.parametrize("host", [HOST, "127.0.0.1:7860", "[::1]:7860", "192.168.1.5:7860"])
def test_names_and_addresses_of_this_machine_are_allowed(visitor: TestClient, host: str) -> None:
    headers = {"host": host, "origin": f"http://{host}", "cookie": "finetune_token_7860=secret"}
    assert visitor.get("/new", headers=headers).status_code == 200


def test_the_page_cannot_be_framed(visitor: TestClient) -> None:
    enter(visitor)
    for answer in (visitor.get("/"), visitor.get("/", headers={"host": "evil.example"})):
        assert answer.headers["x-frame-options"] == "DENY"
        assert "script-src 'self'; connect-src 'self'" in answer.headers["content-security-policy"]
        assert "frame-ancestors 'none'" in answer.headers["content-security-policy"]


def test_a_websocket_needs_the_token_too(visitor: TestClient) -> None:
    from starlette.websockets import WebSocketDisconnect

    with pytest.raises(WebSocketDisconnect), visitor.websocket_connect("/events"):
        pass


def test_a_run_folder_that_leads_elsewhere_is_no_run(tmp_path: Path) -> None:
    (tmp_path / "elsewhere/samples").mkdir(parents=True)
    (tmp_path / "runs/own/samples").mkdir(parents=True)
    (tmp_path / "runs/link").symlink_to(tmp_path / "elsewhere")
    assert AllowedPaths([tmp_path], tmp_path).run_names() == ["own"]


def test_a_viewer_sees_everything_and_changes_nothing(visitor: TestClient) -> None:
    assert visitor.get("/?token=looking").status_code == 303
    assert visitor.get("/").status_code == 200
    for path in ("/new/start", "/queue/x/remove", "/runs/x/delete", "/images/caption", "/draw"):
        answer = visitor.post(path)
        assert (answer.status_code, "changes nothing" in answer.text) == (403, True)


def test_what_is_changed_is_noted_with_its_visitor(visitor: TestClient, folder: Path) -> None:
    before = noted(folder)
    visitor.get("/?token=secret")
    visitor.get("/")
    visitor.post("/queue/x/remove")
    assert noted(folder)[len(before) :] == [("anna", "/queue/x/remove")]


def noted(folder: Path) -> list[tuple[str, str]]:
    path = folder / "audit.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [(line["visitor"], line["path"]) for line in map(json.loads, lines)]


def test_the_name_of_a_proxy_is_allowed(visitor: TestClient) -> None:
    assert visitor.get("/?token=secret", headers={"host": "train.example"}).status_code == 303


def test_users_are_read_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "users.toml").write_text('[users]\nanna = "0123456789abcdef"\n[viewers]\nbob = "abcdef0123456789-_"\n')
    visitors = read_visitors(tmp_path / "users.toml")
    assert visitors == {"0123456789abcdef": Visitor("anna"), "abcdef0123456789-_": Visitor("bob", may_change=False)}


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "no user"),
        ("[users]\n", "no user"),
        ('[users]\nanna = "short"', "the token of anna: expected 16"),
        ('[users]\nanna = "0123456789abcdef?"', "the token of anna"),
        ("[users]\nanna = 5", "the token of anna"),
        ('[users]\na = "0123456789abcdef"\nb = "0123456789abcdef"', "b and a have the same token"),
        ('[admins]\na = "0123456789abcdef"', "no table admins"),
        ("[users", "--users"),
    ],
)
def test_a_file_of_users_that_is_wrong_is_refused(tmp_path: Path, text: str, why: str) -> None:
    (tmp_path / "users.toml").write_text(text)
    with pytest.raises(UsageError, match=why):
        read_visitors(tmp_path / "users.toml")
    with pytest.raises(UsageError, match="No such file"):
        read_visitors(tmp_path / "gone.toml")
