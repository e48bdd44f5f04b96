"""Cache keys: identify an encoding by its content, so that another image, crop or VAE has another key."""

from finetune.data.images import WHITE
from finetune.data.transforms import PREPROCESSING, Crop
from finetune.seeding import wide_fold


def picture_key(
    digest: str,
    crop: Crop,
    flip: bool,
    encoder: str,
    precision: str,
    background: str = WHITE,
    condition: str = "",
) -> str:
    """Return the cache key of an encoded crop of a picture.

    Args:
        digest: of the picture.
        placement: the part, and its size.
        flip: mirrored.
        encoder: the encoder's fingerprint and environment.
        precision: number format that is kept.
        background: the colour behind it.
        condition: what the image condition says of itself (`ImageCondition.cache_name`); "": the picture itself.
    """
    content = digest if background == WHITE else f"{digest} {background}"  # a key of versions without backgrounds holds
    (a, b), (c, d), (e, f) = crop.resized, crop.top_left, crop.size
    content += f" but {condition}" * bool(condition)
    return wide_fold(f"picture {PREPROCESSING} {content} {a} {b} {c} {d} {e} {f} {flip} {encoder} {precision}")


def caption_key(caption: str, conditioner: str, precision: str) -> str:
    """Return the cache key of a caption embedded by the conditioner with this fingerprint and environment."""
    return wide_fold("caption", caption, conditioner, precision)
