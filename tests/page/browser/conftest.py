"""A browser, and the page served to it by the command."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

from tests.page.served import served

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def work(tmp_path_factory: pytest.TempPathFactory, make_pictures: Callable[..., Path]) -> Path:
    """A folder with images and no run."""
    work = tmp_path_factory.mktemp("work")
    make_pictures(work / "dog", count=6, captions=True)
    return work


@pytest.fixture(scope="session")
def address(work: Path) -> Iterator[str]:
    """Where the command serves the page, with the token."""
    with served(work) as (address, _):
        yield address


@pytest.fixture
def page(browser: Browser, address: str) -> Iterator[Page]:
    """A tab with the home page; what its console reports as an error fails the test."""
    context = browser.new_context(viewport={"width": 1280, "height": 900}, accept_downloads=True)
    page = context.new_page()
    errors: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    page.goto(address)
    yield page
    context.close()
    assert [error for error in errors if "409 (Conflict)" not in error] == []  # which is an answer like others
