from collections import Counter
from itertools import groupby
from math import ceil

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune.data.sampler import Sampler, Turns, Visit, steps_per_epoch
from finetune.errors import UsageError

SHAPES = st.lists(st.integers(0, 6), min_size=1, max_size=40)


@given(shapes=SHAPES, batch_size=st.integers(1, 50), seed=st.integers(0, 3), epochs=st.integers(1, 4))
def test_every_step_is_whole_and_each_epoch_visits_every_example_once(
    shapes: list[int], batch_size: int, seed: int, epochs: int
) -> None:
    sampler = Sampler(shapes, batch_size=batch_size, seed=seed)
    steps = [sampler.visits(step) for step in range(ceil(epochs * steps_per_epoch(len(shapes), batch_size)))]
    assert {len(step) for step in steps} == {batch_size}
    counts = Counter(visit for step in steps for visit in step)
    assert max(counts.values()) == 1
    if batch_size <= len(shapes):  # else an epoch ends somewhere in a step
        assert all(Visit(example, epoch) in counts for example in range(len(shapes)) for epoch in range(epochs))


@given(shapes=SHAPES, batch_size=st.integers(1, 12), step=st.integers(0, 60))
def test_a_step_is_the_same_whatever_was_asked_before(shapes: list[int], batch_size: int, step: int) -> None:
    running, jumping = (Sampler(shapes, batch_size=batch_size, seed=1) for _ in range(2))
    for before in range(step):
        running.visits(before)
    assert running.visits(step) == jumping.visits(step)


@given(size=st.integers(1, 40), batch_size=st.integers(1, 50), step=st.integers(0, 20))
def test_with_one_shape_permutations_follow_one_another_without_a_gap(size: int, batch_size: int, step: int) -> None:
    """In the order, and with the bits, of versions that knew no other."""
    sampler = Sampler([0] * size, batch_size=batch_size, seed=2)
    visits = [visit for number in range(step + 1) for visit in sampler.visits(number)]
    assert [visit.number for visit in visits] == [place // size for place in range(len(visits))]
    for epoch, same in groupby(visits, key=lambda visit: visit.number):
        examples = [visit.example for visit in same]
        assert examples == sampler._permutation(epoch).tolist()[: len(examples)]


def passes(sampler: Sampler, shapes: list[int], steps: int) -> int:
    """Forward passes, when what has one shape is computed together."""
    return sum(len({shapes[visit.example] for visit in sampler.visits(step)}) for step in range(steps))


@pytest.mark.parametrize("seed", range(5))
def test_mixed_steps_cost_few_forward_passes_more_than_pure_buckets(seed: int) -> None:
    shapes = [0] * 60 + [1] * 55 + [2] * 30 + [3] * 20 + [4] * 12 + [5] * 9 + [6] * 6 + [7] * 4 + [8] * 2 + [9, 10]
    assert len(shapes) == 200
    pure = sum(ceil(count / 4) for count in Counter(shapes).values())
    epochs = 20
    mixed = passes(Sampler(shapes, batch_size=4, seed=seed), shapes, epochs * 50)
    assert mixed <= 1.1 * epochs * pure
    assert mixed >= epochs * 50


def test_most_steps_are_of_one_shape() -> None:
    shapes = [0] * 100 + [1] * 101
    sampler = Sampler(shapes, batch_size=4, seed=0)
    assert sum(len({shapes[visit.example] for visit in sampler.visits(step)}) == 1 for step in range(50)) >= 49


def test_twelve_photos_of_mixed_shape_at_batch_four_make_three_steps_an_epoch() -> None:
    sampler = Sampler([0, 0, 0, 0, 0, 1, 1, 1, 2, 2, 3, 4], batch_size=4, seed=0)
    for epoch in range(3):
        visits = [visit for step in range(3) for visit in sampler.visits(3 * epoch + step)]
        assert sorted(visits) == [(example, epoch) for example in range(12)]


def test_order_differs_between_epochs_and_seeds_and_is_the_same_in_each_run() -> None:
    def order(seed: int, epoch: int, batch_size: int = 50) -> list[int]:
        sampler = Sampler([0] * 50, batch_size=batch_size, seed=seed)
        return [visit.example for visit in sampler.visits(epoch)]

    assert order(0, 0) != order(0, 1)
    assert order(0, 0) != order(1, 0)
    assert order(0, 0)[:8] == order(0, 0, batch_size=8)


def test_five_photos_at_batch_four_take_four_at_every_step() -> None:
    sampler = Sampler([0] * 5, batch_size=4, seed=0)
    assert [len(sampler.visits(step)) for step in range(5)] == [4] * 5
    assert [visit.number for visit in sampler.visits(1)] == [0, 1, 1, 1]


def test_what_a_run_visits_comes_in_the_order_of_its_visits() -> None:
    sampler = Sampler([0] * 50, batch_size=4, seed=0)
    expected = [visit.example for step in range(3) for visit in sampler.visits(step)]
    assert sampler.visited(range(3)) == expected
    assert sorted(sampler.visited(range(1000))) == list(range(50))


def test_twelve_photos_at_batch_four_make_three_steps_an_epoch_and_five_one_and_a_quarter() -> None:
    assert (steps_per_epoch(12, 4), steps_per_epoch(5, 4)) == (3, 1.25)


@given(shapes=SHAPES, batch_size=st.integers(1, 12), world_size=st.integers(1, 5), step=st.integers(0, 9))
def test_processes_share_a_step_evenly_and_leave_nothing_out(
    shapes: list[int], batch_size: int, world_size: int, step: int
) -> None:
    sampler = Sampler(shapes, batch_size=batch_size, seed=1)
    if world_size > batch_size:
        with pytest.raises(UsageError, match="some would have nothing to do"):
            sampler.share(step, 0, world_size)
        return
    visits, _ = sampler.share(step, 0, world_size)
    parts = [visits[sampler.share(step, rank, world_size)[1]] for rank in range(world_size)]
    assert [visit for part in parts for visit in part] == visits
    assert Counter(visits) == Counter(sampler.visits(step))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    together = [shapes[visit.example] for visit in visits]
    assert len(list(groupby(together))) == len(set(together))  # what has one shape stands together


@given(batch_size=st.integers(1, 9), seed=st.integers(0, 3))
def test_each_group_gets_its_visits_and_its_examples_take_turns(batch_size: int, seed: int) -> None:
    groups = [Turns([2, 3, 4, 5, 6], 2), Turns([7, 8, 9], 4)]
    sampler = Sampler([0] * 10, batch_size=batch_size, seed=seed, repeats=[3, 1, *[1] * 8], turns=groups)
    assert sampler.epoch_visits == 10
    visits = [visit for step in range(60 // batch_size) for visit in sampler.visits(step)]
    for epoch in range(len(visits) // 10):
        of_epoch = Counter(visit.example for visit in visits[epoch * 10 : epoch * 10 + 10])
        assert (of_epoch[0], of_epoch[1]) == (3, 1)
        assert [sum(of_epoch[example] for example in group.examples) for group in groups] == [2, 4]
    for examples, _ in groups:  # nobody comes again before all others have come
        of_group = [visit for visit in visits if visit.example in examples]
        assert max(visit.number for visit in of_group) - min(Counter(v.example for v in of_group).values()) <= 1
        assert len(set(of_group)) == len(of_group)
    assert sampler.mean_weight([1.0, 2.0, *[0.5] * 5, *[3.0] * 3]) == (3 + 2 + 2 * 0.5 + 4 * 3) / 10
