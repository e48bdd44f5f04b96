"""finetune-unet cache verify: read every encoding and delete damaged ones."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Options:
    """Read every cached encoding, and delete damaged ones; the next run encodes them again."""

    cache_dir: str | None = None
    """Cache folder. Default: finetune-unet in the user's cache folder."""


def run(options: Options) -> None:
    """Print how many are sound, and those that were not. Raises UsageError where there is no cache."""
    from finetune.cache.disk import existing_store
    from finetune.cache.maintenance import verify
    from finetune.text import pluralize

    store = existing_store(options.cache_dir)
    sound, damaged = verify(store)
    print(f"{store.folder}: {pluralize(sound, 'encoding')} as written, {len(damaged)} damaged")
    for key in damaged:
        print(f"{key}: damaged, deleted")
