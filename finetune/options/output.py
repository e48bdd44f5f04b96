"""What a run writes, and where."""

from dataclasses import dataclass
from typing import Literal

from finetune.option_info import AT_LEAST_ONE, NOT_NEGATIVE, POSITIVE, option


@dataclass(frozen=True, kw_only=True)
class OutputOptions:
    """Files that are written."""

    output_dir: str | None = option(None, affects="free", suggest_for=("output",))
    """Run folder. Default: runs/<data>-<model>. The same command resumes it; another config gets a new number."""
    lock_output_dir: bool = option(True, affects="free")
    """Lock the folder against a second run. Use --no_lock_output_dir on file systems that cannot lock files."""
    overwrite_output_dir: bool = option(False, affects="free")
    """Delete what an earlier run left in output_dir."""
    resume_from_checkpoint: str | None = option(None, affects="free", suggest_for=("resume",))
    """"latest", or the path of a checkpoint folder."""
    allow_changed: tuple[str, ...] = option((), affects="free")
    """Options that may differ from the run that is resumed (for "data" and "model" also their contents). The run
    continues with the new values."""
    checkpointing_steps: int = option(
        500, NOT_NEGATIVE, affects="on resume", suggest_for=("save_every_n_steps", "save_steps")
    )
    """Steps between checkpoints, in addition to the one at the end; 0: only at the end."""
    checkpointing_minutes: float | None = option(None, POSITIVE, affects="on resume")
    """Minutes between checkpoints, in addition to checkpointing_steps. SIGUSR1 also saves a checkpoint."""
    save_model_epochs: int | None = option(
        None, AT_LEAST_ONE, affects="on resume", suggest_for=("save_every_n_epochs",)
    )
    """Epochs between checkpoints, in addition to checkpointing_steps."""
    checkpoints_total_limit: int = option(
        2, NOT_NEGATIVE, affects="on resume", suggest_for=("save_last_n_steps_state",)
    )
    """Number of checkpoints to keep; 0: all."""
    export_formats: tuple[Literal["single-file", "diffusers", "unet"], ...] = option(
        (), affects="free", inherited=True, suggest_for=("output_model_format",)
    )
    """Formats that are also written to exports/ of the run folder at the end, with a LoRA merged into the model."""
    export_precision: Literal["fp32", "fp16", "bf16"] = option(
        "fp16", affects="free", inherited=True, suggest_for=("output_dtype",)
    )
    """Number format of export_formats. A LoRA's own files are fp32."""
    report_to: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = option(
        (), affects="free", inherited=True, suggest_for=("log_with",)
    )
    """Trackers that receive the metrics, in addition to metrics.jsonl."""
    tracker_project_name: str | None = option(
        None, requires="report_to", affects="free", inherited=True, suggest_for=("log_tracker_name", "wandb_project")
    )
    """Project name for the trackers. Default: the environment variable WANDB_PROJECT, or finetune-unet."""
    push_to_hub: bool = option(False, affects="free")
    """Upload the result and a model card to the Hugging Face hub."""
    hub_model_id: str | None = option(None, requires="push_to_hub", affects="free")
    """Repository to push to. Default: one with the name of the run folder under your account, if it is new."""
    hub_private_repo: bool | None = option(None, requires="push_to_hub", affects="free")
    """Create the repository as private. Default: yes; --no_hub_private_repo makes it public."""
