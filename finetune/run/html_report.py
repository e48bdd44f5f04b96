"""report.html and the training preview of a run, and how its export is loaded."""

import io
import platform
import shlex
from pathlib import Path

import torch

from finetune.atomic_io import write_whole
from finetune.cache.image_source import LiveImages
from finetune.config import as_settings
from finetune.data.sampler import steps_per_epoch
from finetune.results.contact_sheet import contact_sheet
from finetune.results.export import exported, kohya_file
from finetune.results.lora_metadata import LoraFacts, short_hash
from finetune.results.report import REPORT, write_report
from finetune.results.report_sections import SHEET
from finetune.run.context import Run
from finetune.run.run_dir import name_of
from finetune.run.summary import summary_rows
from finetune.seeding import example_key

FILES = (REPORT, SHEET)
"""Patterns of what is written into a run folder here."""


def report(run: Run, *, ended: bool = False) -> Path:
    """Write it again; how the result is loaded only stands there when the run has ended."""
    device = run.trainer.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    facts = summary_rows(run) | {
        "steps done": f"{run.trainer.steps_done} of {run.config.max_train_steps}",
        "machine": f"{name}, torch {torch.__version__}, Python {platform.python_version()}",
    }
    load = how_to_load(run) if ended else {}
    settings = as_settings(run.config)
    given = {name: value for name, value in settings.items() if name in run.config.given}
    derived = {name: value for name, value in settings.items() if name not in run.config.given}
    return write_report(run.folder, step=run.trainer.steps_done, facts=facts, given=given, derived=derived, load=load)


def lora_facts(run: Run, *, final: bool = False) -> dict[str, str]:
    """What a LoRA file says of the run so far, or in the end."""
    config, step, base = run.config, run.trainer.steps_done, Path(run.config.model)
    pictures, sizes = run.pictures, run.pictures.sizes()
    facts = LoraFacts(
        model=base.name if base.is_absolute() else config.model,
        model_hash=short_hash(base) if base.is_file() else None,
        family=run.model.family.layout or run.model.family.name,
        prediction_type=run.trainer.objective.prediction_type,
        resolution=config.resolution,
        batch_size=config.global_batch,
        epoch_steps=float(steps_per_epoch(run.chunks.epoch_visits, config.global_batch)),
        learning_rate=config.learning_rate,
        optimizer=config.optimizer,
        lr_scheduler=config.lr_scheduler,
        seed=config.seed,
        trigger=config.trigger,
        data=name_of(config.data),
        captions=pictures.trained_captions,
        sizes=[sizes[index] for index in pictures.trained],
        repeats=max(run.encoded.repeats, default=1),
        clip_skip=config.clip_skip,
        thumbnail=run.grids.first_picture(step) if final else None,
    )
    title = run.folder.resolve().name
    return facts.metadata(title if final else f"{title}-{step:06d}", step)


def how_to_load(run: Run) -> dict[str, str]:
    """Program -> what to do there with what an ended run has exported."""
    folder = run.folder
    what = exported(folder)
    assert what is not None
    instructions = {"diffusers": what.load.format(folder)}
    if run.model.family.layout is None:  # which no other program knows
        return instructions
    to = f"--format single-file --to {shlex.quote(folder.resolve().name)}.safetensors --precision fp16"
    whole = f"finetune-unet export --run {shlex.quote(str(folder))} {to}"
    if not what.adapter:
        return instructions | {"ComfyUI, A1111, Forge": whole}
    dora = run.config.lora_type == "dora"  # A1111 divides by the norms of columns, which no DoRA of ours has
    instructions["ComfyUI"] = f"copy {kohya_file(folder)} to models/loras, and load it with the node Load LoRA"
    copy = f"copy it to models/Lora; in the prompt: <lora:{folder.resolve().name}:1>"
    return instructions | ({"Forge": copy, "A1111": whole} if dora else {"A1111, Forge": copy})


SHOWN = 20
"""Pictures."""


def write_training_preview(run: Run) -> None:
    """Write it, unless an earlier part of the run has, on what may not have changed since; the pictures are spread over
    all that are trained on.
    """
    path, pictures, trained = run.folder / SHEET, run.pictures, run.pictures.trained
    if path.exists() and not run.config.allow_changed:
        return
    some = [trained[number * len(trained) // SHOWN] for number in range(SHOWN)] if len(trained) > SHOWN else trained
    names = [pictures.ids[index] for index in some]
    visits = LiveImages(pictures, run.model.image_condition)
    cells = [visits.masked_preview(i, example_key(run.config.seed, pictures.ids[i], 0)).latent_params for i in some]
    sheet = contact_sheet(cells, names, [pictures.captions[index] for index in some], [0] * len(some), 0)
    sheet.save(file := io.BytesIO(), "JPEG", quality=85)
    write_whole(path, file.getvalue())
