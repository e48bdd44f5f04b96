import pytest
import torch

from finetune.errors import UsageError
from finetune.models.conditioners import ClipConditioner, NoCondition
from finetune.models.loading import load_model


def clip(**options: int) -> ClipConditioner:
    conditioner = load_model("tiny", **options).conditioner
    assert isinstance(conditioner, ClipConditioner)
    return conditioner


@pytest.mark.parametrize("prompt", ["a butterfly", "", "x" * 300])
def test_embeddings_equal_the_pipelines(prompt: str) -> None:
    pipeline = load_model("tiny").pipeline()
    theirs, _ = pipeline.encode_prompt(prompt, "cpu", 1, False)
    assert torch.equal(clip().encode([prompt])["encoder_hidden_states"], theirs)


def test_tokens_are_counted_without_marks_and_before_cutting() -> None:
    conditioner = clip()
    assert conditioner.token_counts(["abc", "", "x" * 300]) == [3, 0, 300]
    assert conditioner.token_limit == 75


@pytest.mark.parametrize(("length", "width", "limit"), [(77, 77, 75), (150, 152, 150), (225, 227, 225)])
def test_long_captions_are_encoded_in_chunks_between_one_pair_of_marks(length: int, width: int, limit: int) -> None:
    conditioner = clip(max_token_length=length)
    assert conditioner.token_limit == limit
    text = "qzjx" * 75  # no two of these letters make a token together
    states = conditioner.encode([text])["encoder_hidden_states"]
    assert states.shape == (1, width, 96)
    chunks = conditioner.tokenize([text])
    assert chunks.shape == (1, limit // 75, 77)
    assert (chunks[0, :, 0] == conditioner.tokenizer.bos_token_id).all()
    assert (chunks[0, :, -1] == conditioner.tokenizer.eos_token_id).all()
    plain = clip()
    for number in range(limit // 75):  # each chunk is what the encoder makes of those 75 letters alone
        alone = plain.encode([text[75 * number : 75 * (number + 1)]])["encoder_hidden_states"]
        if number < limit // 75 - 1 or length == 77:
            got = states[:, 1 + 75 * number : 1 + 75 * (number + 1)]
            # within a word CLIP writes letters without an end-of-word mark; only the last letter differs
            torch.testing.assert_close(got[:, :74], alone[:, 1:75])


def test_clip_skip_takes_an_earlier_layer_through_the_final_norm() -> None:
    conditioner = clip(clip_skip=2)
    tokens = conditioner.tokenize(["abc"])[:, 0]
    with torch.no_grad():
        layers = conditioner.text_encoder(tokens, output_hidden_states=True).hidden_states
        inner = getattr(conditioner.text_encoder, "text_model", conditioner.text_encoder)  # gone in transformers 5
        expected = inner.final_layer_norm(layers[-2])
    got = conditioner.encode(["abc"])["encoder_hidden_states"]
    assert torch.equal(got, expected)
    last = clip(clip_skip=1).encode(["abc"])["encoder_hidden_states"]
    assert torch.equal(last, clip().encode(["abc"])["encoder_hidden_states"])
    assert not torch.equal(got, last)


def test_clip_skip_beyond_the_layers_is_refused() -> None:
    with pytest.raises(UsageError, match="clip_skip = 4: expected 1 to 3"):
        clip(clip_skip=4)


def test_pixel_mode_says_nothing_to_the_unet() -> None:
    none = NoCondition()
    assert none.kwargs(none.encode(["x"]), torch.zeros(1, 6)) == {}
