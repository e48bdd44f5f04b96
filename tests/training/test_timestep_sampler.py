import pytest
import torch

from finetune import seeding
from finetune.errors import UsageError
from finetune.training.timestep_sampler import Distribution, TimestepSampler

KEYS = torch.arange(4000)


def test_uniform_timesteps_are_those_of_the_key() -> None:
    assert torch.equal(TimestepSampler().integers(KEYS[:50]), seeding.integers(KEYS[:50], "timestep", 1000))


@pytest.mark.parametrize(
    ("sampler", "quartiles"),
    [
        # The logistic function of the quartiles of a normal variable, 0 and +-0.6745.
        (TimestepSampler("logit_normal"), (337.5, 500.0, 662.5)),
        (TimestepSampler("logit_normal", logit_mean=1.0, logit_std=0.5), (659.9, 731.1, 792.0)),
        (TimestepSampler("sigmoid", logit_mean=1.0), (337.5, 500.0, 662.5)),
        # I(x; 2, 2) = 3 x^2 - 2 x^3 is 0.25 at 0.32635.
        (TimestepSampler("beta"), (326.4, 500.0, 673.6)),
        # I(x; 2, 1) = x^2.
        (TimestepSampler("beta", beta_beta=1.0), (500.0, 707.1, 866.0)),
        (TimestepSampler("beta", beta_beta=1.0, min_timestep=500), (750.0, 853.6, 933.0)),
    ],
)
def test_distributions_have_the_quartiles_that_the_formula_says(
    sampler: TimestepSampler, quartiles: tuple[float, float, float]
) -> None:
    t = sampler.integers(KEYS)
    assert t.dtype == torch.int64
    assert t.min() >= sampler.min_timestep
    assert t.max() < 1000
    measured = t.double().quantile(torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64))
    assert measured.tolist() == pytest.approx(quartiles, abs=15)
    assert torch.equal(sampler.integers(KEYS[10:12]), t[10:12])


def test_a_shift_moves_the_distribution_towards_noise() -> None:
    plain = TimestepSampler().continuous(KEYS) / 1000
    shifted = TimestepSampler().continuous(KEYS, shift=3.0) / 1000
    torch.testing.assert_close(shifted, 3 * plain / (1 + 2 * plain))
    assert TimestepSampler(min_timestep=100, max_timestep=200).continuous(KEYS, shift=3.0).max() <= 200


@pytest.mark.parametrize("distribution", ["logit_normal", "beta"])
def test_an_extreme_distribution_stays_in_the_range(distribution: Distribution) -> None:
    sampler = TimestepSampler(distribution, logit_mean=50.0, beta_beta=1e-6, min_timestep=3, max_timestep=7)
    assert set(sampler.integers(KEYS[:100]).tolist()) == {6}


def test_an_empty_range_is_refused() -> None:
    with pytest.raises(UsageError, match="min_timestep = 900: expected 0 to 99, below max_timestep = 100"):
        TimestepSampler(min_timestep=900, max_timestep=100)
