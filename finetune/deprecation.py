"""Names of earlier versions that go on working."""

import warnings
from typing import Any


class Renamed:
    """A class attribute that stands for another one and warns when it is read.

    Args:
        new: the attribute's name today.
    """

    def __init__(self, new: str) -> None:
        self._new, self._old = new, ""

    def __set_name__(self, owner: type, name: str) -> None:
        self._old = name

    def __get__(self, instance: Any, owner: type) -> Any:
        warnings.warn(
            f"{owner.__name__}.{self._old} is now {owner.__name__}.{self._new}", DeprecationWarning, stacklevel=2
        )
        return getattr(owner if instance is None else instance, self._new)
