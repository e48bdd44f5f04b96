import json
from pathlib import Path

import pytest
import torch
from diffusers import DDPMScheduler, StableDiffusionPipeline
from safetensors.torch import load_file, save_file

from finetune.errors import ModelError, UsageError
from finetune.models.loading import load_model
from finetune.models.tensor_file import NUMBER_FORMATS
from finetune.models.tiny import tiny_folder
from finetune.models.weights import read_tensors
from tests.tiny_copy import copy_tiny


@pytest.fixture(scope="module")
def v_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "v"
    copy_tiny(folder, prediction_type="v_prediction")
    return folder


def test_frozen_parts_are_frozen_and_in_eval_mode() -> None:
    model = load_model("tiny")
    for module in (model.encoder.vae, model.conditioner.text_encoder):
        assert not any(parameter.requires_grad for parameter in module.parameters())
        assert not module.training


def test_the_prediction_type_comes_from_the_scheduler_unless_overridden(v_model: Path) -> None:
    assert load_model(v_model).scheduler.config["prediction_type"] == "v_prediction"
    overridden = load_model(v_model, prediction_type="sample")
    assert overridden.scheduler.config["prediction_type"] == "sample"
    assert overridden.pipeline().scheduler.config["prediction_type"] == "sample"


def test_the_training_schedule_is_a_ddpm_scheduler_and_the_pipeline_keeps_its_own(v_model: Path) -> None:
    model = load_model(v_model)
    assert type(model.scheduler) is DDPMScheduler
    own = model.pipeline().scheduler
    assert type(own).__name__ == "DDIMScheduler"
    assert torch.equal(own.alphas_cumprod, model.scheduler.alphas_cumprod)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_unet_holds_what_diffusers_loads(dtype: torch.dtype) -> None:
    ours = load_model("tiny", dtype=dtype).unet.state_dict()
    theirs = StableDiffusionPipeline.from_pretrained(tiny_folder()).unet.to(dtype).state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) and tensor.dtype == dtype for name, tensor in ours.items())


@pytest.mark.parametrize(("resolution", "millions"), [(128, 113.673219), (64, 17.217923), (32, 17.217923)])
def test_ddpm_from_scratch_has_the_tutorials_architecture_at_128_and_a_small_one_below(
    resolution: int, millions: float
) -> None:
    with torch.device("meta"):
        unet = load_model("ddpm", resolution=resolution).unet
    assert sum(parameter.numel() for parameter in unet.parameters()) / 1e6 == millions
    assert unet.config["sample_size"] == resolution
    if resolution == 128:
        assert unet.config["block_out_channels"] == (128, 128, 256, 256, 512, 512)
        assert unet.config["down_block_types"].index("AttnDownBlock2D") == 4
        assert unet.config["up_block_types"].index("AttnUpBlock2D") == 1


def test_a_seed_decides_the_initial_weights() -> None:
    def first(seed: int) -> torch.Tensor:
        return next(load_model("ddpm", resolution=32, seed=seed).unet.parameters())

    assert torch.equal(first(1), first(1))
    assert not torch.equal(first(1), first(2))


def test_a_ddpm_folder_is_continued(tmp_path: Path) -> None:
    model = load_model("ddpm", resolution=32)
    model.pipeline().save_pretrained(tmp_path)
    again = load_model(tmp_path)
    assert again.family.name == "ddpm"
    assert all(torch.equal(t, again.unet.state_dict()[n]) for n, t in model.unet.state_dict().items())


@pytest.mark.parametrize(
    ("model", "resolution", "message"),
    [
        ("tiny", 65, "takes multiples of 8 pixels; the nearest: 64 and 72"),
        ("ddpm", 60, "takes multiples of 8 pixels; the nearest: 56 and 64"),
        ("ddpm", 100, "takes multiples of 32 pixels; the nearest: 96 and 128"),
        ("ddpm", 4, "the nearest: 8"),
    ],
)
def test_a_resolution_that_does_not_fit_names_the_nearest(model: str, resolution: int, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        load_model(model, resolution=resolution)


def test_damaged_weights_and_weights_of_another_shape_are_named(tmp_path: Path) -> None:
    copy_tiny(tmp_path)
    path = tmp_path / "unet/diffusion_pytorch_model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    with pytest.raises(ModelError, match="is damaged"):
        load_model(tmp_path)
    path.write_bytes(whole)
    config = tmp_path / "unet/config.json"
    config.write_text(config.read_text().replace('"cross_attention_dim": 96', '"cross_attention_dim": 64'))
    with pytest.raises(ModelError, match=r"weights do not fit the config: .*attn2.to_k.weight is \(\d+, 96\)"):
        load_model(tmp_path)


@pytest.mark.parametrize("part", ["vae/diffusion_pytorch_model", "text_encoder/model"])
def test_damaged_frozen_parts_are_one_line(tmp_path: Path, part: str) -> None:
    copy_tiny(tmp_path)
    path = tmp_path / f"{part}.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ModelError, match="cannot be loaded: ") as caught:
        load_model(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_unet_with_other_inputs_is_refused(tmp_path: Path) -> None:
    copy_tiny(tmp_path)
    config = tmp_path / "unet/config.json"
    config.write_text(config.read_text().replace('"in_channels": 4', '"in_channels": 5'))  # a depth map, it may be
    with pytest.raises(ModelError, match="its UNet takes 5 channels and its VAE gives 4; UNets that take more"):
        load_model(tmp_path)


def test_pickled_weights_are_not_read(tmp_path: Path) -> None:
    copy_tiny(tmp_path)
    path = tmp_path / "unet/diffusion_pytorch_model.safetensors"
    path.rename(path.with_suffix(".bin"))
    with pytest.raises(ModelError, match=r"part missing: diffusion_pytorch_model.safetensors"):
        load_model(tmp_path)


def test_a_scheduler_class_of_ones_own_is_refused_and_not_imported(tmp_path: Path) -> None:
    copy_tiny(tmp_path)
    path = tmp_path / "scheduler/scheduler_config.json"
    path.write_text(path.read_text().replace("DDIMScheduler", "MyScheduler"))
    with pytest.raises(
        ModelError, match="MyScheduler may be another noise process than is trained here; known schedulers are DDPM, "
    ):
        load_model(tmp_path)


def test_another_vae_takes_the_place_of_the_models_own(tmp_path: Path) -> None:
    copy_tiny(tmp_path / "other")
    weights = tmp_path / "other/vae/diffusion_pytorch_model.safetensors"
    other = {name: tensor + 0.01 for name, tensor in load_file(weights).items()}
    save_file(other, weights)
    for folder in ("other", "other/vae"):
        changed = load_model("tiny", vae=str(tmp_path / folder)).pipeline().vae.state_dict()
        assert all(torch.equal(tensor.float(), changed[name]) for name, tensor in other.items())
    with pytest.raises(ModelError, match=r"no config\.json there, nor in vae/"):
        load_model("tiny", vae=str(tmp_path))
    config = tmp_path / "other/vae/config.json"
    config.write_text(config.read_text().replace('"latent_channels": 4', '"latent_channels": 16'))
    with pytest.raises(ModelError, match=r"cannot be loaded|it has 16 latent channels, the model needs 4"):
        load_model("tiny", vae=str(tmp_path / "other"))


@pytest.mark.parametrize("dtype", list(NUMBER_FORMATS.values()), ids=str)
def test_tensors_are_read_as_safetensors_reads_them(tmp_path: Path, dtype: torch.dtype) -> None:
    numbers = torch.arange(-12, 12).view(2, 3, 4)
    tensors = {"a": numbers.to(dtype), "none": numbers[:0].to(dtype).clone(), "one": numbers[1, 0, 2].to(dtype).clone()}
    save_file(tensors, tmp_path / "a.safetensors")
    read = dict(read_tensors(tmp_path / "a.safetensors"))
    theirs = load_file(tmp_path / "a.safetensors")
    assert read.keys() == theirs.keys()
    for name, tensor in read.items():
        assert (tensor.dtype, tensor.shape) == (dtype, theirs[name].shape)
        assert tensor.flatten().view(torch.uint8).equal(theirs[name].flatten().view(torch.uint8))
    assert [name for name, _ in read_tensors(tmp_path / "a.safetensors", ["one", "a", "one"])] == ["one", "a", "one"]


@pytest.mark.parametrize(
    ("entries", "size"),
    [
        ({"a": ("F32", [2], [0, 8]), "b": ("F32", [2], [4, 12])}, 12),
        ({"a": ("F32", [3], [0, 8])}, 8),
        ({"a": ("F32", [2], [0, 8]), "b": ("F32", [1], [12, 16])}, 16),
        ({"a": ("F99", [2], [0, 8])}, 8),
        ({"a": ("F32", [-2], [0, 8])}, 8),
    ],
    ids=["overlap", "a shape of another size", "a hole", "an unknown format", "a negative size"],
)
def test_tensors_that_lie_where_they_cannot_are_not_read(
    tmp_path: Path, entries: dict[str, tuple[str, list[int], list[int]]], size: int
) -> None:
    header = json.dumps(
        {name: {"dtype": kind, "shape": shape, "data_offsets": place} for name, (kind, shape, place) in entries.items()}
    ).encode()
    path = tmp_path / "a.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(size))
    with pytest.raises(ModelError, match=r"a\.safetensors is damaged"):
        dict(read_tensors(path))


@pytest.mark.parametrize(
    ("part", "name"),
    [
        ("vae", "encoder.mid_block.attentions.0.to_q.weight"),
        ("text_encoder", "embeddings.token_embedding.weight"),
    ],
)
def test_a_frozen_part_that_lacks_a_tensor_is_refused(part: str, name: str, tmp_path: Path) -> None:
    """Libraries fill it with random numbers, others at each start."""
    copy_tiny(tmp_path)
    (path,) = (tmp_path / part).glob("*.safetensors")
    tensors = {key: tensor for key, tensor in load_file(path).items() if not key.endswith(name)}
    save_file(tensors, path, {"format": "pt"})
    missing = rf"{part}: 1 tensors are missing, such as {name}"
    with torch.random.fork_rng(devices=[]), pytest.raises(ModelError, match=missing):  # transformers draws before
        load_model(tmp_path)


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        (
            "scheduler/scheduler_config.json",
            {"_class_name": "FlowMatchEulerDiscreteScheduler", "use_dynamic_shifting": True},
            "use_dynamic_shifting is true",
        ),
        ("scheduler/scheduler_config.json", {"_class_name": "FlowMatchHeunDiscreteScheduler"}, "Heun.* may be another"),
        ("scheduler/scheduler_config.json", {"_class_name": "EDMEulerScheduler"}, "EDMEulerScheduler may be another"),
        (
            "scheduler/scheduler_config.json",
            {"_class_name": "EDMDPMSolverMultistepScheduler"},
            "EDMDPM.* may be another",
        ),
        (
            "scheduler/scheduler_config.json",
            {"prediction_type": "flow_prediction"},
            "use_flow_sigmas is false and prediction_type is flow_prediction",
        ),
        ("scheduler/scheduler_config.json", {"prediction_type": "edm"}, "prediction_type is edm"),
        ("scheduler/scheduler_config.json", {"use_flow_sigmas": True}, "use_flow_sigmas is true and .* is epsilon"),
        ("vae/config.json", {"latents_mean": [0.0] * 4}, "latents_mean is set"),
        ("vae/config.json", {"latents_std": [1.0] * 4}, "latents_std is set"),
        ("vae/config.json", {"_class_name": "AsymmetricAutoencoderKL"}, "AsymmetricAutoencoderKL is not known"),
        ("text_encoder/config.json", {"model_type": "chatglm"}, "chatglm is not known"),
    ],
)
def test_a_model_of_another_noise_process_or_kind_is_refused_by_name(
    tmp_path: Path, file: str, change: dict[str, object], message: str
) -> None:
    copy_tiny(tmp_path)
    path = tmp_path / file
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ModelError, match=rf"^--model .*: {file}: .*{message}"):
        load_model(tmp_path)
