"""finetune-unet export: what a run has learned, from any of its checkpoints, as the file that a viewer wants."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from finetune.config import ResolvedConfig, load_resolved
from finetune.errors import ModelError, RunError, UsageError
from finetune.files import new_file

if TYPE_CHECKING:
    from finetune.models.loading import DiffusionModel

Format = Literal["kohya", "peft", "diffusers", "single-file", "unet"]
Precision = Literal["fp32", "fp16", "bf16"]


@dataclass(frozen=True, kw_only=True)
class Options:
    """Write what a run has learned in another form. Whatever is written is loaded back and compared."""

    run: str
    """The run folder."""
    format: Format
    """kohya: a LoRA for ComfyUI, A1111, Forge. peft: a LoRA for diffusers. diffusers: a pipeline folder. single-file: a
    checkpoint in one file. unet: a UNet's folder. The last three have a LoRA merged into the base."""
    to: str
    """The file or folder to write; there must be none yet."""
    step: int | None = None
    """Of the checkpoint to take. Default: the newest."""
    ema: bool = True
    """Take the averaged weights, where the run kept any; --no_ema: those that were trained on."""
    precision: Precision = "fp32"
    """Number format of the file."""


def run(options: Options) -> None:
    """Write the export, prove it, and print its path.

    Raises:
        UsageError: no such run or checkpoint, a place that is taken, or a form that the run cannot take.
        RunError: what was written does not load back to the same; it is kept beside, named `.rejected`.
    """
    folder = Path(options.run).expanduser()
    if not (folder / "config.toml").is_file():
        raise UsageError(f"--run {folder}: no run folder")
    config = load_resolved(folder / "config.toml")
    if options.format in ("kohya", "peft") and config.method == "full":
        raise UsageError(f"--format {options.format}: this run trained every weight, and has no LoRA")
    to = new_file("--to", options.to)
    from finetune.results.forms import write_form

    model, told = _trained(options, config, folder)
    try:
        difference = write_form(model, to, options.format, options.precision, told)
    except (RunError, ModelError):
        if to.exists():
            to.rename(to.with_name(f"{to.name}.rejected"))
        raise
    print(f"{to}: loaded back and compared (largest difference {difference:.0e})")


def _trained(options: Options, config: ResolvedConfig, folder: Path) -> "tuple[DiffusionModel, dict[str, str]]":
    """The model with the weights of the checkpoint, and what the run's own LoRA file says of itself."""
    import torch

    from finetune.models.locate import locate
    from finetune.models.lora import Adapter
    from finetune.results.export import kohya_file
    from finetune.run.base import load_base
    from finetune.training import checkpoint

    there = dict(checkpoint.checkpoints(folder))
    step = options.step if options.step is not None else max(there, default=None)
    if step not in there:
        known = ", ".join(map(str, there)) or "none"
        raise UsageError(f"--run {folder}: no checkpoint{'' if step is None else f' {step}'}; there are: {known}")
    state = checkpoint.load(there[step])
    model = load_base(config, locate(config.model), torch.float32)
    weights = state["ema"] if options.ema and state["ema"] else state["weights"]
    learned = {name: p for name, p in model.unet.named_parameters() if p.requires_grad}
    if weights.keys() != learned.keys():
        raise RunError(f"{there[step]} holds other parameters than its config.toml says")
    with torch.no_grad():
        for name, parameter in learned.items():
            parameter.copy_(weights[name])
    recorded = kohya_file(folder, None if step == config.max_train_steps else step)
    return model, Adapter.told_in(recorded) if recorded.is_file() else {}
