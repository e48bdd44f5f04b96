"""The lean forward pass of a LoRA layer is peft's own, in fewer steps."""

import copy
from typing import Any

import pytest
import torch
from peft.tuners.lora.layer import Linear
from torch import Tensor

from finetune.models.loading import load_model
from finetune.models.lora import Adapter, add_lora, trainable


def adapted(**options: Any) -> Any:
    unet = load_model("tiny").unet
    add_lora(unet, rank=4, alpha=6.0, **options)
    for parameter in trainable(unet):
        parameter.data += 0.02
    return unet


def answer_of(unet: Any) -> Tensor:
    width = unet.config["cross_attention_dim"]
    x, embedding = torch.linspace(-1, 1, 1024).view(1, 4, 16, 16), torch.linspace(-1, 1, 77 * width).view(1, 77, width)
    return unet(x.to(unet.dtype), torch.tensor([10]), embedding.to(unet.dtype)).sample


def outputs(unet: Any) -> tuple[Tensor, Tensor]:
    """Output on a fixed input, and the gradient of its square."""
    unet.zero_grad()
    answer = answer_of(unet)
    answer.float().square().sum().backward()
    return answer.detach(), torch.cat([p.grad.flatten() for p in trainable(unet)])


def as_peft_does(unet: Any) -> Any:
    plain = copy.deepcopy(unet)
    for layer in plain.modules():
        if isinstance(layer, Linear):
            del layer.forward
    return plain


def test_outputs_and_gradients_are_those_of_peft() -> None:
    unet = adapted()
    (ours, our_gradient), (theirs, their_gradient) = outputs(unet), outputs(as_peft_does(unet))
    assert not torch.equal(ours, theirs)  # it adds in another order
    assert (ours - theirs).norm() <= 1e-6 * theirs.norm()
    assert (our_gradient - their_gradient).norm() <= 1e-5 * their_gradient.norm()


@pytest.mark.parametrize("options", [{"kind": "dora"}, {"dropout": 0.1}])
def test_what_is_no_plain_lora_goes_the_way_of_peft(options: dict[str, Any]) -> None:
    unet = adapted(**options).eval()
    ours, theirs = outputs(unet), outputs(as_peft_does(unet))
    assert torch.equal(ours[0], theirs[0])


def test_adapters_that_are_turned_off_or_of_another_dtype_go_the_way_of_peft() -> None:
    unet = adapted()
    whole, _ = outputs(unet)
    unet.disable_adapters()
    base: Any = load_model("tiny").unet
    with torch.no_grad():
        assert torch.equal(answer_of(unet), answer_of(base))
    unet.enable_adapters()
    for name, parameter in unet.named_parameters():
        if "lora_" not in name:
            parameter.data = parameter.data.bfloat16()
    mixed, _ = outputs(unet)  # an fp32 adapter on a base in bf16, as diffusers would run it
    assert mixed.dtype == torch.bfloat16
    assert (mixed.float() - whole).norm() <= 0.1 * whole.norm()


def test_a_merged_lora_leaves_plain_layers() -> None:
    unet = adapted()
    whole, _ = outputs(unet)
    adapter = Adapter.attached_to(unet)
    assert adapter is not None
    adapter.merge()
    assert not any(isinstance(layer, Linear) for layer in unet.modules())
    assert (answer_of(unet) - whole).norm() <= 1e-5 * whole.norm()
