"""Every kind of adapter: there and back between the layouts, proved, trained, drawn with, gone on from."""

import re
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from finetune.commands import sample
from finetune.config import TrainConfig
from finetune.errors import ModelError, RunError, UsageError
from finetune.models.adapter_types import NAMES, Kind
from finetune.models.loading import DiffusionModel, load_model
from finetune.models.lora import Adapter, add_lora, load_lora, trainable
from finetune.models.lora_formats import LoraFile, from_kohya, read_lora, to_kohya, write_peft
from finetune.models.lora_keys import layer_names
from finetune.models.lora_math import changed
from finetune.models.tiny import tiny_folder
from finetune.recipe import fine_tune
from finetune.results.export import export
from finetune.results.verify import verify_kohya
from tests.models.test_lora_formats import EVERYTHING, SHAPES, adapted, in_kohyas_layout, names_of
from tests.small_models import write_single_file

TARGETS = ("to_q", "to_out.0", "ff.net.2", "conv1", "proj_in")


@pytest.fixture(autouse=True)
def global_generator_untouched() -> None:
    """Loading an adapter through diffusers or peft draws from the global generator."""


def answer(unet: nn.Module) -> Tensor:
    x = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return unet.eval()(x, 500, encoder_hidden_states=torch.ones(1, 77, 96)).sample


def trained(kind: Kind) -> DiffusionModel:
    """Alpha 3 on rank 4, weights far from zero."""
    model = load_model("tiny")
    add_lora(model.unet, rank=4, alpha=3, target_modules=TARGETS, kind=kind)
    source = torch.Generator().manual_seed(1)
    for parameter in trainable(model.unet):
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=source)
    return model


@pytest.mark.parametrize("kind", NAMES)
def test_an_adapter_changes_nothing_until_it_has_learned(kind: Kind) -> None:
    model = load_model("tiny")
    before = answer(model.unet)
    add_lora(model.unet, rank=4, alpha=3, target_modules=TARGETS, kind=kind)
    assert torch.allclose(answer(model.unet), before, rtol=0, atol=1e-5)
    assert {parameter.dtype for parameter in trainable(model.unet)} == {torch.float32}
    assert not torch.allclose(answer(trained(kind).unet), before, rtol=0, atol=1e-2)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", NAMES)
def test_there_and_back_is_equal_to_the_bit(kind: Kind, shape: str) -> None:
    adapter = adapted(shape, EVERYTHING, kind)
    state, alphas = adapter.state(), adapter.alphas()
    back, back_alphas = from_kohya(in_kohyas_layout(adapter), names_of(shape))
    assert back.keys() == state.keys()
    assert all(torch.equal(back[key], tensor) for key, tensor in state.items())
    assert back_alphas == pytest.approx(alphas)
    if kind == "rslora":
        assert set(alphas.values()) == {3 * 4**0.5}


@pytest.mark.parametrize("kind", NAMES)
def test_an_export_is_proved_in_both_layouts(kind: Kind, tmp_path: Path) -> None:
    model = trained(kind)
    assert export(model, tmp_path / "discs") < 1e-5
    fresh = load_model("tiny")
    load_lora(fresh.unet, tmp_path / "discs")
    assert torch.allclose(answer(fresh.unet), answer(model.unet), rtol=0, atol=1e-5)
    with safe_open(tmp_path / "discs/discs.safetensors", "pt") as file:
        lycoris = file.metadata()["ss_network_module"] == "lycoris.kohya"
    assert lycoris == (kind in ("dora", "loha", "lokr"))


@pytest.mark.parametrize("kind", ["dora", "loha", "lokr"])
@pytest.mark.parametrize("fault", ["alpha", "value", "missing"])
def test_the_proof_of_what_diffusers_cannot_load_finds_faults(kind: Kind, fault: str, tmp_path: Path) -> None:
    model = trained(kind)
    path = tmp_path / "lora.safetensors"
    Adapter(model.unet).save_kohya(path, {})
    assert verify_kohya(model, path) < 1e-5
    tensors = load_file(path)
    key = next(key for key in tensors if key.endswith(".alpha") == (fault == "alpha"))
    tensors[key] = tensors[key] + 1e-3
    if fault == "missing":
        del tensors[key]
    save_file(tensors, path)
    with pytest.raises((RunError, ModelError), match=r"weights differ|is missing"):
        verify_kohya(model, path)


@pytest.mark.parametrize("kind", NAMES)
def test_merged_by_the_definition_the_weights_answer_the_same(kind: Kind, tmp_path: Path) -> None:
    model = trained(kind)
    path = tmp_path / "lora.safetensors"
    Adapter(model.unet).save_kohya(path, {})
    plain = load_model("tiny").unet
    found = read_lora(path, layer_names(plain.config, plain.state_dict()))
    for layer, tensors in found.layers().items():
        weight = plain.get_parameter(f"{layer}.weight")
        weight.data = changed(weight, tensors, found.alphas[layer])
    assert torch.allclose(answer(plain), answer(model.unet), rtol=0, atol=2e-5)


def test_comfyui_comes_to_the_weights_of_a_dora(tmp_path: Path) -> None:
    """Its formula for a `dora_scale` with a number for each output: the sum, times the scale, by the base's norm."""
    model = trained("dora")
    path = tmp_path / "lora.safetensors"
    Adapter(model.unet).save_kohya(path, {})
    file, base = load_file(path), load_model("tiny").unet.state_dict()
    Adapter(model.unet).merge()
    layers = [key.removesuffix(".dora_scale") for key in file if key.endswith(".dora_scale")]
    weights = {f"lora_unet_{name.removesuffix('.weight').replace('.', '_')}": name for name in base}
    for layer in layers:
        weight = base[weights[layer]]
        up, down, scale = (file[f"{layer}.{name}"] for name in ("lora_up.weight", "lora_down.weight", "dora_scale"))
        assert scale.shape == (len(weight), *[1] * (weight.ndim - 1))
        summed = weight + (up.flatten(1) @ down.flatten(1)).reshape(weight.shape) * file[f"{layer}.alpha"] / len(down)
        norms = weight.flatten(1).norm(dim=1).reshape(scale.shape)
        trained_weight = model.unet.state_dict()[weights[layer]]
        assert torch.allclose(summed * scale / norms, trained_weight, rtol=1e-4, atol=1e-6)
    assert len(layers) > 20
    with safe_open(path, "pt") as opened:
        assert '"wd_on_output": true' in opened.metadata()["ss_network_args"]


def test_a_dora_for_comfyui_is_not_written_for_diffusers(tmp_path: Path) -> None:
    path = tmp_path / "lora.safetensors"
    adapter = Adapter(trained("dora").unet)
    adapter.save_kohya(path, {})
    unet = load_model("tiny").unet
    found = read_lora(path, layer_names(unet.config, unet.state_dict()))
    with pytest.raises(ModelError, match="written for ComfyUI and Forge; give the file that the run wrote for diffuse"):
        write_peft(tmp_path / "other.safetensors", found)


QUICK = [("lora", "kohya"), ("loha", "kohya"), ("dora", "peft")]
LAYOUTS = [pytest.param(kind, layout, marks=[] if (kind, layout) in QUICK else pytest.mark.slow)
           for kind in NAMES for layout in ("kohya", "peft")]  # fmt: skip


@pytest.mark.parametrize(("kind", "layout"), LAYOUTS)
def test_one_goes_on_from_a_file_whatever_its_alpha(kind: Kind, layout: str, tmp_path: Path) -> None:
    model = trained(kind)
    export(model, tmp_path / "first")
    file = tmp_path / "first" / ("first.safetensors" if layout == "kohya" else "pytorch_lora_weights.safetensors")
    other = load_model("tiny")
    add_lora(other.unet, rank=4, alpha=8, target_modules=TARGETS, kind=kind)
    assert Adapter(other.unet).init_from(file) == 0
    assert torch.allclose(answer(other.unet), answer(model.unet), rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["dora", "lokr"])
def test_a_run_of_another_kind_trains_and_draws(
    kind: Kind, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = TrainConfig(
        data=str(pictures), output_dir=str(tmp_path / "out"), max_train_steps=2, lora_type=kind, rank=4,
        learning_rate=0.01, num_inference_steps=0, lora_target_modules=TARGETS,
    )  # fmt: skip
    out = fine_tune(config)
    metadata = capsys.readouterr().out
    assert f"{NAMES[kind]}, rank 4, alpha 4" in metadata
    assert ("finetune.load_lora(pipeline.unet" in metadata) == (kind == "lokr")
    sample.run(sample.Options(model=str(out), prompt=("a red disc",), num_inference_steps=2))
    assert (out / "samples/a-red-disc-0.png").is_file()


def test_a_dora_has_a_file_for_each_program(pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A1111 divides by the norms of columns, which no DoRA of peft has, so a checkpoint is merged for it."""
    base = write_single_file(tmp_path / "base.safetensors", "sd15")
    fine_tune(
        TrainConfig(
            model=str(base), tokenizer=str(tiny_folder() / "tokenizer"), data=str(pictures), resolution=64, rank=2,
            output_dir=str(tmp_path / "dog"), max_train_steps=1, num_inference_steps=0, lora_type="dora",
            lora_target_modules=["to_q"],
        )
    )  # fmt: skip
    said = capsys.readouterr().out
    assert re.search(r"^diffusers +pipeline\.load_lora_weights", said, re.M)
    assert re.search(r"^ComfyUI +copy .*dog\.safetensors to models/loras", said, re.M)
    assert re.search(r"^Forge +copy it to models/Lora", said, re.M)
    assert re.search(r"^A1111 +finetune-unet export --run .* --format single-file", said, re.M)


def test_layers_that_not_every_program_loads_are_named_before_training(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shared = {"data": str(pictures), "max_train_steps": 1, "num_inference_steps": 0}
    fine_tune(TrainConfig(output_dir=str(tmp_path / "dog"), lora_target_modules=["to_q", "conv_in"], **shared))
    said = "1 adapted layer outside of the UNet's blocks (conv_in): diffusers before 0.40 does not load them from dog."
    assert said in capsys.readouterr().out
    fine_tune(TrainConfig(output_dir=str(tmp_path / "cat"), lora_target_modules=["to_q"], **shared))
    assert "outside of the UNet's blocks" not in capsys.readouterr().out


def test_a_dropout_that_a_kind_has_not_is_refused(pictures: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="lora_dropout cannot be used here: it needs lora_type lora, rslora or dora"):
        fine_tune(TrainConfig(data=str(pictures), output_dir=str(tmp_path), lora_type="loha", lora_dropout=0.1))


def test_norms_of_inputs_are_merged_by_column_and_kept_out_of_pefts_layout(tmp_path: Path) -> None:
    names = {"conv_in": "conv_in"}
    down, up, scale = torch.ones(1, 2), torch.tensor([[1.0], [2.0]]), torch.tensor([[10.0, 20.0]])
    state = {"lora_unet_conv_in.dora_scale": scale, "lora_unet_conv_in.alpha": torch.tensor(1.0)}
    state |= {"lora_unet_conv_in.lora_down.weight": down, "lora_unet_conv_in.lora_up.weight": up}
    found = LoraFile(*from_kohya(state, names), 0, "kohya")
    assert found.kind == "dora"
    merged = changed(torch.zeros(2, 2), found.layers()["conv_in"], 1.0)
    assert torch.allclose(merged.norm(dim=0), scale.flatten())
    assert torch.allclose(merged[:, 0] / merged[0, 0], torch.tensor([1.0, 2.0]))
    assert torch.equal(to_kohya(found.tensors, found.alphas, names)["lora_unet_conv_in.dora_scale"], scale)
    with pytest.raises(ModelError, match="a norm for each input, where peft's has one for each output"):
        write_peft(tmp_path / "a.safetensors", found)


def test_updates_are_those_of_the_definitions() -> None:
    """Worked out by hand: alpha 1 on rank 2, so half of each product."""
    a, b = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[5.0, 6.0], [7.0, 8.0]])
    product = torch.tensor([[19.0, 22.0], [43.0, 50.0]])
    zero = torch.zeros(2, 2)
    lora = {"lora_B.weight": a, "lora_A.weight": b}
    assert torch.equal(changed(zero, lora, 1.0), product / 2)
    assert torch.equal(changed(zero, lora, None, strength=0.5), product / 2)
    loha = {"hada_w1_a": a, "hada_w1_b": b, "hada_w2_a": a, "hada_w2_b": b}
    assert torch.equal(changed(zero, loha, 1.0), product * product / 2)
    lokr = {"lokr_w1": torch.tensor([[1.0, 2.0]]), "lokr_w2_a": a, "lokr_w2_b": b}
    assert torch.equal(changed(torch.zeros(2, 4), lokr, 1.0), torch.cat([product / 2, product], dim=1))
    dora = lora | {"lora_magnitude_vector": torch.tensor([1.0, 2.0])}
    rows = changed(zero, dora, 1.0).norm(dim=1)
    assert torch.allclose(rows, torch.tensor([1.0, 2.0]))
    assert LoraFile({"unet.x.lora_A.weight": b}, {}, 0).layers() == {"x": {"lora_A.weight": b}}


@pytest.mark.parametrize("kind", ["lora", "dora", "loha", "lokr"])
def test_blocks_have_ranks_of_their_own_and_files_keep_them(kind: Kind, tmp_path: Path) -> None:
    model = load_model("tiny")
    ranks = {"up_blocks": 8, "up_blocks.0": 2, "mid_block.attentions": 6}
    add_lora(model.unet, rank=4, alpha=2, target_modules=TARGETS, kind=kind, block_ranks=ranks)
    for parameter in trainable(model.unet):
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    found = LoraFile(Adapter(model.unet).state(), Adapter(model.unet).alphas(), 0)
    for layer, rank in found.ranks().items():
        fitting = [begin for begin in ranks if layer.startswith(begin)]
        expected = ranks[max(fitting, key=len)] if fitting else 4
        if rank is not None:
            assert rank == expected, layer
            assert found.alphas[layer] == 2
    assert export(model, tmp_path / "discs") < 1e-5


def test_blocks_and_matrices_learn_at_rates_of_their_own(pictures: Path, tmp_path: Path) -> None:
    config = TrainConfig(
        data=str(pictures), output_dir=str(tmp_path / "out"), max_train_steps=1, num_inference_steps=0,
        lr_warmup_steps=0, lora_target_modules=TARGETS, learning_rate=1e-3, use_ema=False, adam_weight_decay=0.0,
        block_learning_rate=["up=2", "up_blocks.0=4"], loraplus_lr_ratio=8,
    )  # fmt: skip
    out = fine_tune(config)
    learned = load_file(out / "pytorch_lora_weights.safetensors")
    largest = {key: tensor.abs().max().item() for key, tensor in learned.items() if "lora_B" in key}
    assert len(largest) == len(learned) / 2
    for key, value in largest.items():  # from zero, Adam's first step is the rate itself
        factor = 4 if ".up_blocks.0." in key else 2 if "unet.up" in key else 1
        assert value == pytest.approx(8e-3 * factor, rel=0.02), key


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"block_rank": ["up=x"]}, r"block_rank up=x: expected BLOCK=NUMBER"),
        ({"block_rank": ["op=4"]}, r"no layer begins like that; the UNet's blocks: conv_in, .*down_blocks\.0"),
        ({"block_rank": ["up=0.5"]}, "a rank is a whole number"),
        ({"block_rank": ["up=2"], "lora_type": "rslora"}, "with rslora each rank has an alpha of its own"),
        ({"block_learning_rate": ["up=2"], "optimizer": "prodigy"}, "it needs an optimizer other than prodigy"),
        ({"loraplus_lr_ratio": 16, "method": "full"}, "it needs LoRA or DoRA"),
    ],
)
def test_numbers_by_block_that_cannot_be_are_told(options: dict, message: str, pictures: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message):
        fine_tune(TrainConfig(data=str(pictures), output_dir=str(tmp_path / "out"), num_inference_steps=0, **options))


def test_a_lokr_of_a_given_factor_with_a_whole_larger_factor_is_proved_and_loaded(tmp_path: Path) -> None:
    model = load_model("tiny")
    add_lora(model.unet, rank=10_000, alpha=1, target_modules=["to_q"], kind="lokr", lokr_factor=4)
    source = torch.Generator().manual_seed(1)
    for parameter in trainable(model.unet):
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=source)
    export(model, tmp_path)
    layer, module = next(pair for pair in load_model("tiny").unet.named_modules() if pair[0].endswith("to_q"))
    assert isinstance(module, nn.Linear)
    saved = load_file(next(path for path in tmp_path.glob("*.safetensors") if path.stem != "pytorch_lora_weights"))
    key = f"lora_unet_{layer.replace('.', '_')}"
    assert saved[f"{key}.lokr_w1"].shape == (4, 4)
    assert saved[f"{key}.lokr_w2"].shape == (module.in_features // 4, module.in_features // 4)
    loaded = load_model("tiny").unet
    load_lora(loaded, tmp_path)
    assert torch.allclose(answer(loaded), answer(model.unet), rtol=0, atol=1e-5)
