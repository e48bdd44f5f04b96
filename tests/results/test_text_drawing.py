import numpy as np
from PIL import Image, ImageDraw, ImageFont

from finetune.results import text_drawing
from finetune.results.text_drawing import fitting, width_of, write


def drawn(text: str) -> np.ndarray:
    picture = Image.new("L", (300, 40), 255)
    write(ImageDraw.Draw(picture), (4, 4), text, 16, "black")
    return np.asarray(picture)


def boxes(count: int) -> np.ndarray:
    picture = Image.new("L", (300, 40), 255)
    text = "\uffff" * count
    ImageDraw.Draw(picture).text((4, 20), text, fill="black", font=ImageFont.load_default(size=16), anchor="ls")
    return np.asarray(picture)


def test_no_script_is_drawn_as_boxes() -> None:
    for text in ("àü", "бабочка"[:2], "蝴蝶", "🦋🦋"):
        assert not np.array_equal(drawn(text), boxes(2))
        assert drawn(text).min() < 128  # and it is there


def test_what_no_font_has_is_escaped(monkeypatch) -> None:
    text_drawing._font_for.cache_clear()
    monkeypatch.setattr(text_drawing, "_SYSTEM_FONTS", ())
    text_drawing._fonts.cache_clear()
    assert np.array_equal(drawn("a蝴b"), drawn(r"a\u8774b"))
    text_drawing._font_for.cache_clear()
    text_drawing._fonts.cache_clear()


def test_control_characters_and_line_breaks_are_harmless() -> None:
    assert np.array_equal(drawn("a\n b\x07"), drawn(r"a b\x07"))


def test_text_is_cut_where_it_is_too_wide() -> None:
    assert fitting("a short one", 16, 300) == "a short one"
    cut = fitting("a long one " * 20, 16, 300)
    assert cut.endswith("…")
    assert 280 < width_of(cut, 16) <= 300
