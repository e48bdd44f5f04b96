"""Weights in captions: how they are read, and what they do to hidden states."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from finetune.config import TrainConfig
from finetune.models.loading import load_model
from finetune.models.prompt_weights import LESS, parse_weights
from finetune.models.tiny import tiny_folder
from finetune.recipe import fine_tune
from tests.small_models import small_pipeline, write_single_file

TOKENIZER = str(tiny_folder() / "tokenizer")


@pytest.mark.parametrize(
    ("prompt", "parts"),
    [
        ("normal text", [("normal text", 1.0)]),
        ("an (important) word", [("an ", 1.0), ("important", 1.1), (" word", 1.0)]),
        ("(unbalanced", [("unbalanced", 1.1)]),
        ("closed) alone", [("closed) alone", 1.0)]),
        (r"\(literal\]", [("(literal]", 1.0)]),
        ("(unnecessary)(parens)", [("unnecessaryparens", 1.1)]),
        ("a (hill:0.5)", [("a ", 1.0), ("hill", 0.5)]),
        ("a [less] b", [("a ", 1.0), ("less", LESS), (" b", 1.0)]),
        ("((nested:1.5) here)", [("nested", pytest.approx(1.65)), (" here", 1.1)]),
        ("12:30, a:b", [("12:30, a:b", 1.0)]),
        ("(odd:1.2.3)", [("odd:1.2.3", 1.1)]),
        ("", []),
    ],
)
def test_the_weights_of_a_prompt(prompt: str, parts: list[tuple[str, float]]) -> None:
    """Those of A1111's and sd-scripts' own examples among them."""
    assert parse_weights(prompt) == parts


@given(st.text(alphabet="ab ()[]:\\.12", max_size=20))
def test_any_text_has_weights_and_loses_brackets_alone(prompt: str) -> None:
    parts = parse_weights(prompt)
    assert all(text for text, _ in parts)
    letters = [letter for text, _ in parts for letter in text if letter in "ab "]
    assert letters == [letter for letter in prompt if letter in "ab "]


@pytest.mark.parametrize("max_token_length", [77, 150])
def test_hidden_states_are_multiplied_word_by_word(max_token_length: int) -> None:
    plain = load_model("tiny", max_token_length=max_token_length).conditioner
    weighted = load_model("tiny", max_token_length=max_token_length, weighted_captions=True).conditioner
    states = plain.encode(["a red circle"])["encoder_hidden_states"]
    got = weighted.encode(["a (red:1.5) [circle]"])["encoder_hidden_states"]
    factors = torch.ones(states.shape[1])
    factors[2], factors[3] = 1.5, LESS
    assert torch.allclose(got, states * factors.view(1, -1, 1), rtol=1e-5, atol=1e-6)
    assert torch.equal(weighted.encode(["a red circle"])["encoder_hidden_states"], states)
    assert weighted.token_counts(["a (red:1.5) [circle]", ""]) == [3, 0]
    assert weighted.fingerprint != plain.fingerprint


def test_both_encoders_of_xl_are_weighted_and_the_pooled_embedding_is_not(tmp_path: Path) -> None:
    path = write_single_file(tmp_path / "xl.safetensors", "sdxl", small_pipeline("sdxl"))
    plain, weighted = (load_model(path, tokenizer=TOKENIZER, weighted_captions=on).conditioner for on in (False, True))
    before: Any = plain.encode(["a red circle"])
    after: Any = weighted.encode(["a (red:0.5) circle"])
    factors = torch.ones(77)
    factors[2] = 0.5
    assert torch.allclose(
        after["encoder_hidden_states"], before["encoder_hidden_states"] * factors.view(1, -1, 1), rtol=1e-5, atol=1e-6
    )
    assert torch.equal(after["text_embeds"], before["text_embeds"])


def test_a_run_with_weighted_captions(pictures: Path, tmp_path: Path) -> None:
    config = TrainConfig(
        data=str(pictures), output_dir=str(tmp_path / "run"), max_train_steps=1, num_inference_steps=0, rank=2,
        weighted_captions=True, caption_prefix="(painting:1.3),",
    )  # fmt: skip
    assert (fine_tune(config) / "pytorch_lora_weights.safetensors").is_file()
