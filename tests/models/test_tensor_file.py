import hashlib
import json
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from finetune.models.tensor_file import NUMBER_FORMATS, stream_tensors, write_tensors


def parts(content: bytes) -> tuple[dict[str, object], bytes]:
    """Header and data of a safetensors file."""
    end = 8 + int.from_bytes(content[:8], "little")
    return json.loads(content[8:end]), content[end:]


def tensors_of_every_kind() -> dict[str, Tensor]:
    numbers = torch.arange(15).reshape(3, 5)
    kinds = {f"{name}.{word}": numbers.to(dtype, copy=True) for word, dtype in NUMBER_FORMATS.items() for name in "zam"}
    return kinds | {"nothing": torch.empty(0), "one": torch.tensor(2.0), "turned": torch.arange(12.0).reshape(3, 4).T}


def test_the_bytes_are_those_that_safetensors_writes(tmp_path: Path) -> None:
    tensors = tensors_of_every_kind()
    write_tensors(tmp_path / "a.safetensors", tensors, {"b": "ü", "a": "1"})
    header, data = parts((tmp_path / "a.safetensors").read_bytes())
    assert list(header.pop("__metadata__").items()) == [("a", "1"), ("b", "ü")]
    expected_header, expected_data = parts(save({name: tensor.contiguous() for name, tensor in tensors.items()}))
    assert list(header.items()) == list(expected_header.items())
    assert data == expected_data


def test_a_file_is_the_same_in_whatever_order_its_tensors_come(tmp_path: Path) -> None:
    tensors = tensors_of_every_kind()
    write_tensors(tmp_path / "a.safetensors", tensors, {})
    stream_tensors(tmp_path / "b.safetensors", lambda: reversed(tensors.items()), {})
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_digests_are_of_the_tensors_part_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    stream_tensors(path, {"x": torch.ones(300, 300)}.items, {"title": "a"}, digests=True)
    digest = hashlib.sha256(parts(path.read_bytes())[1]).hexdigest()
    with safe_open(path, "pt") as file:
        assert file.metadata() == {
            "title": "a", "sshs_model_hash": digest, "modelspec.hash_sha256": f"0x{digest}"
        }  # fmt: skip
    assert load_file(path)["x"].equal(torch.ones(300, 300))
