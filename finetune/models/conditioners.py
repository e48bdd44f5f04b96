"""Conditioners: prompts -> UNet keyword arguments. Encoding is costly and done once per distinct caption."""

# diffusers annotates its own methods narrower than what they take and give.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportReturnType=false

import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any, Protocol, Self

import torch
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from finetune.models.environment import numeric_environment
from finetune.models.fixed_batch import FixedBatches, caption_batch_size
from finetune.models.prompt_weights import times_weights, weighted_words
from finetune.models.weights import fingerprint


class Conditioner(Protocol):
    """What the UNet is told beside x_t and t."""

    tokenizer: CLIPTokenizer | None
    """What cuts prompts into tokens; None where there are no prompts."""
    fixed_batches: FixedBatches
    """Computes prompts in parts of one size."""

    @property
    def fingerprint(self) -> str:
        """A digest of the weights and settings that decide what `encode` answers."""
        ...

    @property
    def environment(self) -> str:
        """What decides the bits of `encode` besides (see `numeric_environment`); "" where it is exact everywhere."""
        ...

    def encode(self, prompts: Sequence[str]) -> Mapping[str, Any]:
        """Prompts -> tensors of first size B, stored per distinct caption."""
        ...

    @property
    def batch_size(self) -> int:
        """How many prompts `encode` computes together: give it as many, where there are."""
        ...

    def kwargs(self, stored: Mapping[str, Any], time_ids: Tensor) -> Mapping[str, Any]:
        """Stored tensors and time ids (B, 6) -> the UNet's keyword arguments at this visit."""
        ...

    def pipeline_arguments(self, prompt: str, negative_prompt: str) -> Mapping[str, Any]:
        """A prompt, and what guidance leads away from, as its pipeline takes them when they are encoded already."""
        ...

    def token_counts(self, prompts: Sequence[str]) -> list[int]:
        """Tokens of each prompt, start and end marks not counted; zeros where there is no tokenizer."""
        ...

    @property
    def token_limit(self) -> int:
        """Tokens a prompt may have; what is beyond is cut off."""
        ...

    def to(self, device: torch.device | str) -> Self: ...


class NoCondition:
    """Pixel-space DDPM: the UNet sees x_t and t alone."""

    tokenizer = None
    token_limit = 0
    batch_size = 1
    fingerprint = "none"
    environment = ""
    fixed_batches = FixedBatches()

    def to(self, device: torch.device | str) -> Self:
        return self

    def encode(self, prompts: Sequence[str]) -> Mapping[str, Any]:
        return {}

    def kwargs(self, stored: Mapping[str, Any], time_ids: Tensor) -> Mapping[str, Any]:
        return {}

    def pipeline_arguments(self, prompt: str, negative_prompt: str) -> Mapping[str, Any]:
        return {}

    def token_counts(self, prompts: Sequence[str]) -> list[int]:
        return [0] * len(prompts)


def _settings(tokenizer: CLIPTokenizer, text_encoder: CLIPTextModel | CLIPTextModelWithProjection) -> list[Any]:
    """What decides about hidden states beside the weights: words and marks, and how the layers compute."""
    marks = [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.model_max_length]
    config = text_encoder.config
    how = [config.hidden_act, config.num_attention_heads, config.layer_norm_eps, config.eos_token_id]
    return [sorted(tokenizer.get_vocab().items()), marks, how]


def count_tokens(tokenizer: CLIPTokenizer, prompts: Sequence[str], *, weighted: bool = False) -> list[int]:
    """Tokens of each prompt without start and end marks, before any cutting; see `token_ids`."""
    return [len(ids) for ids in token_ids(tokenizer, prompts, weighted=weighted)[0]]


def token_ids(tokenizer: CLIPTokenizer, prompts: Sequence[str], *, weighted: bool) -> tuple[list[list[int]], list[Any]]:
    """Token ids of each prompt without start and end marks, before any cutting, and the weight of each.

    `weighted`: parentheses are weights, as `weighted_words` reads them; else there are no weights: [].
    """
    if weighted:
        ids, weights = zip(*(weighted_words(tokenizer, prompt) for prompt in prompts), strict=True)
        return list(ids), list(weights)
    return [ids[1:-1] for ids in tokenizer(list(prompts), verbose=False)["input_ids"]], []


def in_chunks(tokenizer: CLIPTokenizer, rows: Sequence[Sequence[int]], chunks: int) -> Tensor:
    """Token ids of the words of each prompt -> (B, chunks, 77) int64, each chunk with start, end and padding."""
    body = tokenizer.model_max_length - 2
    start, end, pad = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
    result = []
    for words in rows:
        pieces = [words[i * body : (i + 1) * body] for i in range(chunks)]
        result.append([[start, *piece, end, *[pad] * (body - len(piece))] for piece in pieces])
    return torch.tensor(result)


def join_chunks(states: Sequence[Tensor]) -> Tensor:
    """Hidden states of the chunks, (B, 77, D) each -> (B, L, D): one pair of marks around the words of all."""
    if len(states) == 1:
        return states[0]
    return torch.cat([states[0][:, :1], *[state[:, 1:-1] for state in states], states[-1][:, -1:]], dim=1)


def spelt_words(tokenizer: CLIPTokenizer, prompts: Iterable[str]) -> list[str]:
    """Words that have no token of their own and are spelt with several; sorted, each once."""
    words = {word for prompt in prompts for word in re.findall(r"[^\W\d_]+", prompt.lower())}
    return sorted(word for word in words if len(tokenizer.tokenize(word)) > 1)


def chunks_of(max_token_length: int) -> int:
    """How many chunks of 75 tokens: 77 -> 1, 150 -> 2, 225 -> 3."""
    return max(1, max_token_length // 75)


class ClipConditioner:
    """A frozen CLIP text encoder, as Stable Diffusion 1 and 2 use it.

    Args:
        tokenizer: CLIP's tokenizer; pads as its config says.
        text_encoder: CLIP's text model.
        max_token_length: 77, or 150 / 225 to encode long captions in chunks of 75, each between its own start and
            end marks, and join them with one pair of marks around all (as sd-scripts does).
        clip_skip: hidden state to take, counted from the end (1 = the last), followed by the final layer norm.
        weighted: hidden states are multiplied by the weights in prompts, see `parse_weights`.
    """

    def __init__(
        self,
        tokenizer: CLIPTokenizer,
        text_encoder: CLIPTextModel,
        max_token_length: int = 77,
        clip_skip: int | None = None,
        weighted: bool = False,
    ):
        self.tokenizer = tokenizer
        self.weighted = weighted
        self.text_encoder = text_encoder.requires_grad_(False).eval()
        self.chunks = chunks_of(max_token_length)
        self.fixed_batches = FixedBatches()
        self.clip_skip = clip_skip

    @cached_property
    def fingerprint(self) -> str:
        how = _settings(self.tokenizer, self.text_encoder)
        return fingerprint(self.text_encoder, how, self.chunks, self.clip_skip or 1, *["weighted"] * self.weighted)

    @property
    def environment(self) -> str:
        return numeric_environment(self.text_encoder.device)

    @property
    def token_limit(self) -> int:
        return self.chunks * (self.tokenizer.model_max_length - 2)

    def to(self, device: torch.device | str) -> Self:
        self.text_encoder.to(device)
        return self

    def token_counts(self, prompts: Sequence[str]) -> list[int]:
        return count_tokens(self.tokenizer, prompts, weighted=self.weighted)

    def tokenize(self, prompts: Sequence[str]) -> Tensor:
        """Prompts -> token ids (B, chunks, 77) int64."""
        ids, _ = token_ids(self.tokenizer, prompts, weighted=self.weighted)
        return in_chunks(self.tokenizer, ids, self.chunks)

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Prompts -> {"encoder_hidden_states": (B, L, D)} with L = 77, or 75 x chunks + 2."""
        ids, weights = token_ids(self.tokenizer, prompts, weighted=self.weighted)
        tokens = in_chunks(self.tokenizer, ids, self.chunks)
        (states,) = self.fixed_batches(self._states, tokens, self.batch_size)
        return {"encoder_hidden_states": times_weights(states, weights)}

    @property
    def batch_size(self) -> int:
        return self.fixed_batches.size(caption_batch_size(self.text_encoder.device))

    def _states(self, tokens: Tensor) -> tuple[Tensor]:
        tokens = tokens.to(self.text_encoder.device)
        return (join_chunks([self._hidden(tokens[:, i]) for i in range(self.chunks)]),)

    def _hidden(self, tokens: Tensor) -> Tensor:
        if self.clip_skip is None or self.clip_skip == 1:
            return self.text_encoder(tokens).last_hidden_state
        layers = self.text_encoder(tokens, output_hidden_states=True).hidden_states
        inner = getattr(self.text_encoder, "text_model", self.text_encoder)  # transformers 5 has no inner module
        return inner.final_layer_norm(layers[-self.clip_skip])

    def kwargs(self, stored: Mapping[str, Any], time_ids: Tensor) -> Mapping[str, Any]:
        return stored

    def pipeline_arguments(self, prompt: str, negative_prompt: str) -> Mapping[str, Any]:
        prompts = {"prompt_embeds": prompt, "negative_prompt_embeds": negative_prompt}
        return {name: self.encode([text])["encoder_hidden_states"] for name, text in prompts.items()}


class SdxlConditioner:
    """The two frozen CLIP text encoders of Stable Diffusion XL (Podell et al. 2023, section 2).

    Their hidden states lie side by side in the channels; the second one's pooled embedding, and size and crop of the
    picture, are told beside them.

    Args:
        tokenizers, text_encoders: of both, the second encoder with its projection.
        max_token_length: as for `ClipConditioner`; the pooled embedding is that of the first chunk.
        clip_skip: hidden state to take, counted from the end, 1 = the last; default: 2. No norm follows it.
        zeros_for_empty: an empty negative prompt stands for zeros in pictures, as the model's pipeline has it.
        weighted: as for `ClipConditioner`; the pooled embedding has no weights.
    """

    def __init__(
        self,
        tokenizers: tuple[CLIPTokenizer, CLIPTokenizer],
        text_encoders: tuple[CLIPTextModel, CLIPTextModelWithProjection],
        max_token_length: int = 77,
        clip_skip: int | None = None,
        zeros_for_empty: bool = True,
        weighted: bool = False,
    ):
        self.weighted = weighted
        self.tokenizer: CLIPTokenizer | None = tokenizers[0]
        self.tokenizers = tokenizers
        self.text_encoders = text_encoders
        for encoder in text_encoders:
            encoder.requires_grad_(False).eval()
        self.chunks = chunks_of(max_token_length)
        self.fixed_batches = FixedBatches()
        self.clip_skip = clip_skip or 2
        self.zeros_for_empty = zeros_for_empty

    @cached_property
    def fingerprint(self) -> str:
        how = [_settings(*pair) for pair in zip(self.tokenizers, self.text_encoders, strict=True)]
        more = ["weighted"] * self.weighted
        return fingerprint(nn.ModuleList(self.text_encoders), how, self.chunks, self.clip_skip, *more)

    @property
    def environment(self) -> str:
        return numeric_environment(self.text_encoders[0].device)

    @property
    def token_limit(self) -> int:
        return self.chunks * (self.tokenizers[0].model_max_length - 2)

    def to(self, device: torch.device | str) -> Self:
        for encoder in self.text_encoders:
            encoder.to(device)
        return self

    def token_counts(self, prompts: Sequence[str]) -> list[int]:
        return count_tokens(self.tokenizers[0], prompts, weighted=self.weighted)

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Prompts -> {"encoder_hidden_states": (B, L, D1 + D2), "text_embeds": (B, P)}."""
        # Both tokenizers cut words alike, and differ in padding alone.
        ids, weights = token_ids(self.tokenizers[0], prompts, weighted=self.weighted)
        tokens = torch.stack([in_chunks(tokenizer, ids, self.chunks) for tokenizer in self.tokenizers], dim=1)
        states, pooled = self.fixed_batches(self._states, tokens, self.batch_size)
        return {"encoder_hidden_states": times_weights(states, weights), "text_embeds": pooled}

    @property
    def batch_size(self) -> int:
        return self.fixed_batches.size(caption_batch_size(self.text_encoders[0].device))

    def _states(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Token ids (B, encoders, chunks, 77) -> hidden states of both side by side, and the pooled embedding."""
        sides, pooled = [], []
        for encoder, ids in zip(self.text_encoders, tokens.to(self.text_encoders[0].device).unbind(1), strict=True):
            answers = [encoder(ids[:, i], output_hidden_states=True) for i in range(self.chunks)]
            sides.append(join_chunks([answer.hidden_states[-self.clip_skip] for answer in answers]))
            pooled.append(answers[0][0])  # the projection, of the encoder that has one
        return torch.cat(sides, dim=-1), pooled[-1]

    def kwargs(self, stored: Mapping[str, Any], time_ids: Tensor) -> Mapping[str, Any]:
        """The time ids are original height and width, crop top and left, target height and width."""
        text_embeds = stored["text_embeds"]
        return {
            "encoder_hidden_states": stored["encoder_hidden_states"],
            "added_cond_kwargs": {"text_embeds": text_embeds, "time_ids": time_ids.to(text_embeds)},
        }

    def pipeline_arguments(self, prompt: str, negative_prompt: str) -> Mapping[str, Any]:
        positive, unwanted = self.encode([prompt]), self.encode([negative_prompt])
        if self.zeros_for_empty and not negative_prompt:
            unwanted = {name: torch.zeros_like(tensor) for name, tensor in unwanted.items()}
        return {
            "prompt_embeds": positive["encoder_hidden_states"],
            "pooled_prompt_embeds": positive["text_embeds"],
            "negative_prompt_embeds": unwanted["encoder_hidden_states"],
            "negative_pooled_prompt_embeds": unwanted["text_embeds"],
        }
