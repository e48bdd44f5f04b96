"""What a run measures and draws on the way."""

from dataclasses import dataclass

from finetune.option_info import AT_LEAST_ONE, BELOW_ONE, NOT_NEGATIVE, option


@dataclass(frozen=True, kw_only=True)
class ValidationOptions:
    """Validation: the loss on images that are not trained on."""

    validation_fraction: float | None = option(None, BELOW_ONE, requires="validation_data left out")
    """Share of the images that is held out for validation; near duplicates stay together; 0: none. Default: 0.1, at
    most 200 images, and none of fewer than 20."""
    validation_data: str | None = option(None, suggest_for=("validation_data_dir", "val_data"), path=True)
    """Images to hold out instead, in the forms that --data takes."""
    validate_every: int | None = option(None, AT_LEAST_ONE, affects="on resume")
    """Steps between validations, in addition to the first and the last. Default: as 5 % of the time allows; with
    --early_stop a twentieth of the run."""
    early_stop: bool = option(False, affects="on resume")
    """Stop when the validation loss has risen significantly in two validations, and export the weights with the lowest
    loss."""
    forgetting_prompts: int | None = option(None, NOT_NEGATIVE, requires="a model that takes text", affects="on resume")
    """Number of unrelated prompts, of 64, whose change in meaning is tracked; 0: none. Default: as 2 % of the time
    allows."""


@dataclass(frozen=True, kw_only=True)
class SampleOptions:
    """Images drawn during training."""

    sample_prompts: tuple[str, ...] | None = option(
        None,
        requires="text",
        affects="on resume",
        aliases=("validation_prompts",),
        suggest_for=("validation_prompt",),
        path=True,
    )
    """Prompts of the sample grids, or a file with one per line (with sd-scripts' --n --s --l --d). Default: a training
    caption, the subject in a new place, and the class alone."""
    sample_every: int | None = option(
        None, NOT_NEGATIVE, affects="on resume", aliases=("validation_steps",), suggest_for=("sample_every_n_steps",)
    )
    """Steps between sample grids, in addition to the first and the last; 0: none. Default: as 5 % of the time
    allows."""
    save_image_epochs: int | None = option(
        None,
        AT_LEAST_ONE,
        requires="sample_every left out",
        affects="on resume",
        suggest_for=("sample_every_n_epochs",),
    )
    """Epochs between sample grids."""
    eval_batch_size: int | None = option(None, AT_LEAST_ONE, affects="on resume")
    """Images per prompt in a grid."""
    num_inference_steps: int | None = option(
        None, NOT_NEGATIVE, affects="on resume", suggest_for=("ddpm_num_inference_steps",)
    )
    """Sampler steps per image; 0: no sampling."""
    guidance_scale: float | None = option(None, NOT_NEGATIVE, requires="a model that takes text", affects="on resume")
    """Classifier-free guidance of the grids; 1: none. Default: the model's (sd15: 7.5, sdxl: 5, tiny: 3)."""
