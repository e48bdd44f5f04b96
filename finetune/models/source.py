"""ModelSource: reads the parts of a model from a diffusers folder or a checkpoint in one file."""

# diffusers annotates its own methods narrower than what they take and give.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportReturnType=false

from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any, Protocol

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel, UNet2DModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from finetune.errors import ModelError, UsageError
from finetune.models.clip_tokenizer import END, clip_tokenizer
from finetune.models.ldm_keys import UNET, VAE, is_vae_attention, newer_vae_key, openclip_keys, unet_keys, vae_keys
from finetune.models.model_info import ModelInfo, read_json
from finetune.models.single_file import CLIP, OPENCLIP_XL, Checkpoint, Shapes, read_header, vae_config
from finetune.models.weights import assign, count_numbers, read_weights, tensor_reader, weight_files


class ModelSource(Protocol):
    """The parts of a model, each read when it is asked for, on the CPU."""

    place: Path
    prediction_stated: bool
    """Whether something says what the UNet predicts; False: `config` assumes it."""

    def component_dirs(self, part: str) -> Path | None:
        """The folder of a part, in diffusers layout, where there is one."""
        ...

    def config(self, part: str) -> Mapping[str, Any]:
        """What a diffusers folder says of a part ("model_index": of the whole)."""
        ...

    def numbers(self, part: str) -> int:
        """How many numbers its weights are."""
        ...

    def unet(self, dtype: torch.dtype) -> UNet2DConditionModel | UNet2DModel: ...

    def vae(self) -> AutoencoderKL:
        """In fp32."""
        ...

    def text_encoder(self, part: str) -> CLIPTextModel | CLIPTextModelWithProjection:
        """In fp32; the second one with its projection."""
        ...

    def tokenizer(self, part: str) -> CLIPTokenizer: ...


def open_source(model_info: ModelInfo, tokenizer: str | None = None) -> ModelSource:
    """The source of a located model that is not built from scratch.

    Args:
        model_info: a folder or a file.
        tokenizer: for a file, see `clip_tokenizer`; a folder has its own.

    Raises:
        UsageError: a tokenizer for a folder.
    """
    if model_info.checkpoint is not None:
        return FileSource(model_info.checkpoint, tokenizer)
    if tokenizer is not None:
        raise UsageError(f"tokenizer {tokenizer}: {model_info.name} has its own; this is for a checkpoint in one file")
    assert model_info.folder is not None
    return FolderSource(model_info.folder)


class FolderSource:
    """A folder in diffusers layout."""

    def __init__(self, folder: Path):
        self.place = folder
        self.prediction_stated = True

    def component_dirs(self, part: str) -> Path | None:
        return self.place / part

    def config(self, part: str) -> Mapping[str, Any]:
        inside = {"model_index": "model_index.json", "scheduler": "scheduler/scheduler_config.json"}
        return read_json(self.place / inside.get(part, f"{part}/config.json"))

    def numbers(self, part: str) -> int:
        return count_numbers(self.place / part)

    def unet(self, dtype: torch.dtype) -> UNet2DConditionModel | UNet2DModel:
        folder = self.place / "unet"
        if self.config("unet")["_class_name"] == "UNet2DModel":
            unet = strictly_loaded(UNet2DModel, folder)
            return nn.Module.to(unet, dtype)  # `from_pretrained` has another name for it in each generation
        with torch.device("meta"):
            unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(folder))
        assign(unet, read_weights(weight_files(folder), dtype), folder)
        return unet.eval()

    def vae(self) -> AutoencoderKL:
        return vae_from(self.place / "vae")

    def text_encoder(self, part: str) -> CLIPTextModel | CLIPTextModelWithProjection:
        return strictly_loaded(_text_model(part), self.place / part, dtype=torch.float32)

    def tokenizer(self, part: str) -> CLIPTokenizer:
        return CLIPTokenizer.from_pretrained(self.place / part, local_files_only=True)


class FileSource:
    """A checkpoint in one file, in LDM layout; each tensor is read and converted by itself."""

    def __init__(self, checkpoint: Checkpoint, tokenizer: str | None):
        self.place = checkpoint.path
        self.checkpoint = checkpoint
        self.prediction_stated = checkpoint.prediction_stated
        self._tokenizer = tokenizer

    def component_dirs(self, part: str) -> Path | None:
        return None

    def config(self, part: str) -> Mapping[str, Any]:
        return {} if part == "model_index" else self.checkpoint.configs[part]

    def numbers(self, part: str) -> int:
        begins = {"unet": UNET, "vae": VAE, "text_encoder": CLIP[self.checkpoint.family], "text_encoder_2": OPENCLIP_XL}
        shapes = self.checkpoint.shapes
        return sum(prod(shape) for name, shape in shapes.items() if name.startswith(begins[part]))

    def empty_unet(self) -> UNet2DConditionModel:
        """The UNet without storage."""
        with torch.device("meta"):
            return UNet2DConditionModel.from_config(dict(self.config("unet"))).eval()

    def unet(self, dtype: torch.dtype) -> UNet2DConditionModel:
        unet = self.empty_unet()
        assign(unet, {name: tensor.to(dtype) for name, tensor in self.weights("unet")}, self.place)
        return unet

    def vae(self) -> AutoencoderKL:
        if VAE + "encoder.conv_in.weight" not in self.checkpoint.shapes:
            raise ModelError(f"--model {self.place}: the file has no VAE; give one with --vae")
        return _vae_of_file(self.place, self.checkpoint.shapes, self.config("vae"), VAE)

    def text_encoder(self, part: str) -> CLIPTextModel | CLIPTextModelWithProjection:
        config = CLIPTextConfig(**self.config(part))
        state = {name: tensor.float() for name, tensor in self.weights(part)}
        return strictly_loaded(_text_model(part), None, config=config, state_dict=state).float()

    def weights(self, part: str) -> Iterator[tuple[str, Tensor]]:
        """A part's weights by the keys of a diffusers folder, in the file's number format, read one by one."""
        if part == "unet":
            return self._read(unet_keys(self.config(part), self.empty_unet().state_dict()))
        if part == "vae":
            return _vae_weights(self.place, self.checkpoint.shapes, self.config(part), VAE)
        prefix = OPENCLIP_XL if part == "text_encoder_2" else CLIP[self.checkpoint.family]
        openclip = part == "text_encoder_2" or self.checkpoint.family == "sd21"
        return self._openclip(prefix, CLIPTextConfig(**self.config(part))) if openclip else self._clip(prefix)

    def tokenizer(self, part: str) -> CLIPTokenizer:
        openclip = part == "tokenizer_2" or self.checkpoint.family == "sd21"
        return clip_tokenizer(self._tokenizer, pad="!" if openclip else END)

    def _clip(self, prefix: str) -> Iterator[tuple[str, Tensor]]:
        """transformers' own names lie behind the prefix. An old table of positions (0, 1, 2 ...) is no weight."""
        names = [name for name in self.checkpoint.shapes if name.startswith(prefix) and "position_ids" not in name]
        return self._read({name.removeprefix(prefix): name for name in names})

    def _openclip(self, prefix: str, config: CLIPTextConfig) -> Iterator[tuple[str, Tensor]]:
        rows = list(openclip_keys(config.num_hidden_layers))
        thirds = {ours: third for ours, _, third in rows}
        for ours, tensor in self._read({ours: prefix + theirs for ours, theirs, _ in rows}):
            third = thirds[ours]
            yield ours, tensor if third is None else tensor.chunk(3)[third].clone()
            del tensor  # before the next one is read
        projection = f"{prefix}text_projection"
        if projection in self.checkpoint.shapes:
            for ours, tensor in self._read({"text_projection.weight": projection}):
                yield ours, tensor.T.contiguous()

    def _read(self, keys: Mapping[str, str]) -> Iterator[tuple[str, Tensor]]:
        """Our key -> tensor. Raises ModelError for a key that the file has not."""
        missing = [theirs for theirs in keys.values() if theirs not in self.checkpoint.shapes]
        if missing:
            raise ModelError(f"--model {self.place}: {len(missing)} tensors are missing, such as {missing[0]}")
        with tensor_reader(self.place) as read:
            for ours, theirs in keys.items():
                yield ours, read(theirs)


def strictly_loaded(kind: Any, folder: Path | None, **options: Any) -> Any:
    """A part of diffusers or transformers. Raises ModelError where the library would fill tensors at random.

    Args:
        kind: the class.
        folder: where its files are; None: the options hold its tensors.
        options: of `from_pretrained`.
    """
    local = {} if folder is None else {"local_files_only": True, "use_safetensors": True}
    model, loading = kind.from_pretrained(folder, **local, **options, output_loading_info=True)
    place = folder or kind.__name__
    if missing := sorted(loading["missing_keys"]):
        raise ModelError(f"{place}: {len(missing)} tensors are missing, such as {missing[0]}")
    if mismatched := sorted(map(str, loading["mismatched_keys"])):
        raise ModelError(f"{place}: weights do not fit the config: {mismatched[0]} ({len(mismatched)} such)")
    return model


def vae_from(folder: Path) -> AutoencoderKL:
    """The VAE in a folder of its own, in fp32. Raises ModelError where tensors are missing."""
    return strictly_loaded(AutoencoderKL, folder).float()


def _vae_of_file(path: Path, shapes: Shapes, config: Mapping[str, Any], prefix: str) -> AutoencoderKL:
    """A VAE in fp32 from tensors of the LDM layout."""
    vae = _empty_vae(config)
    assign(vae, {name: tensor.float() for name, tensor in _vae_weights(path, shapes, config, prefix)}, path)
    return vae


def _empty_vae(config: Mapping[str, Any]) -> AutoencoderKL:
    with torch.device("meta"):
        return AutoencoderKL.from_config(dict(config))


def _vae_weights(path: Path, shapes: Shapes, config: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Tensor]]:
    """A VAE's weights from tensors of the LDM layout, whose attention may have its newer names."""
    layout = vae_keys(config, _empty_vae(config).state_dict())
    keys = {ours: prefix + theirs.removeprefix(VAE) for ours, theirs in layout.items()}
    keys = {ours: theirs if theirs in shapes else newer_vae_key(theirs) for ours, theirs in keys.items()}
    if missing := [theirs for theirs in keys.values() if theirs not in shapes]:
        raise ModelError(f"{path}: {len(missing)} tensors of the VAE are missing, such as {missing[0]}")
    with tensor_reader(path) as read:
        for ours, theirs in keys.items():
            convolution = is_vae_attention(ours) and len(shapes[theirs]) == 4
            yield ours, read(theirs)[:, :, 0, 0] if convolution else read(theirs)


def vae_from_file(path: Path, family: str) -> AutoencoderKL:
    """A VAE that lies in a file of its own, in the LDM layout, in fp32.

    Args:
        path: a safetensors file.
        family: "sdxl" or another one, which says how latents are scaled.

    Raises:
        ModelError: it is none.
    """
    shapes = {name: tuple(entry["shape"]) for name, entry in read_header(path).items()}
    prefix = VAE if any(key.startswith(VAE) for key in shapes) else ""
    first = shapes.get(f"{prefix}encoder.conv_in.weight")
    if first is None or f"{prefix}encoder.down.0.block.0.conv1.weight" not in shapes:
        raise ModelError(f"vae {path}: no VAE in the layout of Stable Diffusion; a diffusers folder works too")
    return _vae_of_file(path, shapes, vae_config(first[0], family), prefix)


def _text_model(part: str) -> Any:
    return CLIPTextModelWithProjection if part == "text_encoder_2" else CLIPTextModel
