import pytest
import torch

from finetune.errors import UsageError
from finetune.training.backend import TUNING_PAYS_AFTER, gpu_algorithms, resolve_precision, tuning_pays


@pytest.mark.parametrize(("native", "expected"), [(True, "bf16"), (False, "fp16")])
def test_a_gpu_computes_in_half_precision_also_where_it_has_no_bf16(
    monkeypatch: pytest.MonkeyPatch, native: bool, expected: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: native)
    assert resolve_precision("auto", torch.device("cuda"), small=True) == expected


def test_a_cpu_refuses_fp16_and_leaves_small_networks_in_fp32() -> None:
    assert resolve_precision("auto", torch.device("cpu"), small=True) == "no"
    assert resolve_precision("bf16", torch.device("cpu"), small=True) == "bf16"
    with pytest.raises(UsageError, match="a CPU cannot compute in fp16; allowed here is bf16, no or auto"):
        resolve_precision("fp16", torch.device("cpu"), small=False)


def test_algorithms_are_tried_out_in_long_runs_of_few_shapes() -> None:
    enough = TUNING_PAYS_AFTER
    assert tuning_pays(enough, sizes=1, batch_size=16)
    assert not tuning_pays(enough - 1, sizes=1, batch_size=16)
    assert not tuning_pays(2 * 16 * enough - 1, sizes=2, batch_size=16)
    assert tuning_pays(2 * 16 * enough, sizes=2, batch_size=16)
    with gpu_algorithms(deterministic=False, tuned=False):
        assert not torch.backends.cudnn.benchmark


def test_the_choice_of_algorithms_is_made_and_put_back() -> None:
    backends = torch.backends
    for wanted in (True, False):
        with gpu_algorithms(deterministic=wanted, tuned=True):
            assert torch.are_deterministic_algorithms_enabled() == wanted
            assert backends.cudnn.benchmark != wanted
            assert backends.cuda.matmul.allow_tf32 != wanted
        assert not torch.are_deterministic_algorithms_enabled()
        assert not backends.cudnn.benchmark
        assert not backends.cuda.matmul.allow_tf32
    torch.use_deterministic_algorithms(True)  # by the program around
    try:
        with gpu_algorithms(deterministic=False, tuned=True):
            assert torch.are_deterministic_algorithms_enabled()
            assert not backends.cudnn.benchmark
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
