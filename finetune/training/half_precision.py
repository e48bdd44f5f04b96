"""Check of half precision: each layer's output compared with that of fp32, on the same inputs.

Kernels err: torch 2.14.1's bf16 convolution (256 channels, 3 x 3, stride 2) on inputs of 3 x 2 answers 75 % off on a
CPU with AMX, differently each time. A run would die of it after a step, or learn something else.
"""

import copy
from collections.abc import Callable
from functools import partial
from math import isfinite
from typing import Any

import torch
from diffusers.models.attention_processor import Attention
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from finetune.errors import RunError
from finetune.models.environment import device_name

TOLERANCES = {torch.bfloat16: 0.03, torch.float16: 0.01}
"""The largest allowed error of a layer, relative to the norm of its answer in fp32. Products are summed in fp32, so
what is left is the rounding of the answer and of what is between in attention: 0.3 % in bf16 where all is well."""

PASSES = 6
"""What a check costs, in forward passes of one example: two in half precision, and one in fp32 that counts for four."""

_LAYERS: tuple[type, ...] = (nn.Conv2d, nn.Linear, nn.GroupNorm, nn.LayerNorm, Attention, BaseTunerLayer)


@torch.no_grad()
def check_half_precision(network: nn.Module, answer: Callable[[], object]) -> None:
    """Compute once in half precision, and each layer again, in fp32 and as it was.

    Each layer's fp32 answer is computed from the very inputs that it was given, with its own weights, one layer at a
    time, so no second network is needed. The network is in eval mode meanwhile.

    Args:
        network: computes in half precision.
        answer: calls it on the inputs to be tried.

    Raises:
        RunError: a layer's answer is further from that of fp32 than `TOLERANCES` allows, or another one the second
            time, on a CPU or where algorithms are held to be deterministic; names the layer, device and torch version.
    """
    trained = network.training
    network.eval()
    hooks = [layer.register_forward_hook(partial(_compare, name), with_kwargs=True) for name, layer in _layers(network)]
    try:
        with torch.compiler.set_stance("force_eager"):  # hooks would have everything compiled once more
            answer()
    finally:
        for hook in hooks:
            hook.remove()
        network.train(trained)


def check_share(*, sizes: int, steps: int, batch_size: int) -> float:
    """The share of a run's time that the checks take.

    Args:
        sizes: heights and widths of the pictures.
        steps: of the run.
        batch_size: examples per step; each counts for three forward passes.
    """
    return PASSES * sizes / (PASSES * sizes + 3 * steps * batch_size)


def _layers(network: nn.Module) -> list[tuple[str, nn.Module]]:
    """The outermost modules of the kinds that are compared, by name."""
    layers: list[tuple[str, nn.Module]] = []
    for name, module in network.named_modules():  # parents come before what they hold
        inside = layers and name.startswith(f"{layers[-1][0]}.")
        if isinstance(module, _LAYERS) and not inside:
            layers.append((name, module))
    return layers


def _compare(name: str, layer: nn.Module, inputs: tuple[Any, ...], options: dict[str, Any], answer: Any) -> None:
    if not isinstance(answer, Tensor) or answer.dtype not in TOLERANCES:
        return
    plain = copy.deepcopy(layer)
    for module in plain.modules():
        module._forward_hooks.clear()
    again = plain(*inputs, **options)
    exact = plain.float()(*_in_fp32(inputs), **_in_fp32(options))
    error = ((answer.float() - exact).norm() / exact.norm().clamp(min=torch.finfo(torch.float32).tiny)).item()
    if exact.isfinite().all() and not error <= TOLERANCES[answer.dtype]:
        off = f"is {error:.0%} off its answer in fp32" if isfinite(error) else "is not finite, as it is in fp32"
        _refuse(name, layer, inputs, answer, off)
    held = answer.device.type == "cpu" or torch.are_deterministic_algorithms_enabled()
    if held and not torch.equal(again, answer):
        _refuse(name, layer, inputs, answer, "differs from run to run")


def _in_fp32(values: Any) -> Any:
    """Return the arguments with tensors of half precision cast to fp32."""
    if isinstance(values, Tensor):
        return values.float() if values.dtype in TOLERANCES else values
    if isinstance(values, dict):
        return {name: _in_fp32(value) for name, value in values.items()}
    if isinstance(values, (list, tuple)):
        return type(values)(_in_fp32(value) for value in values)
    return values


def _refuse(name: str, layer: nn.Module, inputs: tuple[Any, ...], answer: Tensor, what: str) -> None:
    given = next((value for value in inputs if isinstance(value, Tensor)), answer)
    shape = " x ".join(map(str, given.shape))
    dtype = str(answer.dtype).removeprefix("torch.")
    raise RunError(
        f"the answer of the UNet's layer {name} ({type(layer).__name__}, inputs {shape}) {what}, in {dtype} on "
        f"{device_name(answer.device)} with torch {torch.__version__}; "
        "give --mixed_precision no, or another --resolution"
    )
