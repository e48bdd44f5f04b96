import pytest
import torch
from diffusers.training_utils import EMAModel

from finetune.training.ema import Ema, decay


def test_decay_follows_the_power_function_up_to_its_limit() -> None:
    assert decay(0) == 0.0
    assert decay(15, power=0.5) == pytest.approx(0.75)
    assert decay(10**9, max_decay=0.99) == 0.99


def test_averages_equal_diffusers_ema() -> None:
    source = torch.Generator().manual_seed(0)
    weight = torch.nn.Parameter(torch.zeros(3))
    ours = Ema({"w": weight}, inv_gamma=1.0, power=0.75, max_decay=0.9)
    theirs = EMAModel([weight], decay=0.9, use_ema_warmup=True, inv_gamma=1.0, power=0.75)
    for step in range(30):
        weight.data = torch.randn(3, generator=source)
        ours.update(step)
        theirs.step([weight])
    # diffusers starts counting one step later: its decay at its n-th call is ours at step n - 1
    torch.testing.assert_close(ours.shadow["w"], theirs.shadow_params[0], rtol=1e-5, atol=1e-6)


def test_swapping_in_shows_the_average_and_puts_the_weights_back_even_after_an_error() -> None:
    weight = torch.nn.Parameter(torch.zeros(2))
    ema = Ema({"w": weight})
    ema.update(0)
    weight.data = torch.ones(2)
    with ema.swapped_in():
        assert weight.tolist() == [0, 0]
    assert weight.tolist() == [1, 1]
    with pytest.raises(ZeroDivisionError), ema.swapped_in():
        raise ZeroDivisionError
    assert weight.tolist() == [1, 1]
