import pytest
import torch

from finetune.errors import UsageError
from finetune.models.loading import load_model
from finetune.models.lora import add_lora, trainable


def answer(unet) -> torch.Tensor:
    x = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return unet(x, 500, encoder_hidden_states=torch.zeros(1, 77, 96)).sample


def test_a_fresh_adapter_changes_nothing_and_is_all_that_learns() -> None:
    unet = load_model("tiny").unet
    before = answer(unet)
    add_lora(unet, rank=4)
    torch.testing.assert_close(answer(unet), before)
    learning = [name for name, parameter in unet.named_parameters() if parameter.requires_grad]
    assert learning
    assert all("lora_" in name for name in learning)
    kinds = {kind for kind in ("attn1.to_q", "attn2.to_v", "to_out.0", "ff.net.0.proj", "ff.net.2")
             if any(kind in name for name in learning)}  # fmt: skip
    assert len(kinds) == 5


def test_adapter_weights_are_fp32_on_a_half_precision_base() -> None:
    unet = load_model("tiny", dtype=torch.bfloat16).unet
    add_lora(unet)
    assert {parameter.dtype for parameter in trainable(unet)} == {torch.float32}
    assert unet.conv_in.weight.dtype == torch.bfloat16


def test_a_seed_decides_the_adapters_first_weights() -> None:
    def first(seed: int) -> torch.Tensor:
        unet = load_model("tiny").unet
        add_lora(unet, rank=4, seed=seed)
        return trainable(unet)[0]

    assert torch.equal(first(1), first(1))
    assert not torch.equal(first(1), first(2))
    assert first(1).std().item() == pytest.approx(1 / 4, rel=0.2)


def test_layers_that_are_not_there_are_named() -> None:
    with pytest.raises(UsageError, match="no layer named like 'to_w'"):
        add_lora(load_model("tiny").unet, target_modules=["to_q", "to_w"])


def test_a_pixel_space_unet_takes_no_adapter() -> None:
    with pytest.raises(UsageError, match="LoRA needs the UNet of a latent model"):
        add_lora(load_model("ddpm", resolution=32).unet)


@pytest.mark.parametrize("rank", [0, 129])
def test_a_rank_above_every_layers_is_refused(rank: int) -> None:
    with pytest.raises(UsageError, match=rf"^rank = {rank}: expected 1 to 128, the highest rank"):
        add_lora(load_model("tiny").unet, rank=rank)
