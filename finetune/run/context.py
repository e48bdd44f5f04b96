"""Run: the parts of a run."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.cache.encoded_dataset import EncodedDataset
from finetune.config import ResolvedConfig
from finetune.data.chunks import Chunks
from finetune.data.image_dataset import ImageDataset
from finetune.evaluators.early_stopping import EarlyStopping
from finetune.evaluators.evaluator import EvaluationLog, Evaluator
from finetune.evaluators.forgetting import Forgetting
from finetune.evaluators.sample_grids import SampleGrids
from finetune.evaluators.validation import Validation
from finetune.models.loading import DiffusionModel
from finetune.results.events import Events
from finetune.training.objective import DiffusionObjective
from finetune.training.trainer import Trainer

if TYPE_CHECKING:  # they work with a `Run` themselves
    from finetune.run.train_loader import TrainDataLoader


@dataclass(frozen=True, kw_only=True)
class Run:
    """What the loop works with, and what the summary tells of."""

    config: ResolvedConfig
    model: DiffusionModel
    chunks: Chunks
    encoded: EncodedDataset
    """The first chunk."""
    train_loader: "TrainDataLoader"
    trainer: Trainer[DiffusionObjective]
    validation: Validation
    forgetting: Forgetting | None
    """None where forgetting is not measured, and in processes that are not the main one."""
    grids: SampleGrids
    evaluators: tuple[Evaluator, ...] = ()
    """All that runs while training pauses, in this order; none in processes that are not the main one."""
    early_stopping: EarlyStopping
    log: EvaluationLog
    """Where evaluators record what they measure."""
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

    def due(self, step: int) -> list[Evaluator]:
        """Return the evaluators that run after this step."""
        return [evaluator for evaluator in self.evaluators if evaluator.should_run(step)]
