"""What the tensors of an adapter add to a layer's weight, by the definition of each kind of adapter.

Tensors go by peft's names: `lora_A.weight`, `hada_w1_a`, `lokr_w1` ...
"""

from collections.abc import Mapping

import torch
from torch import Tensor

MAGNITUDE = "lora_magnitude_vector"
"""What DoRA learns beside the two matrices: the norm of each row."""


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

    DoRA gives each row of the sum the norm that it learned (Liu et al. 2024, eq. 5).
    """
    base = weight.float()
    merged = base + update(tensors, alpha, weight.shape)
    if MAGNITUDE in tensors:
        norms = merged.flatten(1).norm(dim=1)
        merged = merged * (tensors[MAGNITUDE].float().flatten() / norms).reshape(-1, *[1] * (weight.ndim - 1))
    return base + strength * (merged - base)


def _factor(tensors: Mapping[str, Tensor], name: str, core: str) -> Tensor:
    """A whole factor; or the product of its two, around the core that LyCORIS has for the pixels of a kernel."""
    if name in tensors:
        return tensors[name]
    a, b = tensors[f"{name}_a"], tensors[f"{name}_b"]
    return torch.einsum("ijkl,ip,jr->prkl", tensors[core], a, b) if core in tensors else a @ b
