"""The page as the command serves it, under clients that are slow or many."""

import resource
import signal
import socket
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

import pytest

from tests.page.served import served


@pytest.fixture
def address(tmp_path: Path) -> Iterator[str]:
    with served(tmp_path) as (address, _):
        yield address


def test_slow_clients_and_a_thousand_connections_leave_room_for_others(address: str) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < 2048:
        pytest.skip("this machine allows too few open files")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 2048), hard))
    place = urlsplit(address)
    with ExitStack() as stack:
        for _ in range(1000):
            client = stack.enter_context(socket.create_connection((place.hostname or "", place.port or 0)))
            client.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\nX-Slow: ")
        token = place.query.removeprefix("token=")
        cookie = {"cookie": f"finetune_token_{place.port}={token}"}
        with urlopen(Request(address.split("?")[0], headers=cookie), timeout=20) as answer:
            assert "There are no runs yet" in answer.read().decode()


def test_a_body_that_never_ends_is_refused(address: str) -> None:
    place = urlsplit(address)
    token = place.query.removeprefix("token=")
    with socket.create_connection((place.hostname or "", place.port or 0)) as client:
        client.settimeout(20)
        head = f"POST /new/plan HTTP/1.1\r\nHost: localhost:{place.port}\r\n"
        head += f"Cookie: finetune_token_{place.port}={token}\r\n"
        client.sendall(head.encode() + b"Transfer-Encoding: chunked\r\n\r\n")
        for _ in range(20):
            client.sendall(b"2000\r\n" + b"x" * 0x2000 + b"\r\n")
        assert b" 413 " in client.recv(4096).splitlines()[0]


def test_ctrl_c_ends_it_while_a_browser_watches(tmp_path: Path) -> None:
    with served(tmp_path) as (address, server):
        place = urlsplit(address)
        cookie = {"cookie": f"finetune_token_{place.port}={place.query.removeprefix('token=')}"}
        with urlopen(Request(f"http://{place.netloc}/events", headers=cookie), timeout=20) as events:
            assert events.readline() == b"event: live\n"
            server.send_signal(signal.SIGINT)
            assert server.wait(20) is not None
