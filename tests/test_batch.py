import torch

from finetune.batch import Batch


def make_batch(size: int) -> Batch:
    rows = torch.arange(size)
    cond = {"encoder_hidden_states": rows.view(-1, 1, 1).float(), "added_cond_kwargs": {"time_ids": rows.view(-1, 1)}}
    return Batch(
        stored=rows.view(-1, 1, 1, 1).float(),
        cond=cond,
        keys=rows,
        geometry=rows.view(-1, 1).expand(-1, 6),
        ids=tuple(str(row) for row in range(size)),
        weight=torch.ones(size),
        extra=rows.view(-1, 1, 1, 1).float(),
    )


def test_split_covers_every_example_once_in_order_nested_conditions_too() -> None:
    parts = list(make_batch(7).split(3))
    assert [len(part) for part in parts] == [3, 3, 1]
    assert [name for part in parts for name in part.ids] == [str(i) for i in range(7)]
    for values in (
        [part.stored.flatten() for part in parts],
        [part.cond["encoder_hidden_states"].flatten() for part in parts],
        [part.cond["added_cond_kwargs"]["time_ids"].flatten() for part in parts],
        [part.keys for part in parts],
        [part.geometry[:, 0] for part in parts],
        [part.extra.flatten() for part in parts if part.extra is not None],
    ):
        assert torch.cat(values).tolist() == list(range(7))


def test_keys_stay_on_the_cpu() -> None:
    moved = make_batch(2).to("meta")
    assert moved.keys.device.type == "cpu"
    assert moved.stored.device.type == moved.cond["added_cond_kwargs"]["time_ids"].device.type == "meta"
