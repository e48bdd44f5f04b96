import shutil
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel

from finetune.models.loading import load_model
from finetune.training.backend import PAYS_AFTER, compile_blocks, compile_pays, is_compiled


def test_only_long_runs_of_large_models_on_a_gpu_are_compiled_unasked() -> None:
    cuda = torch.device("cuda")
    assert compile_pays(cuda, PAYS_AFTER, small=False)
    assert not compile_pays(cuda, PAYS_AFTER - 1, small=False)
    assert not compile_pays(cuda, PAYS_AFTER, small=True)
    assert not compile_pays(torch.device("cpu"), PAYS_AFTER, small=False)


def test_a_machine_without_a_compiler_says_so_and_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(function: Any) -> Any:
        def call(*_: Any) -> None:
            raise RuntimeError("Failed to find C compiler.\nPlease specify via CC environment variable.")

        return call

    monkeypatch.setattr(torch, "compile", failing)
    unet = load_model("tiny").unet
    assert compile_blocks(unet) == "Failed to find C compiler."
    assert not is_compiled(unet)


@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
def test_blocks_are_compiled_and_the_unet_is_laid_out_for_it() -> None:
    unet: UNet2DConditionModel = load_model("tiny").unet  # pyright: ignore[reportAssignmentType]
    assert compile_blocks(unet) is None
    compiled = {type(module).__name__ for module in unet.modules() if module._compiled_call_impl is not None}
    assert compiled == {"BasicTransformerBlock", "ResnetBlock2D"}
    assert is_compiled(unet)
    assert unet.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
