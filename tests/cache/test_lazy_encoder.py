import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from finetune.cache.buffered_store import BufferedStore
from finetune.cache.disk import DiskStore
from finetune.cache.encode import encode
from finetune.cache.encode_loop import EncodeJob, encode_missing
from finetune.cache.encoded_dataset import EncodedDataset
from finetune.cache.lazy_encoder import LazyEncoder
from finetune.cache.store import Item, MemoryStore
from finetune.data.caption_augmentation import CaptionAugmentation
from finetune.data.image_folder import ImageFolder
from finetune.data.loader import batches
from finetune.models.loading import DiffusionModel, load_model


@pytest.fixture(scope="module")
def tiny() -> DiffusionModel:
    return load_model("tiny")


def encoded(pictures: Path, tiny: DiffusionModel, cache: Path | str, time_budget: float | None) -> EncodedDataset:
    images = ImageFolder(pictures, resolution=64, random_flip=True)
    dropping = CaptionAugmentation(dropout=0.3)
    return encode(images, tiny, captioning=dropping, cache_dir=cache, time_budget=time_budget)


@pytest.mark.parametrize("cache", ["none", "folder"])
def test_what_is_encoded_when_it_is_visited_has_the_same_bits(
    pictures: Path, tiny: DiffusionModel, tmp_path: Path, cache: str
) -> None:
    folder = cache if cache == "none" else tmp_path
    ahead = encoded(pictures, tiny, folder, time_budget=0)
    assert [(made.new, made.left) for made in ahead.made] == [(0, 7), (0, 12)]
    assert ahead.live
    asked = list(batches(ahead, batch_size=2, steps=6))
    assert not ahead.live
    for one, other in zip(asked, batches(encoded(pictures, tiny, "none", None), batch_size=2, steps=6), strict=True):
        assert one.ids == other.ids
        assert torch.equal(one.latent_params, other.latent_params)
        assert torch.equal(one.cond["encoder_hidden_states"], other.cond["encoder_hidden_states"])


def test_only_what_is_visited_is_encoded_and_the_next_run_finds_it(
    pictures: Path, tiny: DiffusionModel, tmp_path: Path
) -> None:
    first = encoded(pictures, tiny, tmp_path, time_budget=0)
    for _ in batches(first, batch_size=2, steps=1):
        pass
    first.close()
    again = encoded(pictures, tiny, tmp_path, time_budget=None)
    assert {made.kind: (made.items, made.new) for made in again.made} == {"caption": (7, 4), "picture": (12, 8)}
    assert [encoded(pictures, tiny, tmp_path, time_budget=0).made[number].left for number in (0, 1)] == [0, 0]


def slow(keys: Sequence[str], prepared: Sequence[str]) -> list[Item]:
    time.sleep(0.01)
    return [{"value": torch.zeros(1)} for _ in keys]


def work(keys: int, compute: object = slow) -> EncodeJob:
    names = [f"key {number}" for number in range(keys)]
    return EncodeJob(
        kind="picture",
        keys=names,
        keys_of=lambda index, _: [names[index]],
        prepare=str,
        compute=compute,
        batch_size=lambda _: 1,
        network=torch.nn.Identity(),
    )  # pyright: ignore


def test_what_would_take_too_long_is_left_as_soon_as_it_shows() -> None:
    made = encode_missing(BufferedStore(MemoryStore()), work(10_000), time_budget=1)
    assert made.new + made.left == 10_000
    assert 16 <= made.new < 100  # which are judged by the first 16, not by the second that has passed
    assert encode_missing(BufferedStore(MemoryStore()), work(20), time_budget=60).left == 0


def test_what_is_visited_out_of_order_is_computed_once_and_keeps_no_place_of_what_comes() -> None:
    computed: list[str] = []

    def compute(keys: Sequence[str], prepared: Sequence[str]) -> list[Item]:
        computed.extend(keys)
        return slow(keys, prepared)

    lazy_encoder = LazyEncoder(BufferedStore(MemoryStore()), work(200, compute))
    order = [number ^ 64 for number in range(128)] + [*range(199, 127, -1)]
    for start in range(0, 200, 100):
        lazy_encoder.encode_for([(index, 0) for index in order[start : start + 100]])
        assert not lazy_encoder._prepared.keys() & set(computed)
    assert lazy_encoder.done
    assert sorted(computed) == sorted(lazy_encoder.work.keys)


def test_what_is_gathered_can_be_loaded_and_comes_to_the_store_in_one_shard(tmp_path: Path) -> None:
    store = DiskStore(tmp_path)
    gathered = BufferedStore(store)
    for number in range(3):
        gathered.put("picture", {f"{number}": {"value": torch.tensor([number])}})
    gathered.put("caption", {"words": {"value": torch.tensor([9])}})
    assert store.missing(["0", "1", "2", "words"]) == ["0", "1", "2", "words"]
    assert gathered.missing(["0", "3", "words"]) == ["3"]
    assert [item["value"].item() for item in gathered.load(["2", "words", "0"])] == [2, 9, 0]
    gathered.close()
    assert store.missing(["0", "1", "2", "words"]) == []
    assert [item["value"].item() for item in gathered.load(["2", "words", "0"])] == [2, 9, 0]
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) == 2  # one of each kind
