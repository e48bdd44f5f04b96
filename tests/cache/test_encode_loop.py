"""What is computed together, and that it changes nothing."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from finetune.cache.buffered_store import BufferedStore
from finetune.cache.encode_loop import EncodeJob, encode_missing
from finetune.cache.store import Item, MemoryStore


def filled(names: Sequence[str], batch_size: int) -> tuple[MemoryStore, list[list[str]]]:
    """A store filled with "WIDTH NUMBER", and what came together."""
    groups: list[list[str]] = []

    def prepare(name: str) -> Tensor:
        width, number = map(int, name.split())
        return torch.full((width,), float(number))

    def compute(keys: Sequence[str], prepared: Sequence[Tensor]) -> list[Item]:
        groups.append(list(keys))
        return [{"stored": 2 * row} for row in torch.stack(list(prepared))]  # which needs one shape

    network: Any = torch.nn.Identity()
    store = MemoryStore()
    encode_missing(
        BufferedStore(store),
        EncodeJob(
            kind="picture",
            keys=names,
            keys_of=lambda index, _: [names[index]],
            prepare=prepare,
            compute=compute,
            batch_size=lambda _: batch_size,
            network=network,
        ),
    )
    return store, groups


def test_groups_are_of_one_shape_and_full_but_for_the_last_of_each() -> None:
    names = ["3 0", "5 1", "3 2", "3 3", "5 4", "3 5", "3 6"]
    store, groups = filled(names, batch_size=2)
    assert groups == [["3 0", "3 2"], ["5 1", "5 4"], ["3 3", "3 5"], ["3 6"]]
    found = [item["stored"] for item in store.load(names)]
    assert [(len(tensor), tensor[0].item() / 2) for tensor in found] == [
        tuple(map(int, name.split())) for name in names
    ]


def test_one_at_a_time_goes_in_the_order_that_is_wanted() -> None:
    names = ["3 0", "5 1", "3 2"]
    assert filled(names, batch_size=1)[1] == [[name] for name in names]
