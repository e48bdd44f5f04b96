"""LoRA through peft: a small trainable adapter on frozen layers (Hu et al. 2021, eq. 3), and its file."""

import json
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import UNet2DConditionModel, UNet2DModel
from diffusers.loaders import StableDiffusionXLLoraLoaderMixin
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from finetune.errors import ModelError, UsageError
from finetune.models.adapter_dropout import add_dropout
from finetune.models.adapter_types import (
    Kind,
    kind_of,
    read_settings,
    settings_of,
    without_alpha_for_whole_factors,
)
from finetune.models.lora_formats import (
    METADATA_KEY,
    PEFT_PREFIX,
    LoraFile,
    read_lora,
    uniform,
    write_kohya,
    write_peft,
    write_peft_tensors,
)
from finetune.models.lora_forward import lean
from finetune.models.lora_keys import BLOCKS, kohya_names, layer_names
from finetune.models.lora_layers import layers_to_adapt
from finetune.models.lora_math import MAGNITUDE, MAGNITUDE_OVER_BASE, rank_of, row_norms, update
from finetune.models.pissa import START, activate, start_at_principal_part, start_of, with_start
from finetune.options import ATTENTION_AND_FEED_FORWARD

LORA_FILE = "pytorch_lora_weights.safetensors"
"""The name under which diffusers looks for a LoRA in a folder."""


_SCALED = ("lora_B.weight", "hada_w2_b", "lokr_w1", "lokr_w1_b")
"""Of each kind, a factor of the update that can take up what another alpha would change."""

_SETTINGS = ("peft_type", "r", "alpha", "rank_pattern", "alpha_pattern", "target_modules", "decompose_factor")
"""What the file of a LoHa or LoKr needs of peft's settings; the others are not known to every version of peft."""

_RELOADED = "reloaded"
_SCHEDULER = "finetune."
"""Prefix of entries of the scheduler's config that an adapter was trained with and its base model does not have."""


def add_lora(
    unet: UNet2DConditionModel | UNet2DModel,
    rank: int = 16,
    alpha: float | None = None,
    dropout: float = 0.0,
    target_modules: Sequence[str] = ATTENTION_AND_FEED_FORWARD,
    seed: int = 0,
    kind: Kind = "lora",
    block_ranks: Mapping[str, float] | None = None,
    *,
    conv_rank: int | None = None,
    conv_alpha: float | None = None,
    rank_dropout: float = 0.0,
    module_dropout: float = 0.0,
    lokr_factor: int | None = None,
    init: Literal["gaussian", "pissa"] = "gaussian",
) -> None:
    """Freeze `unet` and add an adapter whose weights, in fp32, are all that learns.

    Args:
        unet: a diffusers UNet; it computes the same as before until the first step (B starts at zero).
        rank: rank of the update, from 1 to that of the widest adapted layer; of a LoKr any, as a high one keeps the
            larger factor whole.
        alpha: the update is scaled by alpha / rank (rslora: by alpha / sqrt(rank)); default: rank.
        dropout: in [0, 1), on the adapter's input; not for LoHa and LoKr.
        target_modules: endings of the names of linear or convolution layers, patterns of whole names such as
            "up_blocks.*.to_q", or names of `LAYER_PRESETS`.
        seed: decides the initial values of what does not start at zero.
        kind: "lora" (Hu et al. 2021), "rslora" (Kalajdzievski 2023), "dora" (Liu et al. 2024), "loha" (Hyeon-Woo et al.
            2022) or "lokr" (Yeh et al. 2024).
        block_ranks: beginning of a layer's name -> its rank, where it is another; alpha is the same for all.
        conv_rank: adapt the layers of the residual blocks too, those with a kernel larger than 1 x 1 with this rank
            (LoCon, as in sd-scripts).
        conv_alpha: alpha of these; default: their rank.
        rank_dropout, module_dropout: in [0, 1), share of the ranks and of the layers that a step leaves out.
        lokr_factor: size of the smaller factor of a LoKr, as far as it divides the layer; default: near the square root
            of the layer's size.
        init: "gaussian": A is drawn and B zero, of a LoRA. "pissa": at the principal part of the weights, which a
            second, frozen adapter takes away, see `finetune.models.pissa`; not for the other kinds, nor with dropout.

    Raises:
        UsageError: a pixel-space UNet, `target_modules` names no layer, or one that takes no adapter, or a rank that
            no layer can have.
    """
    if not isinstance(unet, UNet2DConditionModel):
        raise UsageError("LoRA needs the UNet of a latent model; train every weight of a pixel-space UNet instead")
    if init == "pissa" and (kind not in ("lora", "rslora") or dropout or rank_dropout or module_dropout):
        raise UsageError("init_lora_weights pissa is for lora_type lora and rslora without dropout")
    target_modules, layers = layers_to_adapt(unet, target_modules, residual_blocks=conv_rank is not None)
    kernels = {name for name, layer in layers.items() if conv_rank and _has_kernel(layer)}
    for option, number, some in (
        ("rank", rank, layers.keys() - kernels),
        *([("conv_rank", conv_rank, kernels)] if conv_rank is not None else []),
    ):
        weights = [getattr(layers[name], "weight", None) for name in some]
        widest = max((min(w.shape[0], w[0].numel()) for w in weights if isinstance(w, torch.Tensor)), default=number)
        if number < 1 or (number > widest and kind != "lokr"):
            raise UsageError(f"{option} = {number}: expected 1 to {widest}, the highest rank that an adapted layer has")
    unet.requires_grad_(False)
    config = settings_of(
        kind,
        rank=rank,
        alpha=rank if alpha is None else alpha,
        dropout=dropout,
        rank_dropout=rank_dropout,
        module_dropout=module_dropout,
        lokr_factor=lokr_factor,
        target_modules=target_modules,
        block_ranks=block_ranks or {},
        kernels={name: (conv_rank, conv_alpha or float(conv_rank)) for name in sorted(kernels)} if conv_rank else {},
    )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        try:
            unet.add_adapter(config)
            if init == "pissa":
                start_at_principal_part(unet, "default")
        except ValueError as error:
            raise UsageError(
                f"lora_target_modules {', '.join(target_modules)}: {str(error).splitlines()[0]}"
            ) from error
    without_alpha_for_whole_factors(unet, "default", config)
    if kind in ("lora", "rslora", "dora") and (rank_dropout or module_dropout):
        add_dropout(unet, "default", ranks=rank_dropout, modules=module_dropout)
    else:
        lean(unet, "default")
    for parameter in (*trainable(unet), *start_of(unet).values()):
        parameter.data = parameter.data.float()


def _has_kernel(layer: nn.Module) -> bool:
    return isinstance(layer, nn.Conv2d) and layer.kernel_size != (1, 1)


def load_lora(unet: Any, folder: str | Path, name: str | None = None) -> None:
    """Put the adapter of any kind that a run has exported on a UNet; diffusers itself loads no LoHa and no LoKr.

    Args:
        unet: of the base model.
        folder: where `pytorch_lora_weights.safetensors` lies.
        name: of the adapter, where there are several.

    Raises:
        ModelError: the file is damaged, or does not fit.
    """
    path = Path(folder) / LORA_FILE
    metadata = Adapter.read_config(Path(folder))
    settings = {key.removeprefix(PEFT_PREFIX): value for key, value in metadata.items()}
    try:
        if settings.get("peft_type", "LORA") == "LORA":
            with torch.random.fork_rng(devices=[]):  # peft draws what the file replaces
                unet.load_lora_adapter(folder, prefix="unet", weight_name=LORA_FILE, adapter_name=name)
            return
        state = {key.removeprefix(PEFT_PREFIX): tensor for key, tensor in load_file(path).items()}
    except SafetensorError as error:
        raise ModelError(f"{path} cannot be loaded: {error}") from error
    config, name = read_settings(settings), name or "default"
    with torch.random.fork_rng(devices=[]):
        unet.add_adapter(config, name)
    without_alpha_for_whole_factors(unet, name, config)
    if unknown := set_peft_model_state_dict(unet, state, adapter_name=name).unexpected_keys:
        raise ModelError(f"{path}: {unknown[0]}: no tensor for this UNet")


def trainable(module: nn.Module) -> list[nn.Parameter]:
    """The parameters that learn, in the module's own order."""
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


@dataclass(frozen=True)
class Adapter:
    """The adapter that `add_lora` put on a UNet: its tensors, its file, how to load it and how to prove it.

    Nothing else in the package knows under which keys and names an adapter is kept.
    """

    unet: Any
    name: str = "default"
    """What diffusers calls an adapter that was added without a name."""

    @staticmethod
    def attached_to(unet: nn.Module) -> "Adapter | None":
        """The adapter on this UNet, if there is one."""
        return Adapter(unet) if getattr(unet, "peft_config", None) else None

    @staticmethod
    def exists_in(folder: Path) -> bool:
        """True where `save` has written to this folder."""
        return (folder / LORA_FILE).is_file()

    @property
    def kind(self) -> Kind:
        """What it is; a rank-stabilised LoRA counts as a LoRA."""
        return kind_of(self.unet.peft_config[self.name])

    def alphas(self) -> dict[str, float]:
        """Layer -> alpha as kohya's layout counts it: the update is scaled by alpha / rank."""
        alphas = {name: m.alpha if hasattr(m, "alpha") else m.lora_alpha for name, m in self._layers().items()}
        return {name: float(alpha[self.name]) * len(self._names_active()) for name, alpha in alphas.items()}

    def scales(self) -> list[float]:
        """What each layer's update is multiplied by, in the order of `alphas`."""
        return [float(module.scaling[self.name]) for module in self._layers().values()]

    def updates(self) -> dict[str, Tensor]:
        """Layer -> what the adapter adds to its weight, as peft computes it; DoRA's norms left aside."""
        return {
            layer: sum((module.get_delta_weight(name).detach() for name in self._names_active()), torch.zeros(()))
            for layer, module in self._layers().items()
        }

    def largest_update(self) -> Tensor:
        """The largest number that the adapter, or its start, adds to a weight."""
        updates = [module.get_delta_weight(name) for module in self._layers().values() for name in self._names_active()]
        return torch.stack([update.detach().abs().max() for update in updates]).max()

    def _names_active(self) -> list[str]:
        """The names of the adapter and its start, where it has one: in a file they are one, of twice the rank."""
        return [self.name, START] if START in self.unet.peft_config else [self.name]

    def _layers(self) -> dict[str, Any]:
        """The layers that are adapted."""
        return {name: module for name, module in self.unet.named_modules() if isinstance(module, BaseTunerLayer)}

    def state(self, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        """The adapter's tensors as its file has them: peft's keys under `unet.`."""
        weights = with_start(self.unet, get_peft_model_state_dict(self.unet, adapter_name=self.name))
        return {f"unet.{name}": tensor.to(dtype).contiguous() for name, tensor in weights.items()}

    def kohya_state(self, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        """The adapter's tensors as its kohya file has them, by the keys of `state`.

        A DoRA's norms are written so that ComfyUI and Forge come to the trained weights: they divide each row of the
        sum by the norm of the base weight's row, where DoRA divides by that of the sum (Liu et al. 2024, eq. 5).
        """
        state = self.state()
        for name, module in self._layers().items() if self.kind == "dora" else ():
            weight = module.get_base_layer().weight.detach().float()
            ratio = row_norms(weight) / row_norms(weight + module.get_delta_weight(self.name).detach())
            key = f"{PEFT_PREFIX}{name}."
            magnitude = state.pop(key + MAGNITUDE)
            state[key + MAGNITUDE_OVER_BASE] = magnitude * ratio.to(magnitude).reshape(magnitude.shape)
        return {name: tensor.to(dtype) for name, tensor in state.items()}

    def merge(self) -> None:
        """Add the update to the base's weights (Hu et al. 2021, eq. 3), and take the adapter off."""
        self.unet.fuse_lora()
        self.unet.unload_lora()

    @staticmethod
    def read_metadata(path: Path) -> dict[str, str]:
        """What a kohya file says of its run; not what follows from its tensors."""
        with safe_open(path, "pt") as file:
            metadata: dict[str, str] = file.metadata() or {}
        prefixes = ("ss_network_", METADATA_KEY)
        return {name: text for name, text in metadata.items() if not name.startswith(prefixes) and "hash" not in name}

    @staticmethod
    def read_config(folder: Path) -> dict[str, Any]:
        """What the file saved in `folder` says of its adapter. Raises ModelError when it is damaged."""
        try:
            with safe_open(folder / LORA_FILE, "pt") as file:
                return json.loads((file.metadata() or {}).get(METADATA_KEY, "{}"))
        except SafetensorError as error:
            raise ModelError(f"{folder / LORA_FILE} cannot be loaded: {error}") from error

    @staticmethod
    def how_to_load(folder: Path) -> str:
        """Python that puts the adapter saved in `folder` on a `pipeline`; the folder's name is to be filled in."""
        settings = Adapter.read_config(folder)
        load = 'pipeline.load_lora_weights("{}")'
        if settings.get(f"{PEFT_PREFIX}peft_type", "LORA") != "LORA":
            load = 'import finetune\nfinetune.load_lora(pipeline.unet, "{}")'
        changes = {n.removeprefix(_SCHEDULER): v for n, v in settings.items() if n.startswith(_SCHEDULER)}
        if changes:
            arguments = ", ".join(
                f'{name}="{v}"' if isinstance(v, str) else f"{name}={v}" for name, v in changes.items()
            )
            scheduler = "pipeline.scheduler"
            first, kind = "", scheduler
            if "rescale_betas_zero_snr" in changes:  # not every scheduler has it
                first, kind = "from diffusers import DDIMScheduler\n", "DDIMScheduler"
            load = f"{first}{scheduler} = {kind}.from_config({scheduler}.config, {arguments})\n{load}"
        return load

    def save(
        self, folder: Path, scheduler_changes: Mapping[str, Any] | None = None, dtype: torch.dtype = torch.float32
    ) -> None:
        """Write the adapter in peft's layout.

        `scheduler_changes` are kept there too, where they are not the base model's; diffusers passes them over.
        """
        more = {f"{_SCHEDULER}{name}": value for name, value in (scheduler_changes or {}).items()}
        if self.kind in ("lora", "dora"):
            write_peft(folder / LORA_FILE, self.uniform(dtype), more)
            return
        settings = self.unet.peft_config[self.name].to_dict()
        known = {name: settings[name] for name in _SETTINGS if name in settings}
        write_peft_tensors(folder / LORA_FILE, self.state(dtype), known, more)

    def uniform(self, dtype: torch.dtype = torch.float32) -> LoraFile:
        """A LoRA or DoRA as its peft file has it, see `finetune.models.lora_formats.uniform`."""
        lora = uniform(LoraFile(self.state(), self.alphas(), 0))
        return replace(lora, tensors={name: tensor.to(dtype) for name, tensor in lora.tensors.items()})

    def save_kohya(self, path: Path, metadata: Mapping[str, str], state: Mapping[str, Tensor] | None = None) -> None:
        """Write the adapter, or an earlier `kohya_state` of it, in kohya's layout, with `metadata`."""
        lora = LoraFile(dict(self.kohya_state() if state is None else state), self.alphas(), 0)
        names = kohya_names(self.unet.config, lora.alphas)
        write_kohya(path, lora, metadata, names, self.unet.peft_config[self.name].r * len(self._names_active()))

    def init_from(self, path: Path) -> int:
        """Start from a LoRA file in either layout; what it adds to the base is the same, whatever its alpha.

        Returns:
            How many of its tensors are for text encoders, and not used.

        Raises:
            UsageError: its layers or its rank are not this adapter's.
            ModelError: it is damaged, or no LoRA for this UNet.
        """
        lora, state = self._with_own_norms(read_lora(path, self._names())), self.state()
        if lora.has_norms and lora.kind != "dora":
            raise UsageError(f"init_lora {path}: a {lora.kind} with the norms of a DoRA, which is not trained here")
        shapes = [{key: tuple(tensor.shape) for key, tensor in some.items()} for some in (lora.tensors, state)]
        if shapes[0] != shapes[1]:
            key = min(key for key in shapes[0].keys() | shapes[1].keys() if shapes[0].get(key) != shapes[1].get(key))
            theirs, ours = shapes[0].get(key, "missing"), shapes[1].get(key, "not adapted")
            what = "give its --rank and --lora_target_modules" if theirs != "missing" else "it has fewer layers"
            place = f"init_lora {path} (for {lora.family or 'another model'})"
            raise UsageError(f"{place}: {key} is {theirs} there and {ours} here; {what}")
        layers, alphas = lora.layers(), self.alphas()
        for layer, tensors in layers.items():
            rank = rank_of(tensors)
            if rank is not None:
                share = lora.alphas.get(layer, rank) / alphas[layer]
                last = next(name for name in _SCALED if name in tensors)
                tensors[last] = tensors[last].float() * share
        state = {f"{layer}.{name}": tensor.float() for layer, some in layers.items() for name, tensor in some.items()}
        set_peft_model_state_dict(self.unet, state, adapter_name=self.name)
        return lora.text_tensors

    def _with_own_norms(self, lora: LoraFile) -> LoraFile:
        """The DoRA of a file for ComfyUI and Forge with the norms that peft has; see `kohya_state`."""
        tensors = dict(lora.tensors)
        for name, factors in lora.layers().items():
            if MAGNITUDE_OVER_BASE in factors and name in self._layers():
                weight = self._layers()[name].get_base_layer().weight.detach().float()
                merged = weight + update(factors, lora.alphas.get(name), weight.shape)
                key = f"{PEFT_PREFIX}{name}."
                magnitude = tensors.pop(key + MAGNITUDE_OVER_BASE)
                ratio = (row_norms(merged) / row_norms(weight)).reshape(magnitude.shape)
                tensors[key + MAGNITUDE] = magnitude * ratio
        return replace(lora, tensors=tensors)

    def _names(self) -> dict[str, str]:
        weights = [name.replace(".base_layer.", ".") for name, _ in self.unet.named_parameters()]
        return layer_names(self.unet.config, weights)

    def read_kohya(self, path: Path, device: torch.device) -> tuple[dict[str, Tensor], dict[str, float]]:
        """The tensors of a kohya file by the keys of `kohya_state`, and alpha of each layer. Raises ModelError."""
        lora = read_lora(path, self._names())
        return {name: tensor.to(device) for name, tensor in lora.tensors.items()}, dict(lora.alphas)

    @contextmanager
    def rounded(self) -> Iterator[None]:
        """Cast the trained adapter to the base's dtype for a while, as diffusers does with a loaded one."""
        parameters = (*trainable(self.unet), *start_of(self.unet).values())
        learned = {parameter: parameter.data for parameter in parameters}
        dtype = self.unet.dtype  # diffusers looks through the whole module for it
        try:
            for parameter, data in learned.items():
                parameter.data = data.to(dtype)
            yield
        finally:
            for parameter, data in learned.items():
                parameter.data = data

    def replaced_by_file(self, folder: Path) -> AbstractContextManager[None]:
        """Replace the UNet's adapter for a while by the one saved in `folder`."""
        return self._replaced(lambda: load_lora(self.unet, folder, _RELOADED))

    def layers_outside_blocks(self) -> list[str]:
        """The adapted layers that not every version of diffusers reads from a kohya file."""
        return [name for name in self._layers() if not name.startswith(BLOCKS)]

    def replaced_by_kohya(self, path: Path) -> AbstractContextManager[None]:
        """Replace the UNet's adapter for a while by that of a kohya file, as diffusers reads it."""

        def load() -> None:
            # the mixin of SDXL, which takes the UNet's config to read the LDM names of layers
            read = StableDiffusionXLLoraLoaderMixin.lora_state_dict(load_file(path), unet_config=self.unet.config)
            state, alphas, *_ = read
            self.unet.load_lora_adapter(state, prefix="unet", network_alphas=alphas, adapter_name=_RELOADED)

        return self._replaced(load)

    @contextmanager
    def _replaced(self, load: Callable[[], None]) -> Iterator[None]:
        # peft draws first values before it reads the file, and warns that there are two adapters and that one goes.
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="peft")
            try:
                load()
                self.unet.set_adapters(_RELOADED)
                yield
            finally:
                if _RELOADED in self.unet.peft_config:
                    self.unet.delete_adapters(_RELOADED)
                activate(self.unet, self.name)
