"""The page in a browser: the whole way of a new user, the keyboard, every width, and accessibility."""

from pathlib import Path

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Page, expect

pytestmark = pytest.mark.xdist_group("browser")  # one server and one browser

SECOND = 1000


@pytest.fixture(scope="session")
def trained(work: Path, address: str) -> Path:
    """The folder of a run that a test may need; made by whichever comes first."""
    from finetune.cli import main

    run = work / "runs/ready"
    options = ["--train_batch_size", "1", "--rank", "2", "--num_inference_steps", "1", "--forgetting_prompts", "0"]
    words = ["--model", "tiny", "--data", str(work / "dog"), "--max_train_steps", "3", *options]
    assert main([*words, "--output_dir", str(run)]) == 0
    return run


def test_from_a_folder_to_a_lora_in_under_12_clicks(page: Page, work: Path, tmp_path: Path) -> None:
    clicks = 0

    def click(name: str, role: str = "link") -> None:
        nonlocal clicks
        page.get_by_role(role, name=name).first.click()
        clicks += 1

    click("New run")
    page.locator("[name=data]").fill(str(work / "dog"))
    page.locator("[name=prompt]").fill("a photo of a dog")
    page.locator("input[value=tiny]").check()
    page.locator("[name=steps]").fill("3")
    clicks += 4
    page.locator(".options > summary").click()
    page.locator("[name=more]").fill("--train_batch_size 1 --rank 2 --num_inference_steps 1")
    expect(page.locator("#plan")).to_contain_text("3 of batch size 1", timeout=90 * SECOND)
    click("Start", "button")
    click("dog-tiny")
    expect(page.get_by_role("link", name="Report")).to_be_visible(timeout=120 * SECOND)
    with page.expect_download() as download:
        click("dog-tiny.safetensors")
    download.value.save_as(tmp_path / "lora.safetensors")
    assert (tmp_path / "lora.safetensors").read_bytes() == (work / "runs/dog-tiny/dog-tiny.safetensors").read_bytes()
    assert clicks < 12


def test_captions_are_edited_by_keyboard(page: Page, address: str, work: Path) -> None:
    page.goto(f"{address.split('/?')[0]}/images/wall?folder={work / 'dog'}")
    tile = page.locator(".tile").first
    expect(tile).to_contain_text("a red disc")
    tile.focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")
    expect(page.get_by_role("dialog")).to_contain_text("01.png (2 of 6)")
    page.get_by_label("Caption", exact=True).fill("a blue disc, mended")
    page.keyboard.press("Control+Enter")
    expect(page.get_by_role("dialog")).to_contain_text("02.png (3 of 6)")
    assert (work / "dog/01.txt").read_text() == "a blue disc, mended"
    page.keyboard.press("Alt+ArrowLeft")
    expect(page.get_by_role("dialog")).to_contain_text("01.png (2 of 6)")
    (work / "dog/01.txt").write_text("of another program")
    page.get_by_label("Caption", exact=True).fill("mine")
    page.keyboard.press("Escape")
    expect(page.get_by_role("alert")).to_contain_text("The file says: of another program")
    page.get_by_role("button", name="Keep my text").click()
    page.keyboard.press("Escape")
    expect(page.get_by_role("dialog")).to_be_hidden()
    assert (work / "dog/01.txt").read_text() == "mine"
    page.get_by_role("searchbox").fill("mine")
    expect(page.get_by_role("status").first).to_have_text("1 image")


def test_a_mask_is_painted(page: Page, address: str, work: Path) -> None:
    page.goto(f"{address.split('/?')[0]}/images/wall?folder={work / 'dog'}")
    page.locator(".tile").first.click()
    page.get_by_role("button", name="Paint a mask").click()
    box = page.locator("#mask").bounding_box()
    assert box is not None
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    page.mouse.down()
    page.mouse.up()
    page.get_by_role("button", name="Save the mask").click()
    expect(page.locator("#said")).to_have_text("00.mask.png is saved")
    from finetune.data.images import open_mask

    mask = open_mask(work / "dog/00.mask.png")
    assert (mask.getpixel((mask.width // 2, mask.height // 2)), mask.getpixel((1, 1))) == (255, 0)


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_every_page_fits_every_width_and_axe_finds_nothing_serious(
    page: Page, address: str, work: Path, trained: Path, theme: str
) -> None:
    page.emulate_media(color_scheme="dark" if theme == "dark" else "light")
    home = address.split("/?")[0]
    paths = ["", "/images", f"/images/wall?folder={work / 'dog'}", "/new", "/runs/ready", "/draw"]
    paths.append("/compare?run=ready&run=ready")
    for path in paths:
        page.goto(f"{home}{path}")
        if "/runs/" in path:
            expect(page.locator("figure").first).to_be_visible()
        for width in (390, 768, 1280, 1920):
            page.set_viewport_size({"width": width, "height": 900})
            assert page.evaluate("document.documentElement.scrollWidth") <= width, (path, width)
        found = [each for each in Axe().run(page).response["violations"] if each["impact"] in ("serious", "critical")]
        assert [(path, each["id"], each["nodes"][0]["html"]) for each in found] == []
