"""Backend settings: number format, algorithms and compilation."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from finetune.errors import UsageError

DTYPES: dict[str, torch.dtype | None] = {"no": None, "fp16": torch.float16, "bf16": torch.bfloat16}
"""The mixed_precision option -> dtype that the UNet computes in (None: its weights')."""


def resolve_precision(mixed_precision: str, device: torch.device, *, small: bool) -> str:
    """ "no", "fp16" or "bf16".

    Args:
        mixed_precision: also "auto": bf16 where the hardware multiplies it natively, else fp16 on a GPU and "no" on a
            CPU.
        device: where the UNet runs.
        small: a network that gains nothing from bf16 on a CPU; "auto" then means no there.

    Raises:
        UsageError: fp16 on a CPU.
    """
    if mixed_precision == "fp16" and device.type == "cpu":
        raise UsageError("mixed_precision = fp16: a CPU cannot compute in fp16; allowed here is bf16, no or auto")
    if mixed_precision != "auto":
        return mixed_precision
    if device.type == "cuda" and not torch.cuda.is_available():
        return "bf16"  # a GPU that is planned for, of 2020 or later
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    if (
        device.type == "cpu"
        and not small
        and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    ):
        return "bf16"
    return "no"


TRIED = 3
"""Algorithms that cuDNN times for a convolution, where it does. For a UNet of SD 1.5's size each shape of micro-batch
takes an H200 5 seconds so, 13 with torch's 10, and 1.5 where none is timed."""

TUNING_PAYS_AFTER = 2000
"""Steps for each shape of micro-batch after which that is won back: at batch 16 a step is an eighth shorter then, at
batch 4 it is not."""


def tuning_pays(steps: int, *, sizes: int, batch_size: int) -> bool:
    """Whether a run of so many steps should try out algorithms, with pictures of so many sizes.

    Steps of several sizes hold anything from one to `batch_size` pictures of each.
    """
    return steps >= TUNING_PAYS_AFTER * (sizes * batch_size if sizes > 1 else 1)


@contextmanager
def gpu_algorithms(*, deterministic: bool, tuned: bool) -> Iterator[None]:
    """Choose a GPU's algorithms for a while: fast ones, or only those that give the same bits every time.

    The fastest convolutions are those that cuDNN finds by trying, where `tuned`; fp32 products are in TF32 (10 bits of
    mantissa). cuBLAS reads its part of the other choice from the environment when it is first used: nothing may have
    multiplied before.
    """
    backends = torch.backends
    before = torch.are_deterministic_algorithms_enabled(), backends.cudnn.benchmark, backends.cuda.matmul.allow_tf32
    limit, backends.cudnn.benchmark_limit = backends.cudnn.benchmark_limit, TRIED
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    deterministic |= before[0]  # as the program around may have asked
    torch.use_deterministic_algorithms(deterministic)
    backends.cudnn.benchmark = tuned and not deterministic
    backends.cuda.matmul.allow_tf32 = not deterministic
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        backends.cudnn.benchmark, backends.cuda.matmul.allow_tf32 = before[1:]
        backends.cudnn.benchmark_limit = limit


_BLOCKS = ("BasicTransformerBlock", "ResnetBlock2D")
"""What a UNet repeats. Blocks of one shape share their code, where the whole UNet would be compiled as one piece."""

_SHAPES = 64
"""Shapes of blocks that are compiled; torch gives up at 8, and a UNet's residual blocks have more."""

PAYS_AFTER = 10_000
"""Steps of training after which a GPU has won back what compiling takes: an H100 two minutes, for a tenth of a step."""


def compile_pays(device: torch.device, steps: int, *, small: bool) -> bool:
    """Whether a run of so many steps ends earlier with compiled blocks; `small` networks gain nothing worth it."""
    return device.type == "cuda" and not small and steps >= PAYS_AFTER


def compile_blocks(unet: nn.Module) -> str | None:
    """Let the repeated blocks of `unet` be compiled when they first run.

    Returns:
        None, or in a line why this machine cannot: a compiler is missing, or the GPU is too old. Nothing is changed
        then.
    """
    try:
        torch.compile(_probe)(torch.ones(8, device=next(unet.parameters()).device))
    except RuntimeError as error:  # of dynamo, inductor and triton alike
        return str(error).strip().splitlines()[0]
    dynamo: Any = torch._dynamo.config
    dynamo.recompile_limit = max(dynamo.recompile_limit, _SHAPES)
    dynamo.suppress_errors = True  # a block that cannot be compiled runs as it is, with a warning
    # Convolutions are fastest with channels last, but torch's own group norm turns them over and back: with compiled
    # ones only is it worth it.
    nn.Module.to(unet, memory_format=torch.channels_last)
    for module in unet.modules():
        if type(module).__name__ in _BLOCKS:
            module.compile()
    return None


def is_compiled(unet: nn.Module) -> bool:
    """Whether `compile_blocks` did it."""
    return any(module._compiled_call_impl is not None for module in unet.modules())


def _probe(x: torch.Tensor) -> torch.Tensor:
    return x + 1
