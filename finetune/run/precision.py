"""Which number format a run computes in, and whether it adds up in the same order every time."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from finetune.errors import UsageError

DTYPES: dict[str, torch.dtype | None] = {"no": None, "fp16": torch.float16, "bf16": torch.bfloat16}
"""The mixed_precision option -> dtype that the UNet computes in (None: its weights')."""


def resolve_precision(wanted: str, device: torch.device, *, small: bool) -> str:
    """ "no", "fp16" or "bf16".

    Args:
        wanted: also "auto": bf16 where the hardware multiplies it natively, else fp16 on a GPU and no on a CPU.
        device: where the UNet runs.
        small: a network that gains nothing from bf16 on a CPU; "auto" then means no there.

    Raises:
        UsageError: fp16 on a CPU.
    """
    if wanted == "fp16" and device.type == "cpu":
        raise UsageError("mixed_precision = fp16: a CPU cannot compute in fp16; allowed here is bf16, no or auto")
    if wanted != "auto":
        return wanted
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    if (
        device.type == "cpu"
        and not small
        and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    ):
        return "bf16"
    return "no"


@contextmanager
def gpu_algorithms(*, deterministic: bool) -> Iterator[None]:
    """Inside, a GPU takes its fastest algorithms, or only those that give the same bits every time; then as before.

    The fastest are those that cuDNN finds by trying, and for fp32 products TF32 (10 bits of mantissa). cuBLAS reads
    its part of the other choice from the environment when it is first used: nothing may have multiplied before.
    """
    backends = torch.backends
    before = torch.are_deterministic_algorithms_enabled(), backends.cudnn.benchmark, backends.cuda.matmul.allow_tf32
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    deterministic |= before[0]  # as the program around may have asked
    torch.use_deterministic_algorithms(deterministic)
    backends.cudnn.benchmark = not deterministic
    backends.cuda.matmul.allow_tf32 = not deterministic
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        backends.cudnn.benchmark, backends.cuda.matmul.allow_tf32 = before[1:]
