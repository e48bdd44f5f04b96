"""Weights in prompts: (word), (word:1.2) and [word]."""

import re
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import CLIPTokenizer

MORE, LESS = 1.1, 1 / 1.1
_PART = re.compile(r"\\[()\[\]\\]|\\|\(|\[|:([+-]?(?:\d+\.?\d*|\.\d+))\)|\)|\]|[^\\()\[\]:]+|:")


def parse_weights(prompt: str) -> list[tuple[str, float]]:
    r"""The pieces of a prompt and the weight of each, by the rules of A1111 and sd-scripts (`TokenizeStrategy`).

    (a) weighs 1.1 times as much, (a:1.3) 1.3 times, [a] 1 / 1.1 times; these multiply where they nest. A bracket that
    is not closed lasts to the end, one that was not opened is text, and so is one behind a backslash.
    """
    texts, weights = list[str](), list[float]()
    opened: dict[str, list[int]] = {"(": [], "[": []}

    def weigh(start: int, factor: float) -> None:
        weights[start:] = [weight * factor for weight in weights[start:]]

    for match in _PART.finditer(prompt):
        part, number = match[0], match[1]
        if part in opened:
            opened[part].append(len(texts))
        elif number is not None and opened["("]:
            weigh(opened["("].pop(), float(number))
        elif part == ")" and opened["("]:
            weigh(opened["("].pop(), MORE)
        elif part == "]" and opened["["]:
            weigh(opened["["].pop(), LESS)
        else:
            texts.append(part[1:] if part.startswith("\\") else part)
            weights.append(1.0)
    for starts, factor in ((opened["("], MORE), (opened["["], LESS)):
        for start in starts:
            weigh(start, factor)
    pieces: list[tuple[str, float]] = []
    for text, weight in zip(texts, weights, strict=True):
        if not text:  # of a backslash alone
            continue
        if pieces and pieces[-1][1] == weight:
            pieces[-1] = pieces[-1][0] + text, weight
        else:
            pieces.append((text, weight))
    return pieces


def weighted_words(tokenizer: CLIPTokenizer, prompt: str) -> tuple[list[int], list[float]]:
    """Token ids of a prompt without marks, and the weight of each."""
    ids, weights = list[int](), list[float]()
    for text, weight in parse_weights(prompt):
        words = tokenizer(text, verbose=False)["input_ids"][1:-1]  # pyright: ignore[reportIndexIssue, reportArgumentType]
        ids += words
        weights += [weight] * len(words)
    return ids, weights


def times_weights(states: Tensor, weights: Sequence[Sequence[float]]) -> Tensor:
    """Hidden states, each multiplied by the weight of its word.

    Args:
        states: (B, L, D), with a mark before the words and one behind.
        weights: of the words of each prompt; what is beyond L is cut. []: of none.
    """
    if not weights:
        return states
    length = states.shape[1] - 2
    rows = [[1.0, *row[:length], *[1.0] * (length - len(row[:length])), 1.0] for row in weights]
    return states * torch.tensor(rows).unsqueeze(-1).to(states)
