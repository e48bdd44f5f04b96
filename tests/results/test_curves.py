"""Curves as SVG, and the loss of a long run in a bounded number of points."""

import pytest

from finetune.results.curves import LossCurve, curve, spread


def test_a_curve_stays_in_its_frame() -> None:
    usual = [(float(step), 1.0) for step in range(99)]
    drawn = curve('a "b"', [(0, 1.0), (98, 3.0)], faint=[*usual, (50.0, 99.0)], level=0.0)  # the spike is cut off
    line = drawn.split('class="line" points="')[1].split('"')[0]
    assert line == "64.0,146.0 708.0,10.0"
    assert 'aria-label="a &quot;b&quot;"' in drawn
    assert curve("one point", [(3, 1.0)])


def test_each_loss_is_a_point_and_the_average_follows_by_a_twentieth() -> None:
    losses = LossCurve([(1, 1.0), (2, 2.0)])
    assert losses.losses == [(1, 1.0), (2, 2.0)]
    assert losses.averages == [(1, 1.0), (2, 1.05)]
    assert (losses.last_step, losses.last_average) == (2, 1.05)
    assert (LossCurve().losses, LossCurve().last_step, LossCurve().last_average) == ([], None, None)


@pytest.mark.parametrize("steps", [601, 2400, 5001])
def test_a_long_run_has_a_bounded_number_of_points_that_are_means(steps: int) -> None:
    losses = LossCurve((step, 2.0 * step) for step in range(steps))
    assert losses.MOST // 2 <= len(losses.losses) <= losses.MOST
    assert losses.losses[0] == ((losses.stride - 1) / 2, losses.stride - 1)
    assert losses.last_step == steps - 1
    average = 0.0
    for step in range(steps):
        average += 0.05 * (2.0 * step - average)
    assert losses.last_average == pytest.approx(average)


def test_what_came_after_a_checkpoint_is_cut() -> None:
    losses = LossCurve((step, 1.0) for step in range(1000))
    assert losses.stride == 2
    losses.cut(500)
    assert losses.last_step == 499
    losses.add(500, 3.0)
    assert losses.averages[-1] == (500, 1.1)


def test_items_are_spread_evenly_up_to_the_last() -> None:
    assert spread(range(10), 5) == [1, 3, 5, 7, 9]
    assert spread(range(11), 5) == [1, 4, 7, 10]
    assert spread([1, 2]) == [1, 2]
    assert spread([]) == []
