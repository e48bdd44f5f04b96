"""Checkpoints in one file that lack a part, name it otherwise, or say in words what they predict."""

from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from torch import Tensor

from finetune.errors import ModelError
from finetune.models.loading import load_model
from finetune.models.model_info import locate
from finetune.models.single_file import inspect
from tests.models.test_single_file import TOKENIZER, equal, files, global_generator_untouched  # noqa: F401

State = dict[str, Tensor]


def rewritten(source: Path, to: Path, change: Callable[[State], State], **said: str) -> Path:
    tensors = change(load_file(source))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, to, said or None)
    return to


def test_a_file_without_a_vae_is_trained_with_another(files: dict[str, Path], tmp_path: Path) -> None:  # noqa: F811
    def without(state: State) -> State:
        return {name: tensor for name, tensor in state.items() if not name.startswith("first_stage")}

    def alone(state: State) -> State:
        start = "first_stage_model."
        return {name.removeprefix(start): tensor for name, tensor in state.items() if name.startswith(start)}

    path = rewritten(files["sd15"], tmp_path / "a.safetensors", without)
    vae = rewritten(files["sd15"], tmp_path / "vae.safetensors", alone)
    with pytest.raises(ModelError, match=r"the file has no VAE; give one with --vae"):
        load_model(path, tokenizer=TOKENIZER)
    given = load_model(path, tokenizer=TOKENIZER, vae=str(vae)).pipeline().vae
    own = load_model(files["sd15"], tokenizer=TOKENIZER).pipeline().vae
    assert equal(given.state_dict(), own.state_dict())
    assert given.config["scaling_factor"] == own.config["scaling_factor"]
    with pytest.raises(ModelError, match="no VAE in the layout of Stable Diffusion"):
        load_model(path, tokenizer=TOKENIZER, vae=str(path))


def test_the_newer_names_of_a_vaes_attention_are_read(files: dict[str, Path], tmp_path: Path) -> None:  # noqa: F811
    newer = {".q.": ".to_q.", ".k.": ".to_k.", ".v.": ".to_v.", ".proj_out.": ".to_out.0.", ".norm.": ".group_norm."}

    def rename(name: str) -> str:
        for old, new in newer.items() if ".mid.attn_1." in name else ():
            name = name.replace(old, new)
        return name

    path = rewritten(files["sd15"], tmp_path / "a.safetensors", lambda state: {rename(k): t for k, t in state.items()})
    models = [load_model(place, tokenizer=TOKENIZER).pipeline().vae.state_dict() for place in (path, files["sd15"])]
    assert equal(*models)


@pytest.mark.parametrize(
    ("said", "predicts"),
    [
        ({"modelspec.prediction_type": "v"}, "v_prediction"),
        ({"ss_v_parameterization": "True"}, "v_prediction"),
        ({"modelspec.prediction_type": "epsilon"}, "epsilon"),
    ],
)
@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_what_the_metadata_say_is_predicted(
    files: dict[str, Path],  # noqa: F811
    tmp_path: Path,
    family: str,
    said: dict[str, str],
    predicts: str,
) -> None:
    path = rewritten(files[family], tmp_path / "a.safetensors", dict, **said)
    assert inspect(path).prediction_type == predicts


def test_what_is_missing_is_named(files: dict[str, Path], tmp_path: Path) -> None:  # noqa: F811
    first, second = "conditioner.embedders.0.", "conditioner.embedders.1."
    changes: dict[str, Callable[[State], State]] = {
        "a checkpoint of XL without its first text encoder": lambda state: {
            name: tensor for name, tensor in state.items() if not name.startswith(first)
        },
        "XL's refiner, which has another text encoder": lambda state: {
            name.replace(second, first): tensor for name, tensor in state.items() if not name.startswith(first)
        },
        "averaged .EMA. weights alone": lambda state: {
            name.replace("model.diffusion_model.", "model_ema."): tensor
            for name, tensor in state.items()
            if name.startswith("model.diffusion_model.")
        },
    }
    for what, change in changes.items():
        path = rewritten(files["sdxl"], tmp_path / "a.safetensors", change)
        with pytest.raises(ModelError, match=f"{path}: {what}, not a checkpoint of Stable Diffusion"):
            locate(str(path))


def test_heads_are_as_many_as_the_width_between_says() -> None:
    from finetune.models.ldm_keys import UNET
    from finetune.models.single_file import _Blocks, _heads

    blocks = _Blocks([64, 128, 256], [[0, 0], [2, 2], [10, 10]], 10, [[10] * 3, [2] * 3, [0] * 3])
    shapes = {
        f"{UNET}input_blocks.4.1.proj_in.weight": (120, 128),
        f"{UNET}input_blocks.7.1.proj_in.weight": (240, 256),
    }
    assert _heads(shapes, blocks) == [1, 10, 20]
    assert _heads({}, blocks) == [1, 2, 4]
