"""Data loading: the batches of a run, prepared by worker processes if wanted."""

import signal
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch.utils.data import DataLoader, Dataset

from finetune.batch import Batch, GlobalStep
from finetune.data.caption_augmentation import RunProgress
from finetune.data.sampler import Sampler, Turns, Visit
from finetune.errors import UsageError
from finetune.seeding import example_key


class Examples(Protocol):
    """Examples that can be visited: what `finetune.encode` returns."""

    @property
    def ids(self) -> Sequence[str]: ...

    @property
    def shapes(self) -> Sequence[int]:
        """A number for each example; examples of one number have one size and can be computed together."""
        ...

    @property
    def repeats(self) -> Sequence[int]:
        """How many times each example comes in an epoch."""
        ...

    @property
    def turns(self) -> Sequence[Turns]:
        """Groups of examples that take turns, whatever their repeats, each with its visits in an epoch."""
        ...

    @property
    def weights(self) -> Sequence[float]:
        """How much each counts in the loss of a step, beside the others."""
        ...

    @property
    def visits(self) -> "Visits": ...

    def ensure_encoded(self, visits: Sequence[tuple[int, int]]) -> None:
        """Encode what these visits (index, sample key) need and is not there yet; runs in the training process,
        just before they are."""
        ...

    def collate(
        self, indices: Sequence[int], keys: torch.Tensor, loaded: Sequence[Any], progress: RunProgress | None = None
    ) -> Batch:
        """Loaded visits of one shape -> a Batch; runs in the training process."""
        ...


class Visits(Protocol):
    """The part of it that worker processes run."""

    needs_workers: bool
    """Whether something is prepared at a visit; workers would otherwise only be sent copies."""

    def load(self, index: int, key: int) -> Any:
        """What one visit needs, on the CPU."""
        ...


class _Loads(Dataset):
    """Visits as DataLoader wants them: (index, key) -> index, key and what was loaded."""

    def __init__(self, visits: Visits):
        self.visits = visits

    def __getitem__(self, visit: tuple[int, int]) -> tuple[int, int, Any]:
        index, key = visit
        return index, key, self.visits.load(index, key)


def _keep(items: list[Any]) -> list[Any]:
    return items


def _ignore_signals(worker: int) -> None:
    """A signal to the process group is for the training process; workers that died of it would break its last step.

    A second SIGTERM is obeyed: a worker that waits for one that has died is ended so.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, _: signal.signal(number, signal.SIG_DFL))


def training_steps(
    source: Examples,
    *,
    batch_size: int,
    steps: int,
    seed: int = 0,
    start: int = 0,
    num_workers: int = 0,
    device: torch.device | str = "cpu",
    rank: int = 0,
    world_size: int = 1,
    steps_before: int = 0,
) -> Iterator[tuple[Batch, ...]]:
    """The optimizer steps `start` to `steps` (not included), each of `batch_size` examples: a batch for each shape.

    Args:
        source: from `encode`.
        batch_size: examples per optimizer step.
        steps: length of the whole run, in optimizer steps.
        seed: decides order and every draw at every visit.
        start: the first step wanted; a resumed run gets the very batches it would have had.
        num_workers: processes that load visits; changes nothing but speed. None are started for what is in memory.
        device: where the tensors go (the keys stay on the CPU).
        rank: of this process among those that train together; it gets its part of each step.
        world_size: how many there are.
        steps_before: of the run, before step 0 of this source.

    Raises:
        UsageError: the source is empty, a size is below 1, or there are more processes than examples in a step.
    """
    if batch_size < 1 or not source.ids:
        raise UsageError(f"batches: batch_size {batch_size} and {len(source.ids)} examples; at least 1 of each needed")
    sampler = Sampler(
        source.shapes,
        batch_size=batch_size,
        seed=seed,
        repeats=source.repeats,
        turns=source.turns,
    )
    weight = batch_size * sampler.mean_weight(source.weights)
    shared = world_size > 1 or len(set(source.weights)) > 1
    loader = DataLoader(
        _Loads(source.visits),
        batch_sampler=_Plan(
            _plan(source, sampler, seed=seed, steps=range(start, steps), rank=rank, world_size=world_size)
        ),
        num_workers=num_workers if source.visits.needs_workers else 0,
        collate_fn=_keep,
        worker_init_fn=_ignore_signals,
        generator=torch.Generator(),  # DataLoader draws a seed for its workers; not from the global one
    )
    for step, items in enumerate(_received(loader), start):
        global_step = _global_step_of(source, weight, *sampler.share(step, rank, world_size), seed) if shared else None
        alike: dict[int, list[tuple[int, int, Any]]] = {}
        for item in items:
            alike.setdefault(source.shapes[item[0]], []).append(item)
        groups = [zip(*some, strict=True) for some in alike.values()]
        progress = RunProgress(step + steps_before, step * batch_size // sampler.epoch_visits)
        made = [source.collate(indices, torch.tensor(keys), loaded, progress) for indices, keys, loaded in groups]
        yield tuple(replace(batch.to(device), global_step=global_step) for batch in made)


def _received(loaded: Iterable[list[Any]]) -> Iterator[list[Any]]:
    """What workers send. The connection to one that is killed breaks before torch's signal handler says that it died:
    that error, which tells more, comes in the second that is waited for it.
    """
    try:
        yield from loaded
    except (ConnectionError, EOFError):
        time.sleep(1)
        raise


def batches(
    source: Examples,
    *,
    batch_size: int,
    steps: int,
    seed: int = 0,
    start: int = 0,
    num_workers: int = 0,
    device: torch.device | str = "cpu",
) -> Iterator[Batch]:
    """`training_steps` for pictures of one shape: each step is one batch. The arguments are the same.

    Raises:
        UsageError: the pictures are of several shapes (they have buckets), or as `training_steps` does.
    """
    if len(set(source.shapes)) > 1:
        raise UsageError("batches: the images are of several shapes; use training_steps, and Trainer.step(*batches)")
    steps_of_run = training_steps(
        source, batch_size=batch_size, steps=steps, seed=seed, start=start, num_workers=num_workers, device=device
    )
    for (batch,) in steps_of_run:
        yield batch


def _plan(
    source: Examples, sampler: Sampler, seed: int, steps: range, rank: int, world_size: int
) -> Iterator[list[tuple[int, int]]]:
    """This process's visits of each step, index and key, ready to be loaded."""
    for step in steps:
        visits, local_slice = sampler.share(step, rank, world_size)
        keyed = [
            (visit.example, example_key(seed, source.ids[visit.example], visit.number)) for visit in visits[local_slice]
        ]
        source.ensure_encoded(keyed)
        yield keyed


def _global_step_of(source: Examples, weight: float, visits: list[Visit], local_slice: slice, seed: int) -> GlobalStep:
    ids = tuple(source.ids[visit.example] for visit in visits)
    keys = tuple(example_key(seed, name, visit.number) for name, visit in zip(ids, visits, strict=True))
    return GlobalStep(ids, weight, local_slice.start, keys)


class _Plan:
    """DataLoader reads a batch sampler once; it only needs to be iterable."""

    def __init__(self, plan: Iterator[list[tuple[int, int]]]):
        self.plan = plan

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        return self.plan
