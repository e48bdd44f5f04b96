"""TrainDataLoader: the batches of a run's steps, from one chunk of its images after another."""

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from itertools import chain, pairwise

from finetune.batch import Batch
from finetune.cache.encoded_dataset import EncodedDataset
from finetune.config import ResolvedConfig
from finetune.data.chunks import Chunks, ChunkSteps
from finetune.data.image_dataset import ImageDataset
from finetune.data.loader import training_steps
from finetune.data.prefetch import DEPTH, ahead
from finetune.models.conditioners import Conditioner
from finetune.models.encoders import Encoder
from finetune.models.loading import DiffusionModel
from finetune.run.build import encoded_for
from finetune.training.micro_batch import PreparedStep
from finetune.training.trainer import Trainer


def prepared_ahead(trainer: Trainer, loader: "TrainDataLoader") -> AbstractContextManager[Iterator[PreparedStep]]:
    """The steps from the trainer's on, prepared by a thread as soon as visits need no encoder."""
    steps = (trainer.prepare(*batches) for batches in loader.steps(trainer.steps_done))
    return ahead(steps, allowed=lambda: not loader.live)


class TrainDataLoader:
    """What the loop reads. While it reads one chunk, a thread looks at the next.

    Args:
        config: of the run.
        model: its frozen parts are used.
        chunks: all that is read.
        first: the first chunk, encoded.
        trainer: says where the tensors go, and which part of each step this process computes.
        on_chunk_opened: called with each chunk after the first, when the run reaches it.
    """

    def __init__(
        self,
        config: ResolvedConfig,
        model: DiffusionModel,
        chunks: Chunks,
        first: EncodedDataset,
        trainer: Trainer,
        on_chunk_opened: Callable[[ChunkSteps, ImageDataset], None] | None = None,
    ) -> None:
        self._config, self._model, self._volumes, self._first = config, model, chunks, first
        self._trainer, self._on_chunk_opened = trainer, on_chunk_opened
        self._current, self._left = first, 0
        self._opener = ThreadPoolExecutor(1, "next volume")

    @property
    def live(self) -> bool:
        """Whether what comes next needs an encoder, which nothing else can use meanwhile."""
        return self._current.live or (len(self._volumes) > 1 and self._left <= DEPTH)

    def uses(self, network: Encoder | Conditioner | None) -> bool:
        """Whether visits to come need it: it stays on its device."""
        return self._first.uses(network) or self._current.uses(network)

    def steps(self, start: int) -> Iterator[tuple[Batch, ...]]:
        """The batches of each step from this one (0 for the first) to the last of the run."""
        config, parallel = self._config, self._trainer.parallel
        chunk_steps = self._volumes.chunk_steps(range(start, config.max_train_steps), config.global_batch)
        opening: Future[ImageDataset] | None = None
        step = start
        for steps_of_chunk, following in pairwise(chain(chunk_steps, [None])):
            assert steps_of_chunk is not None
            encoded = self._open_chunk(
                steps_of_chunk, opening.result() if opening else self._volumes.at(steps_of_chunk.chunk)
            )
            opening = None
            for batches in training_steps(
                encoded,
                batch_size=config.global_batch,
                steps=steps_of_chunk.own.stop,
                seed=config.seed,
                start=steps_of_chunk.own.start,
                num_workers=config.dataloader_num_workers,
                rank=parallel.rank,
                world_size=parallel.world_size,
                steps_before=step - steps_of_chunk.own.start,
            ):
                if opening is None and following:  # after workers were forked: they are to inherit no lock of a thread
                    opening = self._opener.submit(self._volumes.at, following.chunk)
                self._left -= 1
                yield batches
            step += len(steps_of_chunk.own)

    def release_frozen(self) -> None:
        """Send the frozen networks that no visit to come needs from the device."""
        for network in (self._model.conditioner, self._model.encoder):
            if not self.uses(network):
                network.to("cpu")

    def close(self) -> None:
        """Keep what was encoded last; nothing more is going to be read. A look at the next chunk is not waited for."""
        self._first.close()
        self._current.close()
        self._opener.shutdown(wait=False, cancel_futures=True)

    def _open_chunk(self, steps_of_chunk: ChunkSteps, pictures: ImageDataset) -> EncodedDataset:
        if self._current is not self._first:
            self._current.close()
        self._left = len(steps_of_chunk.own)
        if steps_of_chunk.chunk == 0:
            self._current = self._first
        else:
            if self._on_chunk_opened:
                self._on_chunk_opened(steps_of_chunk, pictures)
            self._to_device(needed=self._config.encode == "before")
            parallel = self._trainer.parallel
            self._current = encoded_for(
                self._config,
                self._model,
                pictures,
                steps=steps_of_chunk.own,
                validated=(),
                parallel=parallel,
                time_budget=0,
            )
        self._to_device()
        return self._current

    def _to_device(self, *, needed: bool = False) -> None:
        """The frozen parts that visits to come need, or both."""
        for network in (self._model.encoder, self._model.conditioner):
            if needed or self.uses(network):
                network.to(self._trainer.device)
