"""Sources of images of another tool: what all have alike becomes an option of the run, the rest is theirs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from finetune.commands.foreign.imported_config import ImportedConfig
from finetune.source_options import OWN, settings_text


@dataclass
class ForeignSource:
    """A folder, or what else holds images."""

    data: str
    repeats: int = 1
    settings: dict[str, Any] = field(default_factory=dict)
    """Our option -> its value for these images."""


def take_sources(imported: ImportedConfig, sources: Sequence[ForeignSource], *, theirs: str) -> None:
    """Set data, repeats and settings of the sources.

    Args:
        imported: gets the options; one that a source has wins over it.
        sources: in their order; none: nothing is set.
        theirs: what names the folders there, for messages.
    """
    if not sources:
        return
    imported.set("data", [source.data for source in sources], theirs)
    repeats = [source.repeats for source in sources]
    if set(repeats) != {1} and (len(sources) > 1 or "max_train_steps" not in imported.ours):
        imported.set("repeats", repeats, theirs)
    shared = _shared([source.settings for source in sources])
    imported.ours |= shared
    sides = [side for source in sources if (side := source.settings.get("resolution"))]
    if sides and "resolution" not in shared:
        imported.ours["resolution"] = max(sides)
    differing = [{name: value for name, value in source.settings.items() if name not in shared} for source in sources]
    if len(sources) > 1 and any(differing):  # one alone has no other to weigh against
        imported.ours["source_settings"] = tuple(map(settings_text, differing))


def _shared(settings: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    first, *others = settings
    alike = {name: value for name, value in first.items() if all(other.get(name) == value for other in others)}
    return {name: value for name, value in alike.items() if name not in OWN}
