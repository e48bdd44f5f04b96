"""finetune-unet cache info: show what is cached."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Options:
    """Show which encodings are cached, and their size."""

    cache_dir: str | None = None
    """Cache folder. Default: finetune-unet in the user's cache folder."""


def run(options: Options) -> None:
    """Print a line for each kind of item, and the whole. Raises UsageError where there is no cache."""
    from finetune.cache.disk import existing_store
    from finetune.cache.maintenance import contents
    from finetune.cache.store import KIND_NAMES
    from finetune.text import pluralize

    store = existing_store(options.cache_dir)
    summary = contents(store)
    for kind, count in summary.items.items():
        print(f"{pluralize(count, KIND_NAMES.get(kind, kind))} encoded")
    print(f"{store.folder}: {pluralize(summary.shards, 'shard')}, {summary.bytes / 1e6:.1f} MB; ", end="")
    print(f"least recently used: {pluralize(summary.unused, 'day')} ago")
