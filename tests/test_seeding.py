import torch

from finetune import seeding


def test_fold_is_stable_across_machines_and_versions() -> None:
    assert seeding.fold(0, "a/b.png", 3) == 8481261836038043430


def test_fold_tells_parts_apart() -> None:
    assert len({seeding.fold("a", "b"), seeding.fold("ab"), seeding.fold("a\x1fb"), seeding.fold("b", "a")}) == 4
    assert seeding.fold(1, "x") != seeding.fold("1", "x")


def test_a_draw_depends_on_its_key_alone_and_not_on_its_neighbours() -> None:
    keys = torch.tensor([seeding.example_key(0, name, 0) for name in ("a", "b", "c")])
    together = seeding.normal(keys, "noise", (4, 8, 8))
    alone = seeding.normal(keys[1:2], "noise", (4, 8, 8))
    assert torch.equal(together[1:2], alone)


def test_ids_visits_seeds_and_purposes_are_uncorrelated() -> None:
    """40 draws that differ in one part only: every pair's correlation stays within 5 standard errors."""
    size = 4096
    keys = [seeding.example_key(0, f"{i}.png", 0) for i in range(10)]
    keys += [seeding.example_key(0, "0.png", visit) for visit in range(1, 11)]
    keys += [seeding.example_key(seed, "0.png", 0) for seed in range(1, 11)]
    rows = [seeding.normal(torch.tensor(keys), "noise", (size,))]
    rows += [seeding.normal(torch.tensor(keys[:1]), f"purpose {i}", (size,)) for i in range(10)]
    correlation = torch.corrcoef(torch.cat(rows)) - torch.eye(40)
    assert correlation.abs().max() < 5 / size**0.5


def test_uniform_and_integers_cover_their_range() -> None:
    keys = torch.tensor([seeding.example_key(0, str(i), 0) for i in range(4000)])
    numbers = seeding.uniform(keys, "flip")
    assert 0 <= numbers.min() < 0.01
    assert 0.99 < numbers.max() < 1
    t = seeding.integers(keys, "timestep", 10)
    assert t.unique().tolist() == list(range(10))
    assert (t.bincount() - 400).abs().max() < 100
