"""PiSSA: the start at the principal part, the exported file, checkpoints."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import finetune as ft
from finetune.config import load_resolved
from finetune.errors import Interrupted, RunError, UsageError
from finetune.models.loading import DiffusionModel, load_model
from finetune.models.lora import LORA_FILE, Adapter, add_lora, load_lora, trainable
from finetune.models.pissa import start_of
from finetune.results.export import export
from finetune.run.exports import load_trained
from finetune.training.prior_prediction import untrained
from tests.models.test_adapter_types import answer
from tests.small_trainer import small_trainer


@pytest.fixture(autouse=True)
def global_generator_untouched() -> None:
    """Loading an adapter through diffusers or peft draws from the global generator."""


def trained() -> DiffusionModel:
    model = load_model("tiny")
    add_lora(model.unet, rank=4, alpha=6, target_modules=["to_q", "ff.net.2", "conv1"], init="pissa")
    source = torch.Generator().manual_seed(1)
    for parameter in trainable(model.unet):
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=source)
    return model


@pytest.mark.parametrize("kind", ["lora", "rslora"])
def test_it_starts_at_the_largest_singular_values_and_changes_nothing(kind: Any) -> None:
    model = load_model("tiny")
    before = answer(model.unet)
    add_lora(model.unet, rank=4, alpha=6, target_modules=["to_q", "conv1"], kind=kind, init="pissa")
    assert torch.allclose(answer(model.unet), before, rtol=0, atol=1e-5)
    layers = Adapter(model.unet)._layers()  # pyright: ignore[reportPrivateUsage]
    assert len(layers) > 10
    for module in layers.values():
        weight = module.get_base_layer().weight.detach()
        largest = torch.linalg.svdvals(weight.flatten(1))[:4]
        part = module.get_delta_weight("default").detach()
        found = torch.linalg.svdvals(part.flatten(1))
        assert torch.allclose(found[:4], largest, rtol=5e-3)
        assert found[4:].max() < 1e-5 * found[0]
        assert torch.equal(module.get_delta_weight("start"), -part)
    assert not any(parameter.requires_grad for parameter in start_of(model.unet).values())
    assert len(trainable(model.unet)) == 2 * len(layers)


@pytest.mark.parametrize("mixed_precision", ["no", "bf16"])
def test_a_run_with_the_default_layers_and_rank(pictures: Path, tmp_path: Path, mixed_precision: Any) -> None:
    """Among them is one of four outputs, whose rank is below the adapter's."""
    config = ft.TrainConfig(
        data=str(pictures), output_dir=str(tmp_path / "run"), max_train_steps=2, train_batch_size=1,
        num_inference_steps=0, init_lora_weights="pissa", mixed_precision=mixed_precision,
    )  # fmt: skip
    exported = load_file(ft.fine_tune(config) / LORA_FILE)
    assert exported["unet.conv_out.lora_A.weight"].shape[0] == 32


def test_without_the_adapter_the_base_answers() -> None:
    model, base = trained(), load_model("tiny")
    t, cond = torch.tensor([500]), {"encoder_hidden_states": torch.ones(1, 77, 96)}
    x = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    teacher = untrained(model.unet.eval(), None, adapter=True)(x, t, cond)
    assert torch.allclose(teacher, answer(base.unet), rtol=0, atol=1e-6)
    assert not torch.allclose(answer(model.unet), teacher, rtol=0, atol=1e-2)


def test_the_export_is_a_lora_of_twice_the_rank_on_the_untouched_base(tmp_path: Path) -> None:
    model = trained()
    learning = [name for name, parameter in model.unet.named_parameters() if parameter.requires_grad]
    assert export(model, tmp_path / "discs") < 1e-5
    assert [name for name, parameter in model.unet.named_parameters() if parameter.requires_grad] == learning
    fresh = load_model("tiny")
    load_lora(fresh.unet, tmp_path / "discs")
    assert torch.allclose(answer(fresh.unet), answer(model.unet), rtol=0, atol=1e-5)
    with safe_open(tmp_path / "discs/discs.safetensors", "pt") as file:
        assert file.metadata()["ss_network_dim"] == "8"
        key = next(key for key in file.keys() if key.endswith("lora_down.weight"))  # noqa: SIM118 # no dict
        assert file.get_tensor(key).shape[0] == 8
    merged = answer(model.unet)
    Adapter(model.unet).merge()
    assert torch.allclose(answer(model.unet), merged, rtol=0, atol=1e-5)


def test_a_checkpoint_holds_the_start_which_a_resumed_run_and_an_export_take(pictures: Path, tmp_path: Path) -> None:
    def config(name: str, **options: Any) -> ft.TrainConfig:
        basic: dict[str, Any] = {
            "data": str(pictures), "output_dir": str(tmp_path / name), "max_train_steps": 4, "rank": 2, "use_ema": True,
            "train_batch_size": 1, "num_inference_steps": 0, "init_lora_weights": "pissa",
        }  # fmt: skip
        return ft.TrainConfig(**basic | options)

    straight = ft.fine_tune(config("straight"))
    with pytest.raises(Interrupted):
        ft.fine_tune(config("resumed", max_train_minutes=1e-9))
    resumed = ft.fine_tune(config("resumed"))
    assert (resumed / LORA_FILE).read_bytes() == (straight / LORA_FILE).read_bytes()
    weights = load_file(straight / "checkpoint-4/trainable.safetensors")
    assert sum(".start." in name for name in weights) == len(weights) / 2
    model, _ = load_trained(load_resolved(straight / "config.toml"), straight)
    state = Adapter(model.unet).uniform().tensors
    assert all(torch.equal(tensor, state[key]) for key, tensor in load_file(straight / LORA_FILE).items())


def test_a_trainer_takes_the_start_from_its_state() -> None:
    """Another machine has computed other singular vectors."""
    here, there = (small_trainer("lora", fixed={"a.start.weight": torch.full((3,), x)}) for x in (1.0, -1.0))
    there.load_state_dict(here.state_dict())
    assert torch.equal(there.fixed["a.start.weight"], torch.ones(3))
    with pytest.raises(RunError, match="other parameters"):
        small_trainer("lora").load_state_dict(here.state_dict())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lora_type": "dora"}, "init_lora_weights cannot be used here: it needs lora_type lora or rslora"),
        ({"lora_dropout": 0.1}, "lora_dropout cannot be used with init_lora_weights pissa"),
        ({"scale_weight_norms": 1.0}, "scale_weight_norms cannot be used with init_lora_weights pissa"),
    ],
)
def test_what_cannot_be_combined(options: dict[str, Any], message: str, pictures: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message):
        ft.fine_tune(
            ft.TrainConfig(data=str(pictures), output_dir=str(tmp_path / "run"), init_lora_weights="pissa", **options)
        )


def test_it_is_not_for_dora() -> None:
    with pytest.raises(UsageError, match="init_lora_weights pissa is for lora_type lora and rslora without dropout"):
        add_lora(load_model("tiny").unet, kind="dora", init="pissa")
