"""finetune-unet cache prune: delete encodings that no run has used recently."""

from dataclasses import dataclass

from finetune.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class Options:
    """Delete cached encodings by age and size. It waits while a run reads them."""

    cache_dir: str | None = None
    """Cache folder. Default: finetune-unet in the user's cache folder."""
    unused_days: int | None = None
    """Delete encodings that no run has used for this many days; 0: all."""
    max_gb: float | None = None
    """Then delete the least recently used encodings until the rest is at most this large."""


def run(options: Options) -> None:
    """Print how much was freed. Raises UsageError where there is no cache, or for a number below 0."""
    from finetune.cache.disk import existing_store
    from finetune.cache.maintenance import prune

    for name, value in (("unused_days", options.unused_days), ("max_gb", options.max_gb)):
        if value is not None and not value >= 0:
            raise UsageError(f"--{name} {value}: expected 0 or more")
    if options.unused_days is None and options.max_gb is None:
        raise UsageError("cache prune needs --unused_days or --max_gb")
    store = existing_store(options.cache_dir)
    room = None if options.max_gb is None else options.max_gb * 1e9
    freed = prune(store, unused_days=options.unused_days, max_bytes=room)
    print(f"{store.folder}: {freed / 1e6:.1f} MB freed")
