"""When early stopping takes a loss for risen."""

import pytest
import torch

from finetune.evaluators.early_stopping import rises

VALIDATIONS, DRAWS = 20, 2


def stops(losses: torch.Tensor) -> bool:
    """Whether a run of VALIDATIONS stops before its end, given its losses (validations, examples, draws)."""
    for last in range(2, VALIDATIONS + 1):
        seen = {step: losses[step - 1] for step in range(1, last + 1)}
        means = {step: loss.mean().item() for step, loss in seen.items()}
        if rises(seen, min(means, key=means.__getitem__), planned=VALIDATIONS):
            return True
    return False


@pytest.mark.parametrize("examples", [2, 12, 100])
def test_of_400_runs_without_a_trend_at_most_5_percent_stop(examples: int) -> None:
    source = torch.Generator().manual_seed(examples)
    runs = [torch.randn(VALIDATIONS, examples, DRAWS, generator=source) for _ in range(400)]
    assert sum(map(stops, runs)) <= 20


def test_runs_whose_loss_rises_stop() -> None:
    """By half of the spread of an example's loss with each validation, from the fifth on."""
    source = torch.Generator().manual_seed(0)
    trend = 0.5 * (torch.arange(VALIDATIONS) - 5).abs()
    runs = [trend[:, None, None] + torch.randn(VALIDATIONS, 12, DRAWS, generator=source) for _ in range(50)]
    assert sum(map(stops, runs)) == 50


def test_nothing_has_risen_before_there_are_two_after_the_least() -> None:
    low, high = torch.zeros(4, 2), torch.linspace(1.0, 1.1, 8).view(4, 2)
    assert not rises({1: low}, 1, planned=3)
    assert not rises({1: low, 2: high}, 1, planned=3)
    assert rises({1: low, 2: high, 3: high}, 1, planned=3)
