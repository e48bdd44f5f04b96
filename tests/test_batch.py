import pytest
import torch

from finetune.batch import Batch, as_input, map_tensors, tensors_of


def make_batch(size: int) -> Batch:
    rows = torch.arange(size)
    cond = {"encoder_hidden_states": rows.view(-1, 1, 1).float(), "added_cond_kwargs": {"time_ids": rows.view(-1, 1)}}
    return Batch(
        latent_params=rows.view(-1, 1, 1, 1).float(),
        cond=cond,
        keys=rows,
        time_ids=rows.view(-1, 1).expand(-1, 6),
        ids=tuple(str(row) for row in range(size)),
        weight=torch.ones(size),
        unet_channels=rows.view(-1, 1, 1, 1).float(),
    )


def test_split_covers_every_example_once_in_order_nested_conditions_too() -> None:
    parts = list(make_batch(7).split(3))
    assert [len(part) for part in parts] == [3, 3, 1]
    assert [name for part in parts for name in part.ids] == [str(i) for i in range(7)]
    for values in (
        [part.latent_params.flatten() for part in parts],
        [part.cond["encoder_hidden_states"].flatten() for part in parts],
        [part.cond["added_cond_kwargs"]["time_ids"].flatten() for part in parts],
        [part.keys for part in parts],
        [part.time_ids[:, 0] for part in parts],
        [part.unet_channels.flatten() for part in parts if part.unet_channels is not None],
    ):
        assert torch.cat(values).tolist() == list(range(7))


def test_a_tree_keeps_its_form_and_the_order_of_its_tensors() -> None:
    batch = make_batch(2)
    doubled = map_tensors(lambda tensor: 2 * tensor, batch)
    assert isinstance(doubled, Batch)
    assert doubled.ids == batch.ids
    assert doubled.cond["added_cond_kwargs"]["time_ids"].tolist() == [[0], [2]]
    pairs = zip(tensors_of(batch), tensors_of(doubled), strict=True)
    assert all(torch.equal(2 * one, two) for one, two in pairs)
    assert len(tensors_of(batch)) == 7


def test_inputs_are_rounded_but_for_pixels_that_half_precision_cannot_count() -> None:
    cond = {
        "encoder_hidden_states": torch.full((1, 1, 1), 1 / 3),
        "added_cond_kwargs": {"text_embeds": torch.ones(1, 2), "time_ids": torch.tensor([[1023.0, 3021.0]])},
    }
    rounded = as_input(cond, torch.bfloat16)
    assert rounded["encoder_hidden_states"].dtype == rounded["added_cond_kwargs"]["text_embeds"].dtype == torch.bfloat16
    assert rounded["added_cond_kwargs"]["time_ids"].tolist() == [[1023.0, 3021.0]]


def test_keys_stay_on_the_cpu() -> None:
    moved = make_batch(2).to("meta")
    assert moved.keys.device.type == "cpu"
    assert moved.latent_params.device.type == moved.cond["added_cond_kwargs"]["time_ids"].device.type == "meta"


@pytest.mark.parametrize(
    ("old", "new"),
    [("stored", "latent_params"), ("geometry", "time_ids"), ("of_class", "is_class_image"), ("extra", "unet_channels")],
)
def test_fields_of_earlier_versions_can_be_read_and_warn(old: str, new: str) -> None:
    batch = make_batch(2)
    with pytest.warns(DeprecationWarning, match=rf"Batch\.{old} is now Batch\.{new}"):
        assert getattr(batch, old) is getattr(batch, new)
