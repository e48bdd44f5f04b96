"""The images of a run, and their cache."""

from dataclasses import dataclass
from typing import Literal

from finetune.option_info import AT_LEAST_ONE, BELOW_ONE, NOT_NEGATIVE, POSITIVE, option


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """Images."""

    data: tuple[str, ...] = option((), aliases=("train_data_dir", "instance_data_dir", "dataset_name"), path=True)
    """Folder of images, tar shards (shards/*.tar), folder of parquet or arrow files, or Hugging Face dataset id; or
    several of them. Or a dataset file (.toml) with a [[source]] for each, or of sd-scripts."""
    repeats: tuple[int, ...] = option((), AT_LEAST_ONE, suggest_for=("num_repeats",))
    """Repeats per epoch of the images of each --data, in the same order. Default: 1."""
    source_settings: tuple[str, ...] = option(())
    """Options that are otherwise for the images of each --data, in the same order, as TOML: 'prompt = "a dog",
    resolution = 768, loss_weight = 0.5'; '' for none."""
    class_data: str | None = option(
        None, requires="text", aliases=("class_data_dir",), suggest_for=("reg_data_dir",), path=True
    )
    """Folder of images of the subject's class, trained together with the subject so that the class is not forgotten
    (DreamBooth). The model draws missing images."""
    class_prompt: str | None = option(None, requires="class_data")
    """Caption of class images that have no caption, and prompt for the missing ones: "a photo of a dog"."""
    num_class_images: int | None = option(None, AT_LEAST_ONE, requires="class_data")
    """Number of class images. Default: those in the folder, or 100 if it is empty."""
    prior_loss_weight: float | None = option(None, POSITIVE, requires="class_data")
    """Loss weight of class images, relative to the subject's. Default: 1."""
    prior_prediction: bool | None = option(None, requires="class images")
    """Train class images towards the untrained model's output instead of their noise, so that no detail of these images
    is learned."""
    masked_loss: bool | None = option(None, suggest_for=("alpha_mask",), decided_by="dataset")
    """Count the loss only where a mask is white: NAME.mask.png next to the image, or else its alpha channel. Default:
    use such files only. Inpainting models paint in the white area instead."""
    unmasked_weight: float = option(0.0, BELOW_ONE, decided_by="dataset")
    """Least weight of the loss, where a mask is black."""
    unmasked_probability: float = option(0.0, BELOW_ONE, decided_by="dataset")
    """Share of the visits at which the whole image counts, whatever its mask."""
    normalize_masked_area_loss: bool = option(False, decided_by="dataset")
    """Divide the loss by the mean of the mask, so that small areas count as much as large ones."""
    resolution: int | None = option(None, AT_LEAST_ONE, aliases=("image_size",), several=True)
    """Pixels per side. With buckets: no image has a larger area than this square. Several: each image is trained at
    each of them. Default: the model's resolution."""
    aspect_ratio_bucketing: bool | None = option(None, decided_by="transform", suggest_for=("enable_bucket",))
    """Train each image near its own aspect ratio, with at most as many pixels as the square. Default: on, except for
    pixel-space models and --resize_mode squash."""
    min_bucket_reso: int | None = option(None, AT_LEAST_ONE, requires="aspect_ratio_bucketing")
    """Shortest side of a bucket. Default: half of the resolution."""
    max_bucket_reso: int | None = option(None, AT_LEAST_ONE, requires="aspect_ratio_bucketing")
    """Longest side of a bucket. Default: twice the resolution."""
    bucket_reso_steps: int | None = option(
        None, AT_LEAST_ONE, requires="aspect_ratio_bucketing", suggest_for=("bucket_resolution_steps",)
    )
    """Sides of buckets are multiples of this. Default: 64; below 512 px an eighth of the resolution."""
    bucket_upscale: bool | None = option(None, requires="aspect_ratio_bucketing", suggest_for=("bucket_no_upscale",))
    """Enlarge images that are smaller than their bucket, instead of using a smaller bucket."""
    resize_mode: Literal["crop", "squash"] = option("crop", decided_by="transform")
    """crop: scale to cover the training size, then crop. squash: scale both sides to it, as the tutorial does."""
    center_crop: bool = option(True, decided_by="transform")
    """Crop the centre. With --no_center_crop, crop at a random place, drawn once per image (with --live_encoding once
    per visit)."""
    random_flip: bool = option(False, decided_by="transform", suggest_for=("flip_aug",))
    """Mirror half of the visits left to right."""
    background: str = option("white", decided_by="transform")
    """Colour behind transparent images (black, #ff8000)."""
    volume_size: int | None = option(None, NOT_NEGATIVE, decided_by="dataset")
    """Number of images that are read at a time; 0: all before the first step. Default: 8192 if there are more than
    32768."""
    max_bad_fraction: float = option(0.01, BELOW_ONE, affects="free")
    """Share of the images that may be unreadable. They are skipped and listed in quarantine.jsonl."""
    image_column: str = option("image", decided_by="dataset")
    """Image column of a Hugging Face dataset."""
    follow_links: bool = option(True, affects="free")
    """Follow links that lead out of the --data folder. With --no_follow_links they are an error."""
    stream_rows: int | None = option(None, AT_LEAST_ONE, decided_by="dataset")
    """Download only this many rows of a dataset on the hub, in their order, and keep them."""
    live_encoding: bool = False
    """Encode each image with the VAE at every visit instead of once."""
    encode: Literal["auto", "before", "ahead"] = option("auto", affects="free")
    """before: encode everything before the first step. ahead: encode each image when the run reaches it. auto: before,
    unless it takes more than a minute. Affects speed only."""
    cache_dir: str | None = option(None, affects="free", suggest_for=("latents_cache_path", "cache_latents_to_disk"))
    """Folder where encodings are cached for this run and later ones; none: cache in memory only. Default: finetune-unet
    in the user's cache folder."""
    cache_precision: Literal["fp32", "fp16", "bf16"] = "fp32"
    """Number format of cached encodings. fp16 takes half the space (error: see benchmarks/RESULTS.md)."""
    cache_any_environment: bool = option(False, affects="free")
    """Also use cached encodings from other devices, numbers of threads or library versions. The last bits of the result
    then depend on the contents of the cache."""
    cache_strict: bool = option(False, affects="free")
    """Hash every image at the start, even if size, time and inode show that the file is unchanged."""
    dataloader_num_workers: int = option(0, NOT_NEGATIVE, affects="free", suggest_for=("max_data_loader_n_workers",))
    """Number of processes that load images with --live_encoding; cached encodings need none. Affects speed only."""
