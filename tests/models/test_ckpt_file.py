"""Tensors in a pickle: taken out, and nothing else built."""

import pickle
import random
import sys
import types
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch

from finetune.errors import ModelError
from finetune.models.ckpt_file import read_pickled

pytestmark = pytest.mark.filterwarnings("ignore:Detected pickle protocol")

WEIGHTS = {"a.weight": torch.arange(6.0).view(2, 3), "b": torch.ones((), dtype=torch.float16)}


class Stranger:
    pass


@pytest.mark.parametrize("zipped", [True, False])
def test_the_weights_of_a_training_script_come_out_by_their_own_names(tmp_path: Path, zipped: bool) -> None:
    content = {"state_dict": OrderedDict(WEIGHTS), "global_step": 5, "optimizer": {"lr": torch.ones(2), "name": "x\n"}}
    torch.save(content, tmp_path / "a.ckpt", _use_new_zipfile_serialization=zipped)
    assert zipfile.is_zipfile(tmp_path / "a.ckpt") is zipped
    tensors, others = read_pickled(tmp_path / "a.ckpt")
    assert {name: tensor.tolist() for name, tensor in tensors.items()} == {
        "a.weight": [[0, 1, 2], [3, 4, 5]], "b": 1, "optimizer.lr": [1, 1],
    }  # fmt: skip
    assert tensors["b"].dtype == torch.float16
    assert others == ["global_step", "optimizer.name"]


def test_tensors_that_share_memory_or_lie_across_it_become_plain_ones(tmp_path: Path) -> None:
    whole = torch.arange(12.0).view(3, 4)
    torch.save({"whole": whole, "same": whole, "part": whole[1], "turned": whole.T}, tmp_path / "a.bin")
    tensors, _ = read_pickled(tmp_path / "a.bin")
    assert tensors["turned"].tolist() == whole.T.tolist()
    assert tensors["part"].tolist() == [4, 5, 6, 7]
    assert len({tensor.untyped_storage().data_ptr() for tensor in tensors.values()}) == 4
    assert all(tensor.untyped_storage().nbytes() == tensor.nbytes for tensor in tensors.values())


def test_what_is_more_than_tensors_is_refused_and_told_by_name(tmp_path: Path) -> None:
    torch.save({"state_dict": WEIGHTS, "callback": Stranger()}, tmp_path / "a.ckpt")
    with pytest.raises(
        ModelError, match=r"a\.ckpt: contains more than tensors and is not loaded: .*Stranger"
    ) as caught:
        read_pickled(tmp_path / "a.ckpt")
    assert "weights_only" not in str(caught.value)


def test_numbers_that_a_file_has_no_place_for_are_told(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(2, dtype=torch.complex128)}, tmp_path / "a.pt")
    with pytest.raises(ModelError, match=r"a\.pt: a is torch.complex128, for which a \.safetensors has no place"):
        read_pickled(tmp_path / "a.pt")


def test_code_is_never_run(tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    payload = b"cos\nsystem\n(Vtouch " + str(marker).encode() + b"\ntR."
    (tmp_path / "plain.pt").write_bytes(payload)
    torch.save(WEIGHTS, tmp_path / "whole.pt")
    with zipfile.ZipFile(tmp_path / "whole.pt") as whole, zipfile.ZipFile(tmp_path / "zipped.pt", "w") as changed:
        for name in whole.namelist():
            changed.writestr(name, payload if name.endswith("data.pkl") else whole.read(name))
    for name in ("plain.pt", "zipped.pt"):
        with pytest.raises(ModelError):
            read_pickled(tmp_path / name)
    assert not marker.exists()


@pytest.mark.parametrize(
    "content",
    [b"", b"no pickle", pickle.dumps({}), pickle.dumps([1]), pickle.dumps({"a": 1}), b"PK\x03\x04" + b"x" * 50],
)
def test_what_holds_no_tensors_is_told(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.ckpt").write_bytes(content)
    with pytest.raises(ModelError, match=r"a\.ckpt: .") as caught:
        read_pickled(tmp_path / "a.ckpt")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_damaged_one_is_read_or_refused(tmp_path: Path, zipped: bool) -> None:
    torch.save(WEIGHTS, tmp_path / "a.ckpt", _use_new_zipfile_serialization=zipped)
    whole, source = (tmp_path / "a.ckpt").read_bytes(), random.Random(0)
    for _ in range(60):
        content: Any = bytearray(whole[: source.randrange(1, len(whole))] if source.random() < 0.3 else whole)
        for _ in range(3):
            content[source.randrange(len(content))] ^= 1 << source.randrange(8)
        (tmp_path / "a.ckpt").write_bytes(content)
        try:
            tensors, _ = read_pickled(tmp_path / "a.ckpt")
            assert all(isinstance(tensor, torch.Tensor) for tensor in tensors.values())
        except ModelError as error:
            assert "\n" not in str(error)  # noqa: PT017


def test_objects_of_lightning_beside_the_weights_are_read_as_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As old checkpoints of Stable Diffusion have them; the classes need not be there."""
    name = "pytorch_lightning.callbacks.model_checkpoint"
    for part in ("pytorch_lightning", "pytorch_lightning.callbacks", name):
        monkeypatch.setitem(sys.modules, part, types.ModuleType(part))
    kind = type("ModelCheckpoint", (), {"__module__": name})
    monkeypatch.setattr(sys.modules[name], "ModelCheckpoint", kind, raising=False)
    torch.save({"state_dict": WEIGHTS, "callbacks": {kind: {"best": 1}}, "hook": kind()}, tmp_path / "a.ckpt")
    monkeypatch.undo()
    tensors, _ = read_pickled(tmp_path / "a.ckpt")
    assert tensors.keys() == WEIGHTS.keys()
