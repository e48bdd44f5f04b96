"""Rows in parts of one fixed size."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from finetune.models.conditioners import ClipConditioner
from finetune.models.encoders import VaeEncoder
from finetune.models.fixed_batch import FixedBatches, caption_batch_size, image_batch_size, run_in_fixed_batches
from finetune.models.loading import DiffusionModel, load_model


@pytest.fixture(scope="module")
def tiny() -> DiffusionModel:
    return load_model("tiny")


def test_every_part_has_the_same_size_and_what_fills_the_last_is_dropped() -> None:
    sizes = []

    def compute(rows: Tensor) -> tuple[Tensor, Tensor]:
        sizes.append(len(rows))
        return rows + 1, rows.sum(dim=1)

    rows = torch.arange(14.0).view(7, 2)
    more, sums = run_in_fixed_batches(compute, rows, 3)
    assert sizes == [3, 3, 3]
    assert torch.equal(more, rows + 1)
    assert torch.equal(sums, rows.sum(dim=1))


def test_a_gpu_takes_as_many_as_fit_a_fixed_number_of_pixels_and_a_cpu_one() -> None:
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    found = {side: image_batch_size(gpu, side, side) for side in (64, 256, 512, 768, 1024, 2048)}
    assert found == {64: 8, 256: 8, 512: 4, 768: 1, 1024: 1, 2048: 1}
    assert image_batch_size(cpu, 64, 64) == caption_batch_size(cpu) == 1
    assert caption_batch_size(gpu) == 8


def test_a_picture_encodes_alike_among_others_and_alone(tiny: DiffusionModel, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = tiny.encoder
    assert isinstance(encoder, VaeEncoder)
    pixels = torch.linspace(-1, 1, 5 * 3 * 64 * 64).view(5, 3, 64, 64)
    alone = encoder.encode(pixels)
    monkeypatch.setattr(encoder, "batch_size", lambda height, width: 4)
    together = encoder.encode(pixels)
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
    shuffled = torch.tensor([3, 0, 4, 2, 1])
    assert torch.equal(encoder.encode(pixels[shuffled]), together[shuffled])


def test_a_caption_encodes_alike_among_others_and_alone(tiny: DiffusionModel, monkeypatch: pytest.MonkeyPatch) -> None:
    conditioner = tiny.conditioner
    assert isinstance(conditioner, ClipConditioner)
    prompts = ["a butterfly", "", "a blue butterfly on a leaf"]
    alone = torch.cat([conditioner.encode([prompt])["encoder_hidden_states"] for prompt in prompts])
    assert torch.equal(conditioner.encode(prompts)["encoder_hidden_states"], alone)
    monkeypatch.setattr(ClipConditioner, "batch_size", 8)
    together = conditioner.encode(prompts)["encoder_hidden_states"]
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


def test_parts_are_halved_from_the_moment_that_memory_runs_out() -> None:
    parts, sizes = FixedBatches(), []

    def compute(rows: Tensor) -> tuple[Tensor]:
        sizes.append(len(rows))
        if len(rows) > 2:
            raise torch.OutOfMemoryError("not enough")
        return (2 * rows,)

    rows = torch.arange(5.0)
    assert parts.size(8) == 8
    assert torch.equal(parts(compute, rows, 8)[0], 2 * rows)
    assert sizes == [8, 4, 2, 2, 2]
    assert (parts.most, parts.size(8), parts.size(1)) == (2, 2, 1)
    parts(compute, rows, 8)
    assert sizes[5:] == [2, 2, 2]


def test_memory_that_does_not_suffice_for_one_row_is_an_error_and_so_is_any_other() -> None:
    def failing(error: Exception) -> Callable[[Tensor], tuple[Tensor]]:
        def compute(rows: Tensor) -> tuple[Tensor]:
            raise error

        return compute

    with pytest.raises(torch.OutOfMemoryError, match="not enough"):
        FixedBatches()(failing(torch.OutOfMemoryError("not enough")), torch.zeros(3), 4)
    with pytest.raises(RuntimeError, match="another"):
        FixedBatches()(failing(RuntimeError("another")), torch.zeros(3), 4)
