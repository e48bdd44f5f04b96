"""Captions of visits, compared with what sd-scripts would do with the same random numbers."""

import re
from collections import Counter
from itertools import product

import pytest
import torch

from finetune import seeding
from finetune.data.caption_augmentation import CaptionAugmentation, RunProgress, expanded
from finetune.data.captions import first_caption

CAPTIONS = [
    "1girl, solo, red hair, smile, outdoors",
    "1girl ,solo,  red hair,, smile",
    "sks dog ||| sitting, grass, sky ||| masterpiece, best quality",
    "sks dog, brown ||| sitting;;;on grass, sky",
    "a {red|blue|green} ball, {big|small}, {{braces}}, round",
    "a {red|blue ball, unfinished",
    "one",
    "",
    "{a|b|c}",
    "tag1;;;tag2, tag3;;;tag4, tag5",
    "⦅odd⦆ {x|y}, {{z}}",
]


def sd_scripts(caption: str, key: int, augmentation: CaptionAugmentation) -> str:
    """Its `process_caption`, in our own words, with its random numbers replaced by those of the key."""
    if augmentation.prefix:
        caption = augmentation.prefix + " " + caption
    if augmentation.suffix:
        caption = caption + " " + augmentation.suffix
    if augmentation.wildcards:
        opening, closing = "⦅", "⦆"
        while opening in caption or closing in caption:
            opening, closing = opening + "⦅", closing + "⦆"
        caption = caption.replace("{{", opening).replace("}}", closing)
        number = 0

        def choose(match: re.Match[str]) -> str:
            nonlocal number
            parts = match.group(1).split("|")
            number += 1
            return parts[int(seeding.integers(torch.tensor([key]), f"wildcard {number - 1}", len(parts)))]

        caption = re.sub(r"\{([^}]+)\}", choose, caption)
        caption = caption.replace(opening, "{").replace(closing, "}")
    if augmentation.shuffle or augmentation.tag_dropout > 0:
        separator, fixed, behind = augmentation.separator, list[str](), list[str]()
        if augmentation.keep_tokens_separator and augmentation.keep_tokens_separator in caption:
            front, flexible = caption.split(augmentation.keep_tokens_separator, 1)
            if augmentation.keep_tokens_separator in flexible:
                flexible, back = flexible.split(augmentation.keep_tokens_separator, 1)
                behind = [tag.strip() for tag in back.split(separator) if tag.strip()]
            fixed = [tag.strip() for tag in front.split(separator) if tag.strip()]
            moved = [tag.strip() for tag in flexible.split(separator) if tag.strip()]
        else:
            tags = [tag.strip() for tag in caption.strip().split(separator)]
            moved = tags[:]
            if augmentation.keep_tokens:
                fixed, moved = moved[: augmentation.keep_tokens], tags[augmentation.keep_tokens :]
        if augmentation.shuffle:
            order = torch.randperm(len(moved), generator=seeding.generator(key, "caption order"))
            moved = [moved[place] for place in order]
        if augmentation.tag_dropout > 0:
            draws = torch.rand(len(moved), generator=seeding.generator(key, "tag dropout"))
            moved = [tag for tag, draw in zip(moved, draws, strict=True) if draw >= augmentation.tag_dropout]
        caption = ", ".join(fixed + moved + behind)
    if augmentation.secondary_separator:
        caption = caption.replace(augmentation.secondary_separator, augmentation.separator)
    return caption


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("tag_dropout", [0.0, 0.4])
@pytest.mark.parametrize("wildcards", [False, True])
def test_every_form_is_that_of_sd_scripts(shuffle: bool, tag_dropout: float, wildcards: bool) -> None:
    forms = product((None, 1, 2), ("", "|||"), ("", ";;;"), (",", "."), ("", "best quality"), ("", "4k"))
    for keep, keeping, secondary, separator, prefix, suffix in forms:
        augmentation = CaptionAugmentation(
            shuffle=shuffle, tag_dropout=tag_dropout, wildcards=wildcards, keep_tokens=keep, separator=separator,
            keep_tokens_separator=keeping, secondary_separator=secondary, prefix=prefix, suffix=suffix,
        )  # fmt: skip
        for key, caption in enumerate(CAPTIONS):
            assert augmentation.caption([caption], key) == sd_scripts(caption, key, augmentation)
        if not augmentation.varies:
            assert [augmentation.plain(caption) for caption in CAPTIONS] == [
                sd_scripts(caption, 0, augmentation) for caption in CAPTIONS
            ]


def test_the_trigger_stays_in_front_and_is_never_left_out() -> None:
    augmentation = CaptionAugmentation(shuffle=True, tag_dropout=0.9, trigger="sks", keep_tokens=1)
    seen = {augmentation.caption(["sks dog, brown, tall"], key) for key in range(50)}
    assert all(caption.startswith("sks dog") for caption in seen)
    assert {"sks dog", "sks dog, brown", "sks dog, tall"} <= seen


def test_tags_are_dropped_as_often_as_asked_and_wildcards_drawn_evenly() -> None:
    tags = CaptionAugmentation(tag_dropout=0.25)
    left = sum(
        len(tags.caption(["a, b, c, d"], key).split(", ")) for key in range(500) if tags.caption(["a, b, c, d"], key)
    )
    assert left / 2000 == pytest.approx(0.75, abs=0.03)
    counts = Counter(expanded("{a|b|c}", key) for key in range(600))
    assert set(counts) == {"a", "b", "c"}
    assert min(counts.values()) > 150
    pairs = {expanded("{a|b} {a|b}", key) for key in range(50)}
    assert pairs == {"a a", "a b", "b a", "b b"}  # each is drawn by itself


def test_a_caption_is_a_function_of_the_key() -> None:
    augmentation = CaptionAugmentation(shuffle=True, tag_dropout=0.3, wildcards=True, dropout=0.1)
    texts = ["{a|b}, c, d, e", "f, g, h"]
    once, again = ([augmentation.caption(texts, key) for key in range(40)] for _ in range(2))
    assert once == again
    assert len(set(once)) > 20
    assert "" in once


def test_lines_of_a_text() -> None:
    text = "\nfirst line\n second\n"
    assert first_caption([("txt", text)]).text == "first line second"
    assert first_caption([("txt", text)], lines="first") == ("first line", "txt", ())
    assert first_caption([("txt", text)], lines="chosen") == ("first line", "txt", ("second",))


def test_tags_are_left_out_all_together_or_the_later_the_more_often() -> None:
    """The modes of OneTrainer; the first tag is kept."""
    tags = "kept, a, b, c, d"
    whole = CaptionAugmentation(tag_dropout=0.4, tag_dropout_mode="all", keep_tokens=1)
    forms = Counter(whole.caption([tags], key) for key in range(2000))
    assert forms.keys() == {tags, "kept"}
    assert forms["kept"] / 2000 == pytest.approx(0.4, abs=0.04)
    rising = CaptionAugmentation(tag_dropout=0.8, tag_dropout_mode="rising", keep_tokens=1, shuffle=True)
    seen = Counter(tag for key in range(2000) for tag in rising.caption([tags], key).split(", "))
    for place, tag in enumerate("abcd", start=1):
        assert 1 - seen[tag] / 2000 == pytest.approx(0.8 * place / 4, abs=0.04)
    assert seen["kept"] == 2000


def test_the_number_of_tags_rises_to_all_of_them_as_in_sd_scripts() -> None:
    warming = CaptionAugmentation(warmup_steps=10, warmup_min=2, keep_tokens=1)
    tags = "kept, a, b, c, d, e, f"
    counts = [len(warming.caption([tags], 0, RunProgress(step, 0)).split(", ")) - 1 for step in range(12)]
    assert counts == [2, 2, 2, 3, 3, 4, 4, 4, 5, 5, 6, 6]  # floor(step (6 - 2) / 10) + 2
    assert warming.caption([tags], 0, RunProgress(0, 0)) == "kept, a, b"
    assert warming.caption([tags], 0) == tags  # validation has them all
    assert warming.varies


def test_every_nth_epoch_is_without_captions() -> None:
    every = CaptionAugmentation(dropout_every_n_epochs=3)
    said = [every.caption(["a dog"], 0, RunProgress(0, epoch)) for epoch in range(7)]
    assert said == ["a dog", "a dog", "", "a dog", "a dog", "", "a dog"]
    assert every.caption(["a dog"], 0) == "a dog"
    assert not every.varies
