import threading
from collections.abc import Iterator

import pytest

from finetune.data.prefetch import ahead


def counting(made: list[int], until: int = 10) -> Iterator[int]:
    for number in range(until):
        made.append(threading.get_ident())
        yield number


def test_items_come_in_order_and_are_made_by_one_other_thread() -> None:
    made: list[int] = []
    with ahead(counting(made)) as items:
        assert list(items) == list(range(10))
    assert len(set(made)) == 1
    assert made[0] != threading.get_ident()


def test_two_are_made_before_they_are_asked_for_and_no_more() -> None:
    made: list[int] = []
    with ahead(counting(made)) as items:
        assert next(items) == 0
    assert len(made) <= 3


def test_until_it_is_wanted_the_one_who_asks_makes_them() -> None:
    made: list[int] = []
    with ahead(counting(made), allowed=lambda: len(made) >= 4) as items:
        assert list(items) == list(range(10))
    assert made[:4] == [threading.get_ident()] * 4
    assert len(set(made[4:])) == 1
    assert made[4] != threading.get_ident()


def test_an_error_comes_where_the_item_is_asked_for() -> None:
    def failing() -> Iterator[int]:
        yield 1
        raise ValueError("no second")

    with ahead(failing()) as items:
        assert next(items) == 1
        with pytest.raises(ValueError, match="no second"):
            next(items)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("ahead")]
