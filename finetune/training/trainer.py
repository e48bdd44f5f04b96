"""Trainer: one optimizer step, and the state that must survive it."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from finetune.batch import Batch
from finetune.errors import RunError
from finetune.models.encoders import Encoder
from finetune.seeding import fold
from finetune.training.ema import Ema

MAX_OVERFLOWS = 25
"""Steps in a row that fp16 may skip: its loss scale starts at 2 ** 16 and halves each time."""


class Objective(Protocol):
    """What a network is trained to do: `NoisePrediction`, or one of your own."""

    def draw(self, x0: Tensor, keys: Tensor) -> Any:
        """Everything random of a visit: x0 (B, C, H, W), keys (B,) on the CPU."""
        ...

    def loss(self, network: Any, drawn: Any, cond: Mapping[str, Any], extra: Tensor | None, /) -> Tensor:
        """The loss of each example, (B,) fp32, from what `draw` answered."""
        ...


@dataclass(frozen=True)
class StepMetrics:
    """What one optimizer step did."""

    step: int
    """Steps done, this one included."""
    loss: float
    """sum(w l) / sum(w) over the step's examples."""
    grad_norm: float | None
    """L2 norm of the gradient before clipping; None where fp16 overflowed and the step was skipped."""
    lr: float
    examples: int


class Trainer:
    """Trains the parameters of `unet` that require gradients.

    Args:
        unet: the UNet, plain or with an adapter, or any module that the objective can call.
        encoder: turns what a batch stores into x0.
        objective: draws noise and timesteps, measures the error.
        optimizer: over the trainable parameters.
        learning_rate: updates done before (0 for the first) -> rate; None keeps the optimizer's own.
        micro_batch_size: examples per forward pass; None: the whole batch at once. Changes nothing but memory.
        max_grad_norm: clip to this norm; 0: never.
        precision: dtype of autocast; None computes in the weights' own. fp16 scales the loss dynamically.
        ema: follows each update.
        seed: of the dropout inside the network, anew for each step and micro-batch.
    """

    def __init__(
        self,
        unet: nn.Module,
        encoder: Encoder,
        objective: Objective,
        optimizer: torch.optim.Optimizer,
        *,
        learning_rate: Callable[[int], float] | None = None,
        micro_batch_size: int | None = None,
        max_grad_norm: float = 1.0,
        precision: torch.dtype | None = None,
        ema: Ema | None = None,
        seed: int = 0,
    ):
        self.unet = unet
        self.device = next(unet.parameters()).device
        self.encoder = encoder
        self.objective = objective
        self.optimizer = optimizer
        self.learning_rate = learning_rate
        self.micro_batch_size = micro_batch_size
        self.max_grad_norm = max_grad_norm
        self.precision = precision
        self.ema = ema
        self.seed = seed
        self.steps_done = 0
        self.updates = 0
        """Steps that changed the weights: all but those that fp16 skipped. Learning rate and EMA count these."""
        self.overflows = 0
        self.parameters = {name: p for name, p in unet.named_parameters() if p.requires_grad}
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=precision == torch.float16)
        self.has_dropout = any(isinstance(m, nn.Dropout) and m.p > 0 for m in unet.modules())

    def autocast(self) -> torch.autocast:
        """The precision that the UNet runs in, for sampling as for training."""
        return torch.autocast(self.device.type, dtype=self.precision, enabled=self.precision is not None)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Inside, the UNet holds its EMA weights, where there is an EMA."""
        if self.ema is None:
            yield
        else:
            with self.ema.swapped_in():
                yield

    def step(self, *batches: Batch) -> StepMetrics:
        """One optimizer step on all examples of the batches, whatever the micro-batch size.

        Args:
            batches: each of examples of one shape.

        Raises:
            RunError: the loss or gradient is not finite; the examples are named and no weight has changed.
        """
        lr = self._set_learning_rate()
        losses = self.backward(*batches)
        self.scaler.unscale_(self.optimizer)
        limit = self.max_grad_norm or float("inf")
        norm = nn.utils.clip_grad_norm_(list(self.parameters.values()), limit, foreach=True)
        weight = torch.cat([batch.weight for batch in batches]).to(losses.device)
        loss, grad_norm = torch.stack([(weight * losses).sum() / weight.sum(), norm]).tolist()  # the step's one sync
        if not math.isfinite(loss) or not math.isfinite(grad_norm):
            ids = [name for batch in batches for name in batch.ids]
            self._refuse_or_skip(ids, losses, loss, grad_norm)
        else:
            self.overflows = 0
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if not self.overflows:
            if self.ema is not None:
                self.ema.update(self.updates)
            self.updates += 1
        self.steps_done += 1
        return StepMetrics(self.steps_done, loss, None if self.overflows else grad_norm, lr, len(losses))

    def backward(self, *batches: Batch) -> Tensor:
        """Accumulate the gradient of sum(w l) / sum(w) over all batches; answers the examples' losses, (B,) fp32."""
        if not self.unet.training:
            self.unet.train()
        total = sum(batch.weight.sum() for batch in batches)
        losses = []
        parts = (part for batch in batches for part in batch.split(self.micro_batch_size or len(batch)))
        for number, part in enumerate(parts):
            with self._dropout_seeded(number), self.autocast():
                x0 = self.encoder.sample(part.stored, part.keys)
                noised = self.objective.draw(x0, part.keys)
                loss = self.objective.loss(self.unet, noised, part.cond, part.extra)
            self.scaler.scale((part.weight * loss).sum() / total).backward()
            losses.append(loss.detach())
        return torch.cat(losses)

    def _set_learning_rate(self) -> float:
        if self.learning_rate is not None:
            for group in self.optimizer.param_groups:
                group["lr"] = self.learning_rate(self.updates) * group.get("factor", 1.0)
        first = self.optimizer.param_groups[0]
        return first["lr"] / first.get("factor", 1.0)

    def _refuse_or_skip(self, ids: Sequence[str], losses: Tensor, loss: float, grad_norm: float) -> None:
        """Raise RunError, but for an overflow of fp16 gradients: the scaler skips that step and lowers its scale."""
        self.overflows += 1
        if math.isfinite(loss) and self.scaler.is_enabled() and self.overflows <= MAX_OVERFLOWS:
            return
        self.optimizer.zero_grad(set_to_none=True)
        bad = [name for name, finite in zip(ids, losses.isfinite().tolist(), strict=True) if not finite]
        whole = f"the gradient's norm is {grad_norm} over {', '.join(ids)}"
        what = f"the loss is not finite for {', '.join(bad)}" if bad else whole
        raise RunError(
            f"step {self.steps_done + 1}: {what}; "
            "no weight was changed. A lower learning_rate or mixed_precision no may help"
        )

    @contextmanager
    def _dropout_seeded(self, micro_batch: int) -> Iterator[None]:
        """Dropout draws from torch's own generator: seed it for this step and micro-batch, and put it back after."""
        if not self.has_dropout:
            yield
            return
        seed = fold(self.seed, "dropout", self.steps_done, micro_batch) & 0xFFFFFFFF
        on_cuda = self.device.type == "cuda"
        with torch.random.fork_rng(devices=[self.device] if on_cuda else []):
            torch.default_generator.manual_seed(seed)  # `torch.manual_seed` would change every other device's, for good
            if on_cuda:
                torch.cuda.manual_seed(seed)
            yield

    def state_dict(self) -> dict[str, Any]:
        """Everything a resumed run needs beside its config: weights, optimizer, EMA, scaler, steps done."""
        return {
            "weights": {name: parameter.detach() for name, parameter in self.parameters.items()},
            "optimizer": self.optimizer.state_dict(),
            "ema": {} if self.ema is None else self.ema.shadow,
            "scaler": self.scaler.state_dict(),
            "step": self.steps_done,
            "updates": self.updates,
        }

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a `state_dict` of a trainer with the same parameters.

        Raises:
            RunError: the saved parameters are not this trainer's.
        """
        if state["weights"].keys() != self.parameters.keys():
            raise RunError("the checkpoint holds other parameters than this run trains (model, method or rank differ)")
        for name, parameter in self.parameters.items():
            parameter.copy_(state["weights"][name])
        self.optimizer.load_state_dict(dict(state["optimizer"]))
        if self.ema is not None:
            self.ema.load(state["ema"])
        self.scaler.load_state_dict(dict(state["scaler"]))
        self.steps_done, self.updates = state["step"], state["updates"]
