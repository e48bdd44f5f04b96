"""load_object: an object by its import path."""

import importlib
import sys
from pathlib import Path
from typing import Any

from finetune.errors import UsageError


def load_object(path: str, option: str) -> Any:
    """The object at package.module:name, imported from where Python looks, or from the current folder.

    Args:
        path: as the user gave it.
        option: where it was given, for messages.

    Raises:
        UsageError: there is no such module, it cannot be imported, or it has no such name.
    """
    module_name, _, name = path.partition(":")
    if not module_name or not name:
        raise UsageError(f"{option} = {path!r}: expected package.module:name")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.append(here)
    try:
        module = importlib.import_module(module_name)
    except (ImportError, SyntaxError) as error:
        raise UsageError(f"{option} = {path!r}: {error}") from error
    if not hasattr(module, name):
        raise UsageError(f"{option} = {path!r}: module {module_name} has no {name}")
    return getattr(module, name)
