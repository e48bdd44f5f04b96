"""Deprecated names, which continue to work with a warning."""

import functools
import inspect
import warnings
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar


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


def renamed_in(instance: Any, *, old: str, new: str) -> Any:
    """Return the method `new`, or with a warning `old` where somebody's own class still defines that."""
    method = inspect.getattr_static(instance, old, None)
    if method is None or isinstance(method, Renamed):
        return getattr(instance, new)
    warnings.warn(f"{type(instance).__name__}.{old} is now called {new}", DeprecationWarning, stacklevel=3)
    return getattr(instance, old)


P = ParamSpec("P")
R = TypeVar("R")


def renamed_arguments(**names: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Return a decorator for a function that goes on taking keyword arguments by their old names, with a warning.

    Args:
        names: old name -> name today.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(function)
        def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
            for old in kwargs.keys() & names.keys():
                warnings.warn(
                    f"{function.__name__}: {old} is now called {names[old]}", DeprecationWarning, stacklevel=2
                )
                kwargs[names[old]] = kwargs.pop(old)
            return function(*args, **kwargs)

        return wrapped

    return decorate
