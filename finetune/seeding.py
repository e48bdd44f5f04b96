"""Randomness: every random number is a pure function of (seed, example id, visit, purpose).

A key stands for (seed, example id, visit) and travels in the batch; a purpose ("noise", "timestep", "flip" ...)
is folded in at the moment of the draw. Nothing here touches torch's global generator.
"""

import hashlib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def fold(*parts: int | str) -> int:
    """A stable hash of the parts, in [0, 2**63). Equal on every machine, Python and torch version."""
    return int.from_bytes(_hash(parts, 8), "little") >> 1


def wide_fold(*parts: int | str) -> str:
    """Hash values as `fold` does, to 32 hexadecimal digits: no two contents will ever share one."""
    return _hash(parts, 16).hex()


def _hash(values: tuple[int | str, ...], size: int) -> bytes:
    text = "\x1f".join(f"{type(part).__name__}:{len(str(part))}:{part}" for part in values)
    return hashlib.blake2b(text.encode("utf-8", "surrogateescape"), digest_size=size).digest()


def example_key(seed: int, example_id: str, visit: int) -> int:
    """The random key of one example at one visit (visit = epoch x repeats + repeat), in [0, 2**63)."""
    return fold(seed, example_id, visit)


def generator(key: int, purpose: str) -> torch.Generator:
    """A CPU generator for one draw. It reads only a seed's low 32 bits, so the hash is cut to them."""
    return torch.Generator().manual_seed(fold(key, purpose) & 0xFFFFFFFF)


def _each(keys: Tensor, purpose: str, draw: Callable[[torch.Generator], Tensor]) -> Tensor:
    return torch.stack([draw(generator(key, purpose)) for key in keys.tolist()])


def normal(keys: Tensor, purpose: str, shape: Sequence[int]) -> Tensor:
    """Standard normal numbers, fp32 on the CPU: keys (B,) -> (B, *shape)."""
    return _each(keys, purpose, lambda source: torch.randn(tuple(shape), generator=source))


def uniform(keys: Tensor, purpose: str) -> Tensor:
    """Uniform numbers in [0, 1), fp64 on the CPU: keys (B,) -> (B,)."""
    return _each(keys, purpose, lambda source: torch.rand((), generator=source, dtype=torch.float64))


def integers(keys: Tensor, purpose: str, high: int) -> Tensor:
    """Uniform integers in [0, high), int64 on the CPU: keys (B,) -> (B,)."""
    return _each(keys, purpose, lambda source: torch.randint(high, (), generator=source))
