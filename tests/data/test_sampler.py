from collections import Counter
from math import ceil

from hypothesis import given
from hypothesis import strategies as st

from finetune.data.sampler import step_visits, steps_per_epoch


@given(size=st.integers(1, 40), batch_size=st.integers(1, 50), seed=st.integers(0, 3), epoch=st.integers(0, 3))
def test_every_step_is_whole_and_each_epoch_visits_every_example_once(
    size: int, batch_size: int, seed: int, epoch: int
) -> None:
    steps = ceil((epoch + 1) * steps_per_epoch(size, batch_size))
    batches = [step_visits(step, size=size, batch_size=batch_size, seed=seed) for step in range(steps)]
    assert {len(batch) for batch in batches} == {batch_size}
    visits = [visit for batch in batches for visit in batch]
    assert Counter(visits[epoch * size : (epoch + 1) * size]) == {(i, epoch): 1 for i in range(size)}


def test_order_differs_between_epochs_and_seeds_and_is_the_same_in_each_run() -> None:
    def order(seed: int, epoch: int) -> list[int]:
        return [visit.example for visit in step_visits(epoch, size=50, batch_size=50, seed=seed)]

    assert order(0, 0) != order(0, 1)
    assert order(0, 0) != order(1, 0)
    assert order(0, 0)[:8] == [visit.example for visit in step_visits(0, size=50, batch_size=8, seed=0)]


def test_five_photos_at_batch_four_take_four_at_every_step() -> None:
    assert [len(step_visits(step, size=5, batch_size=4, seed=0)) for step in range(5)] == [4] * 5
    assert [visit.number for visit in step_visits(1, size=5, batch_size=4, seed=0)] == [0, 1, 1, 1]


def test_twelve_photos_at_batch_four_make_three_steps_an_epoch_and_five_one_and_a_quarter() -> None:
    assert (steps_per_epoch(12, 4), steps_per_epoch(5, 4)) == (3, 1.25)
