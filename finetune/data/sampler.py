"""Sampler: the order of examples, a pure function of (seed, step), independent of ranks, workers and micro-batches."""

from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import NamedTuple, TypeVar

import numpy as np
import torch

from finetune.errors import UsageError
from finetune.seeding import fold


class Visit(NamedTuple):
    """One look at one example."""

    example: int
    """Index of the example in its dataset."""
    number: int
    """How many times it has been visited before."""


class Turns(NamedTuple):
    """Examples that take turns: each epoch visits the next few of them."""

    examples: Sequence[int]
    """Their indices."""
    visits: int
    """How many visits they get together in an epoch."""


def steps_per_epoch(visits: int, batch_size: int) -> Fraction:
    """Optimizer steps for the visits of an epoch: no whole number where a step runs into the next one."""
    return Fraction(visits, batch_size)


class Sampler:
    """Which examples a step visits: always `batch_size`, of one shape where it can be.

    Every epoch is a fresh permutation of all examples, each as often as it is repeated. Of those of each shape, as many
    full steps are made as there can be; what is left over of all shapes makes mixed steps, and what is left over of
    these goes into the first step of the next epoch. So no step is short, and none teaches few examples at the full
    rate. With one shape for all, this comes to one permutation after the other, cut into steps.

    The examples of each of `turns` get a number of visits in an epoch, however many there are: in one permutation of
    them after the other, across epochs. So are class pictures visited, and sources with a number of samples.

    Args:
        shapes: of each example, a number; what has the same one can be computed together.
        batch_size: examples per optimizer step.
        seed: of the permutations.
        repeats: how many times each example comes in an epoch, 0: never; none: once.
        turns: groups of examples that take turns; their repeats are not used.
    """

    def __init__(
        self,
        shapes: Sequence[int],
        *,
        batch_size: int,
        seed: int,
        repeats: Sequence[int] = (),
        turns: Sequence[Turns] = (),
    ) -> None:
        self.batch_size, self.seed = batch_size, seed
        self._shape_of = shapes
        self._repeats = np.array(repeats or [1] * len(shapes))
        self._trained = np.count_nonzero(self._repeats)
        self._turns = [(np.asarray(examples, int), visits) for examples, visits in turns]
        for examples, _ in self._turns:
            self._repeats[examples] = 0
        self._examples = np.repeat(np.arange(len(shapes)), self._repeats)  # of an epoch's visits, without turns
        self._times = np.arange(len(self._examples)) - np.repeat(self._repeats.cumsum() - self._repeats, self._repeats)
        self.epoch_visits = len(self._examples) + sum(visits for _, visits in self._turns)
        self._orders: dict[tuple[int, int], np.ndarray] = {}
        self._shapes = np.unique(np.asarray(shapes), return_inverse=True)[1]
        self._epochs = -(-batch_size // self.epoch_visits)  # in a round, which is to be no shorter than a step
        self._round = self.epoch_visits * self._epochs  # visits in it
        self._kept: dict[int, np.ndarray] = {}

    def visits(self, step: int) -> list[Visit]:
        """The `batch_size` visits of optimizer step `step` (0 for the first)."""
        number = -(-(step + 1) * self.batch_size // self._round) - 1
        if number not in self._kept:
            self._kept = {number: self._steps(number)}
        row = self._kept[number][step - number * self._round // self.batch_size]
        examples, numbers = self._visited(row)
        return list(map(Visit, examples.tolist(), numbers.tolist()))

    def mean_weight(self, weights: Sequence[float]) -> float:
        """The mean over the visits of an epoch of what each example weighs."""
        total = sum(weights[example] for example in self._examples.tolist())
        for examples, visits in self._turns:
            total += visits * sum(weights[example] for example in examples.tolist()) / len(examples)
        return total / self.epoch_visits

    def _visited(self, visits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The example of each visit, and how many times it was visited before."""
        epochs, places = np.divmod(visits, self.epoch_visits)
        plain = places < len(self._examples)
        examples, numbers = np.empty_like(visits), np.empty_like(visits)
        examples[plain] = self._examples[places[plain]]
        numbers[plain] = epochs[plain] * self._repeats[examples[plain]] + self._times[places[plain]]
        begin = len(self._examples)
        for group, (members, per_epoch) in enumerate(self._turns):
            here = (begin <= places) & (places < begin + per_epoch)
            rounds, at = np.divmod(epochs[here] * per_epoch + places[here] - begin, len(members))
            order = {number: self._turn(group, number) for number in np.unique(rounds).tolist()}
            examples[here] = [order[number][place] for number, place in zip(rounds.tolist(), at.tolist(), strict=True)]
            numbers[here] = rounds
            begin += per_epoch
        return examples, numbers

    def _turn(self, group: int, number: int) -> np.ndarray:
        """The examples of a group of `turns` in the order in which they come for the `number`th time."""
        if (group, number) not in self._orders:
            after = len(self._turns) - 1 - group  # the last group is that of class pictures, where there are any
            seed = fold(self.seed, "class order", number, *([after] if after else []))
            source = torch.Generator().manual_seed(seed & 0xFFFFFFFF)
            members = self._turns[group][0]
            order = members[torch.randperm(len(members), generator=source).numpy()]
            others = {key: kept for key, kept in self._orders.items() if key[0] != group or key[1] == number - 1}
            self._orders = others | {(group, number): order}
        return self._orders[group, number]

    def _shapes_of(self, visits: np.ndarray) -> np.ndarray:
        return self._shapes[self._visited(visits)[0]]

    def share(self, step: int, rank: int = 0, world_size: int = 1) -> tuple[list[Visit], slice]:
        """The visits of a step, those of one shape after each other, and which of them one process computes.

        Args:
            step: 0 for the first.
            rank: of the process, from 0.
            world_size: how many processes there are; each gets as many visits as the others, to one.

        Raises:
            UsageError: there are more processes than visits.
        """
        if world_size > self.batch_size:
            raise UsageError(
                f"{world_size} processes for steps of {self.batch_size} examples: some would have nothing to do"
            )
        alike: dict[int, list[Visit]] = {}
        for visit in self.visits(step):
            alike.setdefault(self._shape_of[visit.example], []).append(visit)
        visits = [visit for some in alike.values() for visit in some]
        return visits, slice(rank * len(visits) // world_size, (rank + 1) * len(visits) // world_size)

    def visited(self, steps: range, rank: int = 0, world_size: int = 1) -> list[int]:
        """The examples that one process visits in these steps, in the order of their first visits."""
        examples = dict[int, None]()
        for visit in self.all_visits(steps, rank, world_size):
            examples[visit.example] = None
            if len(examples) == self._trained:
                break
        return list(examples)

    def all_visits(self, steps: range, rank: int = 0, world_size: int = 1) -> Iterator[Visit]:
        """The visits of one process in these steps, one after the other."""
        for step in steps:
            visits, local_slice = self.share(step, rank, world_size)
            yield from visits[local_slice]

    def _steps(self, number: int) -> np.ndarray:
        """The steps of a round, a row each of visits as `_order` has them."""
        visits, _ = self._order(number)
        early = self._order(number - 1)[1] if number else visits[:0]
        shapes = self._shapes_of(visits)
        by_shape = np.argsort(shapes, kind="stable")
        alike = np.split(by_shape, np.flatnonzero(np.diff(shapes[by_shape])) + 1)
        alike.sort(key=len)  # places in the order, of one shape each; the most frequent last
        begun = early.tolist()
        if begun:
            room = self.batch_size - len(begun)
            begun += visits[alike[-1][:room]].tolist()
            alike[-1] = alike[-1][room:]
        rows, places, loose = [], [], []
        for same in alike:
            left = len(same) % self.batch_size
            loose.append([(place, int(visits[place])) for place in same[:left].tolist()])
            rows.append(visits[same[left:]].reshape(-1, self.batch_size))
            places.append(same[left :: self.batch_size])
        for step in _packed([(-1, visit) for visit in begun], loose, self.batch_size):
            rows.append(np.array([[visit for _, visit in step]]))
            places.append(np.array([min(place for place, _ in step)]))
        return np.concatenate(rows)[np.argsort(np.concatenate(places), kind="stable")]

    def _order(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """The visits of a round, epoch x size of an epoch + place in it, in the order of its permutations, without the
        last few that would fill no step; and these, of the most frequent shapes, which the next round takes first.
        """
        epochs = range(number * self._epochs, (number + 1) * self._epochs)
        order = np.concatenate([self._permutation(epoch) + epoch * self.epoch_visits for epoch in epochs])
        later = (number + 1) * self._round % self.batch_size
        shapes = self._shapes_of(order)
        frequent = np.argsort(np.bincount(shapes)[shapes], kind="stable")[len(order) - later :]
        return np.delete(order, frequent), order[frequent]

    def _permutation(self, epoch: int) -> np.ndarray:
        source = torch.Generator().manual_seed(fold(self.seed, "order", epoch) & 0xFFFFFFFF)
        return torch.randperm(self.epoch_visits, generator=source).numpy()


T = TypeVar("T")


def _packed(begun: list[T], groups: list[list[T]], size: int) -> list[list[T]]:
    """Steps of exactly `size` of what the groups hold, the first one begun already, few groups in more than one step:
    each part of a group is a forward pass of its own.
    """
    steps: list[list[T]] = [[] for _ in range((len(begun) + sum(map(len, groups))) // size)]
    if begun:
        steps[0] = begun
    too_large = []
    for group in sorted(groups, key=len, reverse=True):
        fitting = [step for step in steps if len(step) + len(group) <= size]
        max(fitting, key=len).extend(group) if fitting else too_large.append(group)
    for group in too_large:
        for step in sorted(steps, key=len):
            room = size - len(step)
            step.extend(group[:room])
            group = group[room:]
    return steps
