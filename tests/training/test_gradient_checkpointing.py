from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from finetune.models.loading import load_model
from finetune.training.gradient_checkpointing import recompute, sets_generator


def gradients(unet: nn.Module) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 4, 8, 8, generator=generator)
    states = torch.randn(2, 77, 96, generator=generator)
    loss = unet(x, torch.tensor([5, 900]), encoder_hidden_states=states).sample.square().mean()
    return list(torch.autograd.grad(loss, list(unet.parameters())))


@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 1.0])
def test_a_share_of_the_blocks_is_computed_again_and_the_gradients_stay_what_they_are(share: float) -> None:
    unet = load_model("tiny").unet
    plain = gradients(unet)
    recompute(unet, share)
    blocks = [name for name, module in unet.named_modules() if hasattr(module, "gradient_checkpointing")]
    chosen = [name for name in blocks if unet.get_submodule(name).gradient_checkpointing]
    assert len(chosen) == round(share * len(blocks))

    calls: Counter[str] = Counter()
    parts = ("ResnetBlock2D", "BasicTransformerBlock")
    for name, module in unet.named_modules():
        if type(module).__name__ in parts:
            module.register_forward_pre_hook(lambda *_, name=name: calls.update([name]))
    assert all(map(torch.equal, gradients(unet), plain))
    # down_blocks.0.resnets.1 belongs to down_blocks.0, and down_blocks.0.attentions.0.transformer_blocks.0 to the
    # transformer above it. diffusers leaves out the first part of the middle.
    expected = {name for name in calls if name.rsplit(".", 2)[0] in chosen} - {"mid_block.resnets.0"}
    assert {name for name, count in calls.items() if count == 2} == expected


def test_the_blocks_that_see_the_most_positions_come_first() -> None:
    unet = load_model("tiny").unet
    recompute(unet, 0.3)
    blocks: list[Any] = [module for module in unet.modules() if hasattr(module, "gradient_checkpointing")]
    widths: dict[bool, set[int]] = {True: set(), False: set()}
    for block in blocks:
        width = block.resnets[0].out_channels if hasattr(block, "resnets") else block.in_channels
        widths[block.gradient_checkpointing].add(width)
    assert max(widths[True]) <= min(widths[False])


def test_the_generator_is_left_alone_unless_dropout_or_the_one_who_asks_wants_it_set_back() -> None:
    unet = load_model("tiny").unet
    assert not sets_generator(unet)
    recompute(unet, 0.5)
    assert not sets_generator(unet)
    next(m for m in unet.modules() if isinstance(m, nn.Dropout)).p = 0.5
    recompute(unet, 0.5)
    assert sets_generator(unet)
    plain = load_model("tiny").unet
    plain.enable_gradient_checkpointing()  # diffusers' own way
    assert sets_generator(plain)


def test_dropout_draws_the_same_again() -> None:
    def dropped(share: float) -> list[Tensor]:
        unet = load_model("tiny").unet.train()
        for module in unet.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.5
        recompute(unet, share)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)
            return gradients(unet)

    plain = dropped(0.0)
    assert not all(map(torch.equal, plain, gradients(load_model("tiny").unet)))
    assert all(map(torch.equal, dropped(1.0), plain))
