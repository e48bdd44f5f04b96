"""Conditioners: prompts -> UNet keyword arguments. Encoding is costly and done once per distinct caption."""

# diffusers annotates its own methods narrower than what they take and give.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportReturnType=false

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol, Self

import torch
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer


class Conditioner(Protocol):
    """What the UNet is told beside x_t and t."""

    def encode(self, prompts: Sequence[str]) -> Mapping[str, Any]:
        """Prompts -> tensors of first size B, stored per distinct caption."""
        ...

    def kwargs(self, stored: Mapping[str, Any], geometry: Tensor) -> Mapping[str, Any]:
        """Stored tensors and geometry (B, 6) -> the UNet's keyword arguments at this visit."""
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

    token_limit = 0

    def to(self, device: torch.device | str) -> Self:
        return self

    def encode(self, prompts: Sequence[str]) -> Mapping[str, Any]:
        return {}

    def kwargs(self, stored: Mapping[str, Any], geometry: Tensor) -> Mapping[str, Any]:
        return {}

    def token_counts(self, prompts: Sequence[str]) -> list[int]:
        return [0] * len(prompts)


def count_tokens(tokenizer: CLIPTokenizer, prompts: Sequence[str]) -> list[int]:
    """Tokens of each prompt without start and end marks, before any cutting."""
    return [len(ids) - 2 for ids in tokenizer(list(prompts), verbose=False)["input_ids"]]


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
    """

    def __init__(
        self,
        tokenizer: CLIPTokenizer,
        text_encoder: CLIPTextModel,
        max_token_length: int = 77,
        clip_skip: int | None = None,
    ):
        self.tokenizer = tokenizer
        self.text_encoder = text_encoder.requires_grad_(False).eval()
        self.chunks = chunks_of(max_token_length)
        self.clip_skip = clip_skip

    @property
    def token_limit(self) -> int:
        return self.chunks * (self.tokenizer.model_max_length - 2)

    def to(self, device: torch.device | str) -> Self:
        self.text_encoder.to(device)
        return self

    def token_counts(self, prompts: Sequence[str]) -> list[int]:
        return count_tokens(self.tokenizer, prompts)

    def tokenize(self, prompts: Sequence[str]) -> Tensor:
        """Prompts -> token ids (B, chunks, 77) int64, each chunk with start, end and padding."""
        length = self.tokenizer.model_max_length
        body = length - 2
        rows = self.tokenizer(list(prompts), truncation=True, max_length=self.chunks * body + 2, verbose=False)
        start, end, pad = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id, self.tokenizer.pad_token_id
        chunks = []
        for ids in rows["input_ids"]:
            words = ids[1:-1]
            pieces = [words[i * body : (i + 1) * body] for i in range(self.chunks)]
            chunks.append([[start, *piece, end, *[pad] * (body - len(piece))] for piece in pieces])
        return torch.tensor(chunks)

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Prompts -> {"encoder_hidden_states": (B, L, D)} with L = 77, or 75 x chunks + 2."""
        tokens = self.tokenize(prompts)
        states = [self._hidden(tokens[:, i].to(self.text_encoder.device)) for i in range(self.chunks)]
        if self.chunks > 1:
            inner = [state[:, 1:-1] for state in states]
            states = [states[0][:, :1], *inner, states[-1][:, -1:]]
        return {"encoder_hidden_states": torch.cat(states, dim=1)}

    def _hidden(self, tokens: Tensor) -> Tensor:
        if self.clip_skip is None or self.clip_skip == 1:
            return self.text_encoder(tokens).last_hidden_state
        layers = self.text_encoder(tokens, output_hidden_states=True).hidden_states
        inner = getattr(self.text_encoder, "text_model", self.text_encoder)  # transformers 5 has no inner module
        return inner.final_layer_norm(layers[-self.clip_skip])

    def kwargs(self, stored: Mapping[str, Any], geometry: Tensor) -> Mapping[str, Any]:
        return stored
