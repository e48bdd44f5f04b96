"""What a step was made of that was not finite: faults.jsonl of a run folder."""

import torch

from finetune.results import tracking
from finetune.run.assembly import sampler
from finetune.run.parts import Run
from finetune.seeding import example_key
from finetune.training.metrics import Fault
from finetune.training.objective import timesteps


def record_fault(run: Run, fault: Fault) -> None:
    """Write a line: the step's loss and norm, and id, timestep, caption and loss of each of its examples.

    All of it is a function of seed and step, so it is known here of what another process has computed, too.
    """
    (stretch,) = run.volumes.stretches(range(fault.step - 1, fault.step), run.config.global_batch)
    pictures = run.volumes.at(stretch.volume)
    visits, _ = sampler(run.config, pictures).share(stretch.own.start)
    keys = [example_key(run.config.seed, pictures.ids[visit.example], visit.number) for visit in visits]
    times = timesteps(torch.tensor(keys), run.model.scheduler.config["num_train_timesteps"]).tolist()
    seen = []
    for visit, key, t in zip(visits, keys, times, strict=True):
        caption = run.encoded.captioning.caption(pictures.texts(visit.example), key)
        seen.append({"id": pictures.ids[visit.example], "timestep": t, "caption": caption})
    tracking.note_fault(run.folder, fault, seen)
