"""finetune-unet inspect: rebuild and show one step of a run."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from finetune.config import load_resolved
from finetune.errors import UsageError

if TYPE_CHECKING:
    from finetune.batch import Batch
    from finetune.cache.encoded_dataset import EncodedDataset
    from finetune.data.caption_augmentation import RunProgress
    from finetune.training.trainer import Trainer


@dataclass(frozen=True, kw_only=True)
class Options:
    """Rebuild one step of a run: its images, captions, tokens and timesteps, and its loss if the weights exist."""

    run: str
    """Run folder."""
    step: int
    """Number of the step, from 1."""
    output: str | None = None
    """Contact sheet to write. Default: step-N.png in the run folder."""


def run(options: Options) -> None:
    """Write a contact sheet of the step's pictures; print each with its caption, tokens, timestep and loss.

    Raises:
        UsageError: no such run or step, or a run on a dataset of Python's.
        FinetuneError: as training does.
    """
    import torch

    from finetune.data.caption_augmentation import RunProgress
    from finetune.data.loader import training_steps
    from finetune.models.model_info import locate
    from finetune.results.contact_sheet import contact_sheet
    from finetune.run.build import assembled
    from finetune.run.build_dataset import identity, open_pictures
    from finetune.run.run_dir import is_data_of

    folder = Path(options.run).expanduser()
    if not (folder / "config.toml").is_file():
        raise UsageError(f"--run {folder}: no run folder")
    config = load_resolved(folder / "config.toml")
    if not 1 <= options.step <= config.max_train_steps:
        raise UsageError(f"--step {options.step}: expected 1 to {config.max_train_steps}")
    if not config.data:
        raise UsageError(
            f"--run {folder}: it was trained on a dataset of a Python program, which is not available here"
        )
    model_info, device = locate(config.model), torch.device("cuda" if torch.cuda.is_available() else "cpu")
    chunks = open_pictures(config, model_info, None)
    if not is_data_of(folder, identity(chunks)):
        print("note: the images, their names or captions differ from those of the run")
    ((chunk, steps),) = chunks.chunk_steps(range(options.step - 1, options.step), config.global_batch)
    _, encoded, trainer = assembled(config, model_info, chunks.at(chunk), device, steps=steps)
    (batches,) = training_steps(
        encoded,
        batch_size=config.global_batch,
        steps=steps.stop,
        seed=config.seed,
        start=steps.start,
        steps_before=options.step - 1 - steps.start,
    )
    losses = _losses(trainer, batches, folder, options.step, config.max_train_steps)
    timesteps = [int(t) for part in trainer.prepare(*batches).parts for t in part.drawn.t]
    epoch = steps.start * config.global_batch // encoded.epoch_visits
    captions, pixels = _pixels(encoded, batches, RunProgress(options.step - 1, epoch))
    tokens, limit = encoded.conditioner.token_counts(captions), encoded.conditioner.token_limit
    ids = [name for batch in batches for name in batch.ids]
    names = []
    for number, name in enumerate(ids):
        loss = f", loss {losses[number]:.4f}" if losses else ""
        names.append(f"t {timesteps[number]}{loss}: {name}")
        length = f", {tokens[number]} of {limit} tokens" if limit else ""
        print(f"{name}: timestep {timesteps[number]}{loss}{length}, {captions[number]!r}")
    path = Path(options.output).expanduser() if options.output else folder / f"step-{options.step}.png"
    try:
        contact_sheet(pixels, names, captions, tokens, limit).save(path)
    except (OSError, ValueError) as error:
        raise UsageError(f"--output {path} cannot be written: {error}") from error
    print(path)


def _losses(trainer: "Trainer", batches: "tuple[Batch, ...]", folder: Path, step: int, last: int) -> list[float]:
    """The loss of each example, where the weights before the step are kept; and that of the step, beside the log."""
    import json

    from finetune.training import checkpoint

    there = dict(checkpoint.checkpoints(folder))
    if step > 1 and step - 1 not in there:
        steps = ", ".join(str(saved + 1) for saved in (0, *there) if saved < last)
        print(f"the loss cannot be recomputed: no checkpoint {step - 1}; possible for these steps: {steps}")
        return []
    if step > 1:
        trainer.load_state_dict(checkpoint.load(there[step - 1]))
    prepared = trainer.prepare(*batches)
    losses = trainer.backward(prepared).cpu()
    weights = [weight for batch in batches for weight in batch.weight.tolist()]
    loss = sum(w * one for w, one in zip(weights, losses.tolist(), strict=True)) / sum(weights)
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    logged = {line["step"]: line["loss"] for line in map(json.loads, lines)}.get(step)
    print(f"step {step}: loss {loss:.6f}, in metrics.jsonl {'none' if logged is None else f'{logged:.6f}'}")
    return losses.tolist()


def _pixels(
    encoded: "EncodedDataset", batches: "tuple[Batch, ...]", progress: "RunProgress"
) -> "tuple[list[str], list]":
    """Caption and pixels of each example, as the step had them."""
    captions, pixels = [], []
    places = {name: index for index, name in enumerate(encoded.ids)}
    for batch in batches:
        for name, key in zip(batch.ids, batch.keys.tolist(), strict=True):
            index = places[name]
            captions.append(encoded.caption(index, key, progress))
            pixels.append(encoded.visits.preview_pixels(index, key))
    return captions, pixels
