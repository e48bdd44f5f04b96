"""The weight update of an adapter's tensors, by the definition of each adapter type.

Tensors go by peft's names: `lora_A.weight`, `hada_w1_a`, `lokr_w1` ...
"""

from collections.abc import Mapping

import torch
from torch import Tensor

MAGNITUDE = "lora_magnitude_vector"
"""What DoRA learns beside the two matrices: the norm of each row."""


MAGNITUDE_OF_INPUTS = "lora_magnitude_of_inputs"
"""The same of LyCORIS' and A1111's DoRA: the norm of each column."""

MAGNITUDE_OVER_BASE = "lora_magnitude_over_base"
"""The same as ComfyUI and Forge apply it: each row of the sum is divided by the norm of the base weight's row."""

MAGNITUDES = (MAGNITUDE, MAGNITUDE_OF_INPUTS, MAGNITUDE_OVER_BASE)


def lacking(tensors: Mapping[str, Tensor]) -> str | None:
    """A tensor without which a layer's others are no update; None where they are whole."""
    if any(name.startswith("hada_") for name in tensors):
        needed = [f"hada_{factor}" for factor in ("w1_a", "w1_b", "w2_a", "w2_b")]
    elif any(name.startswith("lokr_") for name in tensors):
        needed = [name for i in "12" if f"lokr_w{i}" not in tensors for name in (f"lokr_w{i}_a", f"lokr_w{i}_b")]
    else:
        needed = ["lora_A.weight", "lora_B.weight"]
    return next((name for name in needed if name not in tensors), None)


def rank_of(tensors: Mapping[str, Tensor]) -> int | None:
    """The rank of a layer's update; None for a LoKr of two whole factors, which has none, and no alpha."""
    for name in ("lora_A.weight", "hada_w1_b", "lokr_w2_b", "lokr_w1_b"):
        if name in tensors:
            return tensors[name].shape[0]
    return None


def update(tensors: Mapping[str, Tensor], alpha: float | None, shape: torch.Size) -> Tensor:
    """What is added to a weight, in fp32.

    LoRA: B A (Hu et al. 2021, eq. 3). LoHa: (A1 B1) * (A2 B2) (Hyeon-Woo et al. 2022, eq. 2). LoKr: the Kronecker
    product of two factors, of which one or both may be products themselves (Yeh et al. 2024, eq. 5). Each times
    alpha / rank.

    Args:
        tensors: name -> tensor, of one layer.
        alpha: None: equal to the rank.
        shape: of the weight: (out, in) or (out, in, height, width).
    """
    some = {name: tensor.float() for name, tensor in tensors.items()}
    if "lora_B.weight" in some:
        delta = some["lora_B.weight"].flatten(1) @ some["lora_A.weight"].flatten(1)
    elif "hada_w1_a" in some:
        first, second = (_factor(some, f"hada_w{i}", f"hada_t{i}") for i in (1, 2))
        delta = first * second
    else:
        first, second = _factor(some, "lokr_w1", "lokr_t1"), _factor(some, "lokr_w2", "lokr_t2")
        delta = torch.kron(first.reshape(*first.shape, *[1] * (second.ndim - 2)), second.contiguous())
    rank = rank_of(tensors)
    scale = 1.0 if alpha is None or rank is None else alpha / rank
    return scale * delta.reshape(shape)


def changed(weight: Tensor, tensors: Mapping[str, Tensor], alpha: float | None, strength: float = 1.0) -> Tensor:
    """The weight with an adapter merged into it, in fp32.

    DoRA gives each row of the sum the norm that it learned (Liu et al. 2024, eq. 5), LyCORIS' each column.
    """
    base = weight.float()
    merged = base + update(tensors, alpha, weight.shape)
    for name, divisor in ((MAGNITUDE, merged), (MAGNITUDE_OVER_BASE, base)):
        if name in tensors:
            scale = tensors[name].float().flatten() / row_norms(divisor)
            merged = merged * scale.reshape(-1, *[1] * (weight.ndim - 1))
    if MAGNITUDE_OF_INPUTS in tensors:
        norms = merged.transpose(0, 1).flatten(1).norm(dim=1)
        scale = tensors[MAGNITUDE_OF_INPUTS].float().flatten() / norms
        merged = merged * scale.reshape(1, -1, *[1] * (weight.ndim - 2))
    return base + strength * (merged - base)


def row_norms(weight: Tensor) -> Tensor:
    """The norm of what each output is computed from, in fp32: (out,)."""
    return weight.float().flatten(1).norm(dim=1)


def factors(
    tensors: Mapping[str, Tensor], alpha: float | None, shape: torch.Size, *, rank: int | None, energy: float
) -> tuple[dict[str, Tensor], float]:
    """A layer's update as a plain LoRA of lower rank: the best there is in the sum of squares (Eckart & Young 1936).

    Args:
        tensors: of one layer, of any kind but DoRA; or {"": update}, for a whole update that nothing has made.
        alpha: see `update`.
        shape: of the weight.
        rank: the highest to keep; None: as many as `energy` asks for.
        energy: keep the fewest singular values whose squares sum up to this share, in (0, 1].

    Returns:
        `lora_A.weight` and `lora_B.weight`, for alpha = rank, and the share of the squares that they keep.
    """
    if "lora_B.weight" in tensors:  # two thin matrices; the decomposition is of a square one as small as their rank
        scale = 1.0 if alpha is None else alpha / tensors["lora_A.weight"].shape[0]
        left, small = torch.linalg.qr(tensors["lora_B.weight"].float().flatten(1) * scale)
        right, other = torch.linalg.qr(tensors["lora_A.weight"].float().flatten(1).T)
        u, s, v = torch.linalg.svd(small @ other.T, full_matrices=False)
        u, v = left @ u, v @ right.T
    else:
        delta = tensors[""] if "" in tensors else update(tensors, alpha, shape)
        u, s, v = torch.linalg.svd(delta.float().flatten(1), full_matrices=False)
    shares = (s**2).cumsum(0) / (s**2).sum().clamp_min(torch.finfo().tiny)
    enough = int((shares < energy).sum()) + 1
    new_rank = min(enough, len(s), rank or len(s))
    root = s[:new_rank].sqrt()
    down = (root[:, None] * v[:new_rank]).reshape(new_rank, *shape[1:])
    up = (u[:, :new_rank] * root).reshape(-1, new_rank, *[1] * (len(shape) - 2))
    return {"lora_A.weight": down.contiguous(), "lora_B.weight": up.contiguous()}, shares[new_rank - 1].item()


def _factor(tensors: Mapping[str, Tensor], name: str, core: str) -> Tensor:
    """A whole factor; or the product of its two, around the core that LyCORIS has for the pixels of a kernel."""
    if name in tensors:
        return tensors[name]
    a, b = tensors[f"{name}_a"], tensors[f"{name}_b"]
    return torch.einsum("ijkl,ip,jr->prkl", tensors[core], a, b) if core in tensors else a @ b
