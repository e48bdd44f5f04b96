"""Two processes on one step; whole runs of two are in tests/run/test_processes.py."""

import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from finetune.batch import Batch, GlobalStep
from finetune.errors import Elsewhere, RunError
from finetune.training.distributed import Parallel, _meeting, from_environment
from tests.processes import together
from tests.small_trainer import small_batch, small_trainer


def added_up(bucket: int) -> list[torch.Tensor]:
    import finetune.training.distributed as module

    module._BUCKET = bucket
    parallel = from_environment()
    tensors = [torch.full((2, 3), 1.0 + parallel.rank), torch.arange(5.0) * 10**parallel.rank, torch.ones(())]
    parallel.all_reduce_sum(tensors)
    return tensors


@pytest.mark.parametrize("bucket", [1, 7, 1000])
def test_tensors_are_added_up_whatever_the_size_of_a_bucket(bucket: int) -> None:
    for tensors in together(added_up, bucket):
        assert torch.equal(tensors[0], torch.full((2, 3), 3.0))
        assert torch.equal(tensors[1], torch.arange(5.0) * 11)
        assert tensors[2] == 2


def agreed(folder: Path) -> tuple[int, bool, bool, list[str]]:
    parallel = from_environment()
    with parallel.main_process_first():
        found = sorted(path.name for path in folder.iterdir())
        if parallel.is_main_process:
            time.sleep(0.2)  # the other has the time to be too early
            (folder / "made").touch()
    return parallel.all_reduce_max(7 - parallel.rank), parallel.all_equal("x"), parallel.all_equal(parallel.rank), found


def test_they_agree_and_the_first_goes_first(tmp_path: Path) -> None:
    assert together(agreed, tmp_path) == [(7, True, False, []), (7, True, False, ["made"])]


def test_one_alone_agrees_with_itself() -> None:
    alone = Parallel()
    (tensor,) = (torch.ones(2),)
    alone.all_reduce_sum([tensor])
    assert (alone.is_main_process, alone.all_reduce_max(3), alone.all_equal("x"), tensor.tolist()) == (
        True,
        3,
        True,
        [1, 1],
    )


def left_alone() -> float:
    parallel, clock = from_environment(), time.monotonic()
    if parallel.is_main_process:  # the other ends
        with pytest.raises(Elsewhere):
            parallel.all_reduce_max(0)
    return time.monotonic() - clock


def test_a_process_that_ends_is_noticed_at_once() -> None:
    waited, _ = together(left_alone)
    assert waited < 10


def part(batch: Batch, number: int, spoilt: bool = False) -> Batch:
    """One of the two examples, as the loader gives it to one of two processes."""
    one = list(batch.split(1))[number]
    latent_params = one.latent_params.float() * float("nan") if spoilt else one.latent_params
    return replace(
        one, latent_params=latent_params, global_step=GlobalStep(("a", "b"), float(batch.weight.sum()), number)
    )


def weighted() -> Batch:
    return replace(small_batch(), weight=torch.tensor([1.0, 3.0]))


def three_steps(method: str) -> tuple[list[float], list[float | None], dict[str, torch.Tensor]]:
    parallel = from_environment()
    trainer = small_trainer(method, parallel=parallel)
    made = [trainer.step(part(weighted(), parallel.rank)) for _ in range(3)]
    return [one.loss for one in made], [one.grad_norm for one in made], dict(trainer.state_dict()["weights"])


@pytest.mark.parametrize("method", ["lora", "full"])
def test_two_processes_make_the_step_that_one_makes(method: str) -> None:
    (losses, norms, weights), other = together(three_steps, method)
    alone = small_trainer(method)
    made = [alone.step(weighted()) for _ in range(3)]
    assert losses == pytest.approx([one.loss for one in made], rel=1e-5)
    assert norms == pytest.approx([one.grad_norm for one in made], rel=1e-5)
    assert (losses, norms) == other[:2]
    assert all(torch.equal(weight, other[2][name]) for name, weight in weights.items())


def spoilt_step() -> tuple[str, bool]:
    parallel = from_environment()
    trainer = small_trainer("full", parallel=parallel)
    before = {name: p.detach().clone() for name, p in trainer.parameters.items()}
    with pytest.raises(RunError) as told:
        trainer.step(part(small_batch(), parallel.rank, spoilt=parallel.rank == 1)).as_dict()
    return str(told.value), all(torch.equal(p, before[name]) for name, p in trainer.parameters.items())


def test_what_is_not_finite_in_one_process_is_named_by_all_and_changes_no_weight() -> None:
    for said, unchanged in together(spoilt_step):
        assert said.startswith("step 1: the loss is not finite for b; no weight was changed")
        assert unchanged


def test_memory_that_runs_out_in_a_reduction_is_told_as_that() -> None:
    with pytest.raises(torch.OutOfMemoryError), _meeting():
        raise torch.OutOfMemoryError("no more")
    with pytest.raises(Elsewhere), _meeting():
        raise RuntimeError("connection closed by peer")
