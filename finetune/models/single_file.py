"""A checkpoint in one `.safetensors` file: its family and configs, from its header alone. Free of torch.

The configs that a diffusers folder would have are derived from the shapes of the tensors, so that nothing is asked of
the hub.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from finetune.errors import ModelError
from finetune.models.ldm_keys import UNET, VAE

Shapes = Mapping[str, tuple[int, ...]]

LARGEST_HEADER = 100_000_000
"""Bytes that safetensors allows a header."""

CLIP = {
    "sd15": "cond_stage_model.transformer.",
    "sd21": "cond_stage_model.model.",
    "sdxl": "conditioner.embedders.0.transformer.",
}
"""Family -> what the keys of its first text encoder begin with."""
OPENCLIP_XL = "conditioner.embedders.1.model."
V_PREDICTION, ZERO_TERMINAL_SNR = "v_pred", "ztsnr"
"""Empty tensors by which an SDXL checkpoint says how it was trained, for ComfyUI and A1111."""

_BETAS = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
_VELOCITY_MARK = UNET + "output_blocks.11.1.transformer_blocks.0.norm1.bias"
_OTHERS = (
    ("double_blocks.", "a FLUX checkpoint"),
    ("joint_blocks.", "a Stable Diffusion 3 checkpoint"),
    ("lora_", "a LoRA; give its base model"),
    (".hada_w1", "a LoHa; give its base model"),
    (".lokr_w", "a LoKr; give its base model"),
    ("model_ema.", "averaged (EMA) weights alone"),
    ("input_blocks.0.0.weight", "a UNet without its text encoder and VAE"),
    ("down_blocks.0.resnets", "a part of a diffusers folder; give the folder"),
    ("decoder.up.0.block", "a VAE"),
    ("emb_params", "a textual inversion"),
)
"""What a key holds -> what such a file is."""


@dataclass(frozen=True)
class Checkpoint:
    """What is in a file."""

    path: Path
    family: str
    shapes: Shapes
    prediction_type: str
    prediction_stated: bool
    """Whether the file, or its family, says what the UNet predicts; an XL checkpoint without a mark is of any kind."""
    configs: Mapping[str, Mapping[str, Any]]
    """Part -> the config that a diffusers folder would have for it."""


def read_header(path: Path) -> dict[str, Any]:
    """The header of a safetensors file: tensor -> dtype, shape, data_offsets. Raises ModelError for a broken one."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or not 2 <= length <= min(LARGEST_HEADER, size - 8):
                raise ModelError(
                    f"{path} is not a safetensors file, or is truncated: its header would have {length} bytes"
                )
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        ends = [entry["data_offsets"][1] for entry in header.values()]
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise ModelError(f"{path} is not a readable safetensors file: {error!r}") from error
    if not ends or max(ends) + 8 + length != size:
        raise ModelError(f"{path} is truncated, or holds no tensors: {size} bytes")
    return header


def inspect(path: Path, option: str = "--model") -> Checkpoint:
    """What the file is, which `option` names. Raises ModelError for one that is broken, or of another kind."""
    header = read_header(path)
    shapes = {name: tuple(entry.get("shape", ())) for name, entry in header.items()}
    family = next((name for name, prefix in CLIP.items() if any(key.startswith(prefix) for key in shapes)), None)
    if family is None or UNET + "input_blocks.0.0.weight" not in shapes:
        raise ModelError(f"{option} {path}: {_what_it_is(shapes)}, not a checkpoint of Stable Diffusion 1, 2 or XL")
    if family == "sdxl" and f"{OPENCLIP_XL}text_projection" not in shapes:
        raise ModelError(f"{option} {path}: a checkpoint of XL without its second text encoder")
    said = _said_prediction(path)
    velocity = (family == "sdxl" and V_PREDICTION in shapes) or (family == "sd21" and not said and spread_of_v(path))
    # a mark counts more than metadata, which merges of models inherit
    prediction_type = "v_prediction" if velocity and said != "flow" else said or "epsilon"
    stated = said is not None or family != "sdxl" or V_PREDICTION in shapes
    configs = _configs(path, shapes, family, prediction_type, ZERO_TERMINAL_SNR in shapes)
    return Checkpoint(
        path=path,
        family=family,
        shapes=shapes,
        prediction_type=prediction_type,
        prediction_stated=stated,
        configs=configs,
    )


def _what_it_is(shapes: Shapes) -> str:
    """A file that is no checkpoint that can be trained, in words."""
    if UNET + "input_blocks.0.0.weight" in shapes:
        vae = "" if VAE + "encoder.conv_in.weight" in shapes else " and VAE"
        if any(key.startswith("conditioner.embedders.1.") for key in shapes):
            return f"a checkpoint of XL without its first text encoder{vae}"
        if any(key.startswith("conditioner.embedders.0.model.") for key in shapes):
            return "XL's refiner, which has another text encoder"
        return f"a UNet without its text encoder{vae}"
    return next((what for part, what in _OTHERS if any(part in key for key in shapes)), "a file of unknown kind")


def _said_prediction(path: Path) -> str | None:
    """What the UNet predicts by the file's metadata, as trainers and mergers write them; None: they do not say."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        metadata = json.loads(file.read(length)).get("__metadata__") or {}
    if metadata.get("ss_v_parameterization") == "True":
        return "v_prediction"
    said = metadata.get("modelspec.prediction_type", "")
    return {"v": "v_prediction"}.get(said, said if said in ("epsilon", "v_prediction", "sample", "flow") else None)


def spread_of_v(path: Path) -> bool:
    """Whether one bias of a UNet of Stable Diffusion 2 spreads as that of its model of v, by which ComfyUI knows it."""
    entry = read_header(path).get(_VELOCITY_MARK)
    return entry is not None and bool(_values(path, entry).std() > 0.09)


def _values(path: Path, entry: Mapping[str, Any]) -> np.ndarray[Any, Any]:
    """The numbers of one small tensor, fp32."""
    with path.open("rb") as file:
        start = 8 + int.from_bytes(file.read(8), "little")
        begin, end = entry["data_offsets"]
        file.seek(start + begin)
        content = file.read(end - begin)
    if entry["dtype"] == "BF16":
        return (np.frombuffer(content, np.uint16).astype(np.uint32) << 16).view(np.float32)
    return np.frombuffer(content, {"F16": np.float16, "F32": np.float32, "F64": np.float64}[entry["dtype"]]) * 1.0


def _configs(
    path: Path, shapes: Shapes, family: str, prediction_type: str, zero_snr: bool
) -> dict[str, dict[str, Any]]:
    configs = {
        "unet": _unet(path, shapes, family, prediction_type),
        "vae": _vae(shapes, family),
        "scheduler": _scheduler(family, prediction_type, zero_snr),
    }
    if family == "sd21":
        configs["text_encoder"] = _openclip(shapes, CLIP[family], dropped=1)  # the last block is never used
    else:
        configs["text_encoder"] = _clip(shapes, CLIP[family])
    if family == "sdxl":
        configs["text_encoder_2"] = _openclip(shapes, OPENCLIP_XL, dropped=0)
    return configs


def _unet(path: Path, shapes: Shapes, family: str, prediction_type: str) -> dict[str, Any]:
    xl, blocks = family == "sdxl", _Blocks.read(path, shapes)
    cross = next(shape[1] for name, shape in shapes.items() if name.endswith("attn2.to_k.weight"))
    config: dict[str, Any] = {
        "_class_name": "UNet2DConditionModel",
        "in_channels": shapes[UNET + "input_blocks.0.0.weight"][1],
        "out_channels": 4,
        "cross_attention_dim": cross,
        "attention_head_dim": 8 if family == "sd15" else _heads(shapes, blocks),
        "use_linear_projection": family != "sd15",
        "sample_size": 128 if xl else 96 if family == "sd21" and prediction_type == "v_prediction" else 64,
        **blocks.config(),
    }
    if xl:
        added = shapes[UNET + "label_emb.0.0.weight"][1]
        pooled = shapes[OPENCLIP_XL + "text_projection"][1]
        config |= {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": (added - pooled) // 6,
            "projection_class_embeddings_input_dim": added,
        }
    return config


def _heads(shapes: Shapes, blocks: "_Blocks") -> list[int]:
    """How many heads the attention of each level has: of 64 numbers, or as many as the width between says."""
    heads = list[int]()
    for level, channels in enumerate(blocks.channels):
        first = 1 + level * (len(blocks.down[0]) + 1)
        inner = shapes.get(f"{UNET}input_blocks.{first}.1.proj_in.weight", (channels,))[0]
        heads.append(_heads_by_width(channels, inner))
    return heads


def _heads_by_width(channels: int, inner: int) -> int:
    usual = channels // 64
    return usual if inner == channels else next((h for h in range(1, inner + 1) if channels // h * h == inner), usual)


def heads_in_one_file(layout: str, unet: Mapping[str, Any]) -> tuple[list[int], list[int]]:
    """Heads of each level with attention that a UNet has, and that readers of its checkpoint in one file give it.

    The file records no heads. Readers assume 8 (Stable Diffusion 1) or heads of 64 numbers (2, XL).

    Args:
        layout: "sd15", "sd21" or "sdxl".
        unet: its config in a diffusers folder, where `attention_head_dim` is the number of heads.
    """
    channels, has = unet["block_out_channels"], unet.get("num_attention_heads") or unet["attention_head_dim"]
    heads = [has] * len(channels) if isinstance(has, int) else list(has)
    attended = ["Attn" in kind for kind in unet["down_block_types"]]
    levels = [pair for pair, attends in zip(zip(channels, heads, strict=True), attended, strict=True) if attends]
    read = [8 if layout == "sd15" else _heads_by_width(width, width // count * count) for width, count in levels]
    return [count for _, count in levels], read


@dataclass(frozen=True)
class _Blocks:
    """How a UNet is built: that of Stable Diffusion, or of one of its distilled relatives with fewer blocks."""

    channels: list[int]
    """Of each level, from the picture down."""
    down: list[list[int]]
    """Level -> how many transformers follow one another in each of its layers; 0: it has no attention."""
    middle: int | None
    """The same of the middle; None: there is no middle."""
    up: list[list[int]]
    """The same on the way up, from the lowest level on."""

    @classmethod
    def read(cls, path: Path, shapes: Shapes) -> "_Blocks":
        """Read from the keys. Raises ModelError where levels are built so that diffusers has no config for them."""
        inside = [key.removeprefix(UNET) for key in shapes if key.startswith(UNET)]
        places = {".".join(key.split(".")[:2]) for key in inside}
        depths = {place: _depth(inside, place) for place in places}
        channels: list[int] = []
        down: list[list[int]] = [[]]
        for number in range(1, sum(place.startswith("input_blocks.") for place in places)):
            place = f"input_blocks.{number}"
            if f"{UNET}{place}.0.op.weight" in shapes:
                down.append([])
                continue
            if not down[-1]:
                channels.append(shapes.get(f"{UNET}{place}.0.out_layers.3.weight", (0,))[0])
            down[-1].append(depths.get(place, 0))
        count = sum(place.startswith("output_blocks.") for place in places)
        outputs = [depths.get(f"output_blocks.{number}", 0) for number in range(count)]
        layers = len(down[0])
        up = [outputs[start : start + layers + 1] for start in range(0, len(outputs), layers + 1)]
        middle = None if "middle_block.0" not in places else _depth(inside, "middle_block")
        has_attention = (
            middle != 0 or "middle_block.2" not in places
        )  # diffusers has one residual block there, or all three
        blocks = cls(channels, down, middle, up)
        regular = all(len(level) == layers for level in down) and all(len(level) == layers + 1 for level in up)
        same = all(len({depth > 0 for depth in level}) == 1 for level in (*down, *up))
        as_deep = middle in (None, 0, max([1, *down[-1][-1:]]))  # as the lowest level: so diffusers builds it
        if not (regular and same and has_attention and as_deep and len(up) == len(down) == len(channels)):
            raise ModelError(f"{path}: its UNet is of no block layout that is known: {blocks}")
        return blocks

    def config(self) -> dict[str, Any]:
        """The entries of a diffusers config that say so."""
        config: dict[str, Any] = {
            "layers_per_block": len(self.down[0]),
            "block_out_channels": self.channels,
            "down_block_types": ["CrossAttnDownBlock2D" if level[0] else "DownBlock2D" for level in self.down],
            "up_block_types": ["CrossAttnUpBlock2D" if level[0] else "UpBlock2D" for level in self.up],
        }
        down, up = ([_formatted(level) for level in levels] for levels in (self.down, self.up))
        if down != [1] * len(down):
            config["transformer_layers_per_block"] = down
        if up != down[::-1]:
            config["reverse_transformer_layers_per_block"] = up
        if not self.middle:
            config["mid_block_type"] = None if self.middle is None else "UNetMidBlock2D"
        return config


def _depth(keys: Sequence[str], place: str) -> int:
    """How many transformers follow one another in the attention of a block."""
    begin = f"{place}.1.transformer_blocks."
    return len({key.removeprefix(begin).split(".")[0] for key in keys if key.startswith(begin)})


def _formatted(level: list[int]) -> int | list[int]:
    """The depths of a level as diffusers says them: one number where they are equal, 1 where there is no attention."""
    return level if len(set(level)) > 1 else max(level[0], 1)


def _vae(shapes: Shapes, family: str) -> dict[str, Any]:
    width = shapes.get(VAE + "encoder.conv_in.weight", (128,))[0]  # a file without one is trained with --vae
    return vae_config(width, family)


def vae_config(width: int, family: str) -> dict[str, Any]:
    """The config of a VAE of Stable Diffusion.

    Args:
        width: channels of its first convolution.
        family: "sdxl", or another one; they scale latents differently.
    """
    return {
        "_class_name": "AutoencoderKL",
        "in_channels": 3,
        "out_channels": 3,
        "latent_channels": 4,
        "layers_per_block": 2,
        "block_out_channels": [width, 2 * width, 4 * width, 4 * width],
        "norm_num_groups": min(32, width),
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
        "sample_size": 1024 if family == "sdxl" else 512,
        "scaling_factor": 0.13025 if family == "sdxl" else 0.18215,
    }


def _text(hidden: int, vocabulary: int, layers: int, projection: int, activation: str) -> dict[str, Any]:
    return {
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": 4 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // 64,
        "max_position_embeddings": 77,
        "hidden_act": activation,
        "projection_dim": projection,
        "bos_token_id": vocabulary - 2,  # start and end are the last two words of CLIP's vocabulary
        "eos_token_id": vocabulary - 1,
        "pad_token_id": vocabulary - 1,
    }


def _clip(shapes: Shapes, prefix: str) -> dict[str, Any]:
    vocabulary, hidden = shapes[f"{prefix}text_model.embeddings.token_embedding.weight"]
    layers = sum(key.startswith(prefix) and key.endswith("layer_norm1.weight") for key in shapes)
    return _text(hidden, vocabulary, layers, hidden, "quick_gelu")


def _openclip(shapes: Shapes, prefix: str, dropped: int) -> dict[str, Any]:
    vocabulary, hidden = shapes[f"{prefix}token_embedding.weight"]
    layers = sum(key.startswith(prefix) and key.endswith("ln_1.weight") for key in shapes) - dropped
    projection = shapes.get(f"{prefix}text_projection", (hidden, hidden))[1]
    return _text(hidden, vocabulary, layers, projection, "gelu")


def _scheduler(family: str, prediction_type: str, zero_snr: bool) -> dict[str, Any]:
    if prediction_type == "flow":
        return {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 1.0}
    common = {**_BETAS, "prediction_type": prediction_type, "steps_offset": 1}
    if family == "sdxl":
        spacing = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"} if zero_snr else {}
        return {"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "leading", **common, **spacing}
    common |= {"set_alpha_to_one": False, "clip_sample": False}
    if family == "sd21":
        return {"_class_name": "DDIMScheduler", **common}
    return {"_class_name": "PNDMScheduler", "skip_prk_steps": True, **common}
