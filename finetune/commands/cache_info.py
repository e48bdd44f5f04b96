"""finetune-unet cache info: what is kept of earlier runs."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Options:
    """Tell what encodings are kept, and how much room they take."""

    cache_dir: str | None = None
    """The cache folder. Default: finetune-unet in the user's cache folder."""


def run(options: Options) -> None:
    """Print a line for each kind of item, and the whole. Raises UsageError where there is no cache."""
    from finetune.cache.disk import existing_store
    from finetune.cache.maintenance import contents
    from finetune.text import pluralize

    store = existing_store(options.cache_dir)
    summary = contents(store)
    for kind, count in summary.items.items():
        print(f"{pluralize(count, kind)} encoded")
    print(f"{store.folder}: {pluralize(summary.shards, 'shard')}, {summary.bytes / 1e6:.1f} MB; ", end="")
    print(f"the one used least lately: {pluralize(summary.unused, 'day')} ago")
