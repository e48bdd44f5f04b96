"""What the page answers to whom, by requests as browsers and others send them."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from finetune.page.allowed_paths import AllowedPaths
from finetune.page.app import Page, build
from finetune.page.guard import Guard

HOST = "localhost:7860"


@pytest.fixture(scope="module")
def visitor(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    folder = tmp_path_factory.mktemp("page")
    page = Guard(build(Page(AllowedPaths([folder], folder))), token="secret", host="127.0.0.1")
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
