"""Exports of a run: at its end, and later from its folder."""

import logging
import shlex
from collections.abc import Collection
from pathlib import Path

import torch

from finetune.atomic_io import remove
from finetune.config import ResolvedConfig, as_settings
from finetune.errors import RunError, UsageError
from finetune.evaluators.early_stopping import best_of_ended
from finetune.log_handlers import labelled
from finetune.models.families import Family
from finetune.models.image_condition import image_condition_of
from finetune.models.loading import DiffusionModel
from finetune.models.lora import Adapter
from finetune.models.model_info import locate
from finetune.models.pissa import start_of
from finetune.models.single_file import inspect, read_header
from finetune.models.weights import read_tensors
from finetune.results import hub
from finetune.results.export import EXPORTS, export, kohya_file
from finetune.results.export_formats import write_verified
from finetune.run.build import load_base
from finetune.run.context import Run
from finetune.run.html_report import how_to_load, lora_facts, report
from finetune.run.ledger import write_ledger
from finetune.run.provenance import check_model, model_provenance, recorded_dtype
from finetune.run.run_dir import finish
from finetune.training import checkpoint

FILES = ("exports/*.safetensors", "exports/*.yaml", "exports/diffusers", "exports/unet")
"""Patterns of what is written into a run folder here."""

_log = logging.getLogger(__name__)


def load_trained(
    config: ResolvedConfig,
    folder: Path,
    step: int | None = None,
    *,
    ema: bool = True,
    allow_changed: Collection[str] = (),
) -> tuple[DiffusionModel, dict[str, str]]:
    """The model with the weights of a checkpoint, in fp32, and what the run's own LoRA file says of itself.

    Args:
        config: of the run.
        folder: of the run.
        step: of the checkpoint; None: the newest, or what the run has exported, where that is an earlier step.
        ema: take the averaged weights, where there are any.
        allow_changed: "model": the base model may be another than the run was trained from.

    Raises:
        UsageError: there is no such checkpoint, or the base model, its VAE or its text encoder have changed.
        RunError: it holds something else than the config says.
    """
    there = dict(checkpoint.checkpoints(folder))
    newest, step = step is None, step if step is not None else max(there, default=None)
    if step not in there:
        existing = ", ".join(map(str, there)) or "none"
        raise UsageError(f"--run {folder}: no checkpoint{'' if step is None else f' {step}'}; there are: {existing}")
    best = best_of_ended(folder) if newest and ema else None
    weights = best or checkpoint.weights_file(there[step], ema=ema)
    model = load_base(config, locate(config.model), torch.float32)
    started = checkpoint.record(there[step])["about"]
    now = model_provenance(model, recorded_dtype(started))
    check_model(started, now, [*config.allow_changed, *allow_changed])
    learned = {name: p for name, p in model.unet.named_parameters() if p.requires_grad}
    start = start_of(model.unet)
    if read_header(weights).keys() - start.keys() != learned.keys():
        raise RunError(f"{there[step]} holds other parameters than its config.toml says")
    with torch.no_grad():
        for name, tensor in read_tensors(weights, learned):
            learned[name].copy_(tensor)
        if start:
            for name, tensor in read_tensors(checkpoint.weights_file(there[step], ema=False), start):
                start[name].copy_(tensor)
    recorded = kohya_file(folder, None if step == config.max_train_steps or best is not None else step)
    metadata = Adapter.read_metadata(recorded) if recorded.is_file() else {}
    return model, {"modelspec.resolution": f"{config.resolution}x{config.resolution}"} | metadata


def left_out(config: ResolvedConfig, to: Path) -> list[str]:
    """Keys that the run's base, where it is a checkpoint in one file, has more than the one that was written."""
    base = locate(config.model).checkpoint
    return [] if base is None else sorted(base.shapes.keys() - inspect(to).shapes.keys())


def write_exports(config: ResolvedConfig, folder: Path) -> None:
    """Write the forms of `export_formats` that are missing in `exports/` of the folder of an ended run."""
    for left_over in (folder / EXPORTS).glob(".*"):  # of a process that was killed
        remove(left_over)
    for form in config.export_formats:
        to = _place(folder, form)
        if to.exists():
            continue
        to.parent.mkdir(exist_ok=True)
        remove(to.with_suffix(".yaml"))  # of an export that was cut off
        model, metadata = load_trained(config, folder)  # for each: a LoRA is merged for good
        write_verified(model, to, form, precision=config.export_precision, metadata=metadata)


def discard_exports(config: ResolvedConfig, folder: Path) -> None:
    """Delete the forms in `exports/` that a shorter run has left, before its continuation is marked as ended."""
    for form in config.export_formats:
        remove(_place(folder, form))


def _place(folder: Path, form: str) -> Path:
    return folder / EXPORTS / (f"{folder.resolve().name}.safetensors" if form == "single-file" else form)


def finish_run(run: Run) -> None:
    """Export, prove the export, and say where everything is."""
    config, folder, trained, family = run.config, run.folder, run.trainer.steps_done, run.model.family
    if config.early_stop:
        run.early_stopping.restore_best()
        for evaluator in run.evaluators:
            evaluator.run(run.trainer.steps_done)
    run.events.set_phase("exporting", run.trainer.steps_done)
    with run.trainer.export_weights():
        difference = export(run.model, folder, lora_facts(run, final=True))
    run.grids.write_before_after(run.trainer.steps_done)
    write_ledger(folder, config, run.chunks, trained)
    page = report(run, ended=True)
    run.accelerator.end_training()
    result = {"steps": run.trainer.steps_done, "trained": trained, "reloaded_output_difference": difference}
    discard_exports(config, folder)
    finish(folder, result)
    exact = "exactly" if difference == 0 else f"within {difference:.0e}"
    _log.info("%s (verified: reloads %s)", folder, exact, extra=labelled("Exported"))
    for program, how in how_to_load(run).items():
        _log.info(how.replace("\n", "; "), extra=labelled(program))
    prompts = run.grids.plan.prompts
    prompt = f" --prompt {shlex.quote(prompts[0].text)}" if prompts and family.latent else ""
    _log.info("finetune-unet sample --model %s%s", shlex.quote(str(folder)), prompt, extra=labelled("Generate"))
    if (least := run.validation.best_step(trained=False)) is not None:
        untrained = ", before training" if least == 0 else ""
        _log.info("lowest loss at step %s of %s%s", least, trained, untrained, extra=labelled("Validation"))
    if prompts:
        _log.info("%s", folder / "samples", extra=labelled("Samples"))
    if config.lr_scheduler == "constant" and config.data:  # any other schedule has ended
        more = f"--resume_from_checkpoint latest --max_train_steps {2 * config.max_train_steps}"
        command = f"finetune-unet --output_dir {shlex.quote(str(folder))} {more}"
        _log.info(command, extra=labelled("Train longer"))
    _log.info("%s", page, extra=labelled("Report"))
    push(config, folder, family)


def push(config: ResolvedConfig, folder: Path, family: Family) -> None:
    """Upload the run's export to the hub, if the run is to be pushed. Raises RunError as `hub.push` does."""
    if config.push_to_hub:
        condition = image_condition_of(family.image_condition)
        address = hub.push(
            folder,
            config.hub_model_id,
            private=config.hub_private_repo,
            settings=as_settings(config),
            image_inputs=condition.pipeline_example if condition else {},
        )
        _log.info("pushed: %s", address)
