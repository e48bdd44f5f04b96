"""Run: the parts of a run, put together."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.cache.encoded_dataset import EncodedDataset
from finetune.config import ResolvedConfig
from finetune.data.chunks import Chunks
from finetune.data.image_dataset import ImageDataset
from finetune.models.loading import DiffusionModel
from finetune.results.events import Events
from finetune.results.memorization import TrainingFeatures
from finetune.training.trainer import Trainer

if TYPE_CHECKING:  # they work with a `Run` themselves
    from finetune.run.forgetting import ForgettingProbes
    from finetune.run.sample_grids import SamplePlan
    from finetune.run.train_loader import TrainDataLoader
    from finetune.run.validation import ValidationPlan


@dataclass(frozen=True, kw_only=True)
class Run:
    """What the loop works with, and what the summary tells of."""

    config: ResolvedConfig
    model: DiffusionModel
    chunks: Chunks
    encoded: EncodedDataset
    """The first chunk."""
    train_loader: "TrainDataLoader"
    trainer: Trainer
    samples: "SamplePlan"
    validation: "ValidationPlan"
    forgetting_probes: "ForgettingProbes | None"
    """None where forgetting is not measured, and in processes that are not the first."""
    originals: TrainingFeatures | None
    """What grids are compared with; None where that tells nothing, and in processes that are not the first."""
    folder: Path
    accelerator: Any
    """An `accelerate.Accelerator`."""
    provenance: Mapping[str, Any]
    """What its checkpoints say of it, for a resume to compare (`finetune/run/provenance.py`)."""
    events: Events

    @property
    def pictures(self) -> ImageDataset:
        """The first chunk: most often all."""
        return self.chunks.first

    def release(self) -> None:
        """Send the frozen parts that no visit to come needs from the device."""
        for network in (self.model.conditioner, self.model.encoder):
            if not self.train_loader.needs(network):
                network.to("cpu")
