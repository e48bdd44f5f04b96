from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from finetune.cache.encode import encode
from finetune.data.caption_augmentation import CaptionAugmentation
from finetune.data.image_folder import ImageFolder
from finetune.data.loader import batches
from finetune.models.loading import load_model


def test_without_settings_the_caption_is_the_first_and_only_one() -> None:
    assert CaptionAugmentation().caption(["a, b,c"], key=7) == "a, b,c"


@given(kept=st.integers(0, 6), key=st.integers(0, 2**62))
def test_shuffling_keeps_every_part_and_the_first_few_where_they_are(kept: int, key: int) -> None:
    parts = ["one", "two words", "three", "four", "five"]
    visits = CaptionAugmentation(shuffle=True, keep_tokens=kept)
    found = visits.caption([" ,".join(parts)], key).split(", ")
    assert found[:kept] == parts[:kept]
    assert sorted(found) == sorted(parts)
    assert found == visits.caption([" ,".join(parts)], key).split(", ")


def test_every_order_comes_about_equally_often() -> None:
    counts = Counter(CaptionAugmentation(shuffle=True).caption(["a, b, c"], key) for key in range(1200))
    assert len(counts) == 6
    assert min(counts.values()) > 150


def test_every_caption_is_taken_about_equally_often_and_some_visits_have_none() -> None:
    counts = Counter(CaptionAugmentation(dropout=0.25).caption(["a", "b", "c"], key) for key in range(1200))
    assert counts.keys() == {"", "a", "b", "c"}
    assert counts[""] == pytest.approx(300, abs=60)
    assert min(counts.values()) > 230


def save(folder: Path, caption: str) -> Path:
    Image.new("RGB", (64, 64), (200, 0, 0)).save(folder / "a.png")
    (folder / "a.txt").write_text(caption)
    return folder


def test_lines_of_a_caption_are_joined_or_chosen(tmp_path: Path) -> None:
    folder = save(tmp_path, "a red square\n\n  a [trigger] thing \n")
    assert ImageFolder(folder, resolution=64, trigger="sks").texts(0) == ("a red square a sks thing",)
    chosen = ImageFolder(folder, resolution=64, trigger="sks", caption_lines="chosen")
    assert chosen.texts(0) == ("sks a red square", "a sks thing")
    model = load_model("tiny")
    states = [model.conditioner.encode([text])["encoder_hidden_states"][0] for text in chosen.texts(0)]
    seen = set()
    for batch in batches(encode(chosen, model, cache_dir="none"), batch_size=1, steps=12):
        seen |= {number for number in (0, 1) if torch.equal(batch.cond["encoder_hidden_states"][0], states[number])}
    assert seen == {0, 1}


def test_a_list_in_metadata_is_several_captions(tmp_path: Path) -> None:
    save(tmp_path, "")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "text": ["one", "", "two\\nlines"]}\n')
    assert ImageFolder(tmp_path, resolution=64).texts(0) == ("one", "two lines")


def test_shuffled_captions_are_what_the_model_is_told(tmp_path: Path) -> None:
    model = load_model("tiny")
    images = ImageFolder(save(tmp_path, "a red square, white, black"), resolution=64)
    encoded = encode(images, model, captioning=CaptionAugmentation(shuffle=True, keep_tokens=1), cache_dir="none")
    assert [made.kind for made in encoded.made] == ["picture"]
    seen = set()
    for batch in batches(encoded, batch_size=1, steps=8):
        caption = encoded.captioning.caption(images.texts(0), int(batch.keys[0]))
        expected = model.conditioner.encode([caption])["encoder_hidden_states"]
        assert torch.equal(batch.cond["encoder_hidden_states"], expected)
        seen.add(caption)
    assert seen == {"a red square, white, black", "a red square, black, white"}


def test_the_trigger_stays_in_front_of_what_is_shuffled() -> None:
    visits = CaptionAugmentation(shuffle=True, trigger="sks")
    found = {visits.caption(["sks a, b, c"], key) for key in range(100)}
    assert all(caption.startswith("sks ") for caption in found)
    assert {caption.removeprefix("sks ") for caption in found} == {
        "a, b, c", "a, c, b", "b, a, c", "b, c, a", "c, a, b", "c, b, a",
    }  # fmt: skip
