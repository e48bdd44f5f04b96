"""Trainer: one optimizer step, and the state that a checkpoint saves."""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from finetune.batch import Batch, as_input, moved, tensors_of
from finetune.deprecation import Renamed, renamed_in
from finetune.errors import RunError
from finetune.models.encoders import Encoder
from finetune.out_of_memory import free_cached_memory, means_out_of_memory
from finetune.seeding import fold
from finetune.training.cuda_graphs import CudaGraphs
from finetune.training.distributed import Parallel
from finetune.training.ema import Ema
from finetune.training.fused_backward import FusedBackward
from finetune.training.gradient_checkpointing import sets_generator
from finetune.training.half_precision import TOLERANCES, check_half_precision
from finetune.training.master_weights import MasterWeights
from finetune.training.metrics import DeviceScalars, Fault, NotFinite, StepMetrics, StepValues
from finetune.training.micro_batch import MicroBatch, PreparedStep
from finetune.training.nonfinite import FiniteGate
from finetune.training.objective import Objective
from finetune.training.optimizer_state import load_optimizer, optimizer_state, switch_mode
from finetune.training.prior_prediction import Prior, with_prior
from finetune.training.stochastic_rounding import StochasticRounding

MAX_OVERFLOWS = 25
"""Steps in a row that fp16 may skip: its loss scale starts at 2 ** 16 and halves each time."""


AnyObjective = TypeVar("AnyObjective", bound=Objective)


class Trainer(Generic[AnyObjective]):
    """Trains the parameters of `unet` that require gradients.

    Args:
        unet: the UNet, plain or with an adapter, or any module that the objective can call. What learns is in fp32.
        encoder: turns what a batch stores into x0.
        objective: draws noise and timesteps, measures the error.
        optimizer: over the trainable parameters.
        learning_rate: updates done before (0 for the first) -> rate; None keeps the optimizer's own.
        micro_batch_size: examples per forward pass; None: the whole batch at once. Changes nothing but memory. It is
            halved in all processes when memory runs out, and the step is repeated (see `oom_micro_batch_size`).
        max_grad_norm: clip to this norm; 0: never.
        precision: dtype that the UNet computes in (see `MasterWeights`); None: the weights' own. fp16 scales the loss
            dynamically.
        masters: keep what learns in fp32 too. False: in bf16 alone, which `precision` is then (see
            `StochasticRounding`); without `ema`, and with an optimizer that treats each parameter for itself.
        in_backward: update in the middle of the backward pass (see `FusedBackward`): without `masters` and clipping, in
            one process, and in steps of one micro-batch. A step whose loss is not finite changes no weight; one whose
            gradient is not, changes some of them, and ends training.
        max_bad_steps: in a row, that are not finite and so leave the weights as they are, until that is an error.
        ema: follows each update.
        seed: of the dropout inside the network, again for each step and micro-batch.
        parallel: the processes that train together, each of which is given its part of each step.
        cuda_graphs: on a GPU, launch a whole micro-batch at once (see `CudaGraphs`), where that is possible: in half
            precision beside masters, without dropout and with no gradient checkpointing but `recompute`'s. The
            objective's `loss` must not read a value then.
        prior: what class pictures teach, in place of their noise (see `finetune/training/prior_prediction.py`); the
            objective is a `NoisePrediction` then.
        fixed: name -> frozen tensor that a checkpoint holds too, as another machine would compute other bits.
        constrain: called with the parameters after each update, which it may change in place.

    Raises:
        ValueError: `in_backward` beside what it goes without.
    """

    def __init__(
        self,
        unet: nn.Module,
        encoder: Encoder,
        objective: AnyObjective,
        optimizer: torch.optim.Optimizer,
        *,
        learning_rate: Callable[[int], float] | None = None,
        micro_batch_size: int | None = None,
        max_grad_norm: float = 1.0,
        precision: torch.dtype | None = None,
        masters: bool = True,
        in_backward: bool = False,
        max_bad_steps: int = 1,
        ema: Ema | None = None,
        seed: int = 0,
        parallel: Parallel = Parallel(),  # noqa: B008 # frozen
        cuda_graphs: bool = False,
        prior: Prior | None = None,
        constrain: Callable[[Mapping[str, Tensor]], None] | None = None,
        fixed: Mapping[str, Tensor] | None = None,
    ):
        self.unet = unet
        self.masters = MasterWeights(unet, precision) if masters else StochasticRounding(unet)
        self.parameters = self.masters.parameters
        first = next(unet.parameters())
        self.device, self.dtype = first.device, first.dtype
        self.encoder = encoder
        self.objective = objective
        self._sample = renamed_in(objective, old="draw", new="sample")
        self.prior = prior
        self.constrain = constrain
        self.fixed = dict(fixed or {})
        self.optimizer = optimizer
        self.averages = switch_mode(optimizer, "train")
        """The optimizer averages the weights itself (schedule-free), and evaluations see its average."""
        self.learning_rate = learning_rate
        self.micro_batch_size = micro_batch_size
        self.oom_micro_batch_size: int | None = None
        """The micro-batch size that was found where memory did not suffice."""
        self.max_grad_norm = max_grad_norm
        self.ema = ema
        self.seed = seed
        self.parallel = parallel
        self.steps_done = 0
        self.updates = 0
        """Steps that changed the weights: all but those that fp16 skipped. Learning rate and EMA count these."""
        self.overflows = 0
        self.in_backward = None
        if in_backward:
            if (
                max_grad_norm
                or max_bad_steps > 1
                or parallel.world_size > 1
                or not isinstance(self.masters, StochasticRounding)
            ):
                raise ValueError("in_backward: masters=False, max_grad_norm=0, max_bad_steps=1, and one process alone")
            self.in_backward = FusedBackward(self.masters, optimizer.step)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=precision == torch.float16)
        gated = getattr(optimizer, "_step_supports_amp_scaling", False) and not in_backward
        self.syncs_every_step = self.scaler.is_enabled() or not gated
        """Each step waits for the device before the update: the optimizer cannot be told there whether to make it."""
        self.max_bad_steps = max_bad_steps
        self.bad_steps = 0
        """In a row, as far as the host has been told."""
        self.gate = FiniteGate(max_bad_steps, self.device)
        self.has_dropout = any(_drops(module) for module in unet.modules())
        draws = self.has_dropout or sets_generator(unet)
        possible = self.device.type == "cuda" and precision not in (None, torch.float16) and masters and not draws
        self.graphs = CudaGraphs(self._compute, self.masters.working, self.device) if cuda_graphs and possible else None
        self._before: StepMetrics | None = None
        self._trusted = set[torch.Size]()
        """Heights and widths on which half precision was checked."""

    def step(self, *batches: Batch) -> StepMetrics:
        """One optimizer step on all examples of the batches, whatever the micro-batch size.

        Args:
            batches: each of examples of one shape.

        Raises:
            NotFinite: the loss or gradient of this step or of the one before is not finite, for the `max_bad_steps`th
                time in a row; the message names the step and the examples, and no weight has changed since. With fused
                AdamW or SGD it comes with the next step, or when the metrics are read; with other optimizers, which
                cannot be told on the device, and in fp16, at once.
            torch.OutOfMemoryError: memory does not suffice for one example at a time.
        """
        return self.run_prepared(self.prepare(*batches))

    def prepare(self, *batches: Batch) -> PreparedStep:
        """The random part of a step, and its way to the device: a function of the batches, so call it when you like."""
        micro_batches = [part for batch in batches for part in batch.split(self.micro_batch_size or len(batch))]
        global_step = batches[0].global_step
        total = global_step.weight if global_step else sum(part.weight.sum() for part in micro_batches)
        drawn = []
        for part in micro_batches:
            noised = self._sample(self.encoder.sample(part.latent_params, part.keys), part.keys)
            noised = noised if part.mask is None else replace(noised, mask=part.mask)
            rows = torch.tensor([row for row, is_class_image in enumerate(part.is_class_image) if is_class_image])
            prior = rows if self.prior is not None and len(rows) else None
            drawn.append(
                MicroBatch(noised, as_input(part.cond, self.dtype), part.unet_channels, part.weight / total, prior)
            )
        if global_step:
            ids, start, keys = global_step.ids, global_step.start, global_step.keys
        else:
            ids, start = tuple(name for batch in batches for name in batch.ids), 0
            keys = tuple(key for batch in batches for key in batch.keys.tolist())
        return PreparedStep(tuple(moved(part, self.device) for part in drawn), ids, start, keys)

    take, settle = Renamed("run_prepared"), Renamed("raise_if_diverged")
    in_full, averaged = Renamed("export_weights"), Renamed("ema_weights")

    def run_prepared(self, step: PreparedStep) -> StepMetrics:
        """`step`, of what was prepared."""
        lr = self._set_learning_rate()
        step, losses_here = self._backward_with_oom_retry(step)
        losses, loss = self._all_reduce(step, losses_here)
        self.scaler.unscale_(self.optimizer)
        norm = self._clip_grad_norm()
        number, arriving = self.steps_done + 1, DeviceScalars(loss, norm)
        read = partial(self._read_values, number, ids=step.ids, keys=step.keys, losses=losses, arriving=arriving)
        good = True
        if self.syncs_every_step:
            values = read()
            arriving, read, good = None, lambda: values, values.fault is None
        else:
            shut = self.gate.shut(loss, norm)
            self.optimizer.found_inf = shut  # pyright: ignore[reportAttributeAccessIssue] # fused optimizers'
        self._update(good)
        self.steps_done = number
        metrics = StepMetrics(number, lr, len(step.ids), arriving, read)
        self.raise_if_diverged()
        self._before = metrics
        return metrics

    def _all_reduce(self, step: PreparedStep, losses_here: Tensor) -> tuple[Tensor, Tensor]:
        """All losses of the step, (B,), and its loss; gradients, too, are sums over all processes from here on."""
        loss = (torch.cat([part.share for part in step.parts]) * losses_here).sum()
        if self.parallel.world_size == 1:
            return losses_here, loss
        reduced = losses_here.new_zeros(len(step.ids) + 1)
        reduced[step.start : step.start + len(losses_here)], reduced[-1] = losses_here, loss
        gradients = [p.grad for p in self.parameters.values() if p.grad is not None]
        self.parallel.all_reduce_sum([*gradients, reduced])
        return reduced[:-1], reduced[-1]

    def _clip_grad_norm(self) -> Tensor:
        """The gradient's norm, 0-dimensional, before it is clipped."""
        if self.in_backward is not None:
            return self.in_backward.norm
        limit = self.max_grad_norm or float("inf")
        return nn.utils.clip_grad_norm_(list(self.parameters.values()), limit, foreach=True)

    def raise_if_diverged(self) -> None:
        """Wait for the step before, and raise NotFinite if it was one bad step too many."""
        before, self._before = self._before, None
        if before is not None:
            before.as_dict()

    def _backward_with_oom_retry(self, step: PreparedStep) -> tuple[PreparedStep, Tensor]:
        """`backward` of a step, and in which micro-batches it was possible: the same in all processes."""
        while True:
            step = step.cut(self.micro_batch_size)
            short, losses_here = 0, None
            try:
                losses_here = self.backward(step)
            except RuntimeError as error:
                # Updates in the backward pass take steps of one part alone, and may have begun.
                if not means_out_of_memory(error) or self.in_backward is not None:
                    raise
                short = max(map(len, step.parts))  # no more here: the error keeps what is to be freed
            short = self.parallel.all_reduce_max(short)
            if losses_here is not None and not short:
                return step, losses_here
            if short == 1:
                raise torch.OutOfMemoryError(f"step {self.steps_done + 1}, one example at a time")
            self.oom_micro_batch_size = self.micro_batch_size = -(-short // 2)
            losses_here = self.graphs = None
            self._drop_gradients()
            free_cached_memory()

    def backward(self, step: PreparedStep) -> Tensor:
        """Accumulate the gradient of sum(w l) / sum(w) over all parts; answers the examples' losses, (B,) fp32."""
        if not self.unet.training:
            self.unet.train()
        if self.in_backward is not None and len(step.parts) > 1:
            raise RunError(f"in_backward: step {self.steps_done + 1} is of {len(step.parts)} micro-batches, not one")
        losses = []
        for number, drawn in enumerate(step.parts):
            part = with_prior(drawn, self.prior)
            self._check_half_precision(part)
            with self._dropout_seeded(number):
                losses.append(self._compute(part) if self.graphs is None else self.graphs(part))
            self.masters.collect()
        return torch.cat(losses)

    def _check_half_precision(self, part: MicroBatch) -> None:
        """Once for each height and width, on one example. Raises RunError where a layer errs."""
        if self.dtype not in TOLERANCES:
            return
        shape = next(tensor.shape[-2:] for tensor in tensors_of(part.drawn) if tensor.dim() == 4)
        if shape in self._trusted:
            return
        one = part.split(1)[0]
        check_half_precision(self.unet, lambda: self.objective.loss(self.unet, one.drawn, one.cond, one.unet_channels))
        self._trusted.add(shape)

    def _compute(self, part: MicroBatch) -> Tensor:
        loss = self.objective.loss(self.unet, part.drawn, part.cond, part.unet_channels)
        total = self.scaler.scale((part.share * loss).sum())
        with self.in_backward.updates(total, self._rounding_key()) if self.in_backward else nullcontext():
            total.backward()
        return loss.detach()

    def _update(self, good: bool) -> None:
        """The optimizer's step on the masters, unless host, device or scaler says no; then what follows them."""
        if good and self.in_backward is None:
            self.masters.update(partial(self.scaler.step, self.optimizer), self._rounding_key())
        self.scaler.update()
        self._drop_gradients()
        if self.overflows:
            return
        if self.constrain is not None:
            self.constrain(self.parameters)
        self.masters.write_back()
        if self.ema is not None:
            self.ema.update(self.updates)
        self.updates += 1

    def _rounding_key(self) -> int:
        return fold(self.seed, "rounding", self.steps_done)

    def _drop_gradients(self) -> None:
        self.masters.discard()
        self.optimizer.zero_grad(set_to_none=True)

    def _set_learning_rate(self) -> float:
        if self.learning_rate is None:
            return self.optimizer.param_groups[0]["lr"]
        lr = self.learning_rate(self.updates)
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group.get("factor", 1.0)
        return lr

    def _read_values(
        self, step: int, *, ids: tuple[str, ...], keys: tuple[int, ...], losses: Tensor, arriving: DeviceScalars
    ) -> StepValues:
        """Loss and norm of a step, and what is wrong with them. Raises NotFinite after one bad step too many."""
        loss, norm = arriving.wait()
        if math.isfinite(loss) and math.isfinite(norm):
            self.overflows = self.bad_steps = 0
            return StepValues(loss, norm)
        self.overflows += 1
        if math.isfinite(loss) and self.scaler.is_enabled() and self.overflows <= MAX_OVERFLOWS:
            return StepValues(loss, None)
        self.overflows = 0
        self.bad_steps += 1
        fault = Fault(step, ids, tuple(losses.tolist()), loss=loss, grad_norm=norm, keys=keys)
        if self.bad_steps < self.max_bad_steps:
            return StepValues(loss, norm, fault)
        self._drop_gradients()
        self.bad_steps = 0
        self.gate.open()  # who catches the error may go on
        in_a_row = f" after {self.max_bad_steps} bad steps in a row" if self.max_bad_steps > 1 else ""
        advice = "A lower learning_rate or mixed_precision no may help"
        if step == 1 and (bad := self._weight_that_is_not_finite()):
            advice = f"The base model's own weights are not finite: {bad}"
        late = self.in_backward is not None and self.in_backward.changed
        changed = "later layers were changed already, the last checkpoint is whole" if late else "no weight was changed"
        raise NotFinite(f"{fault}; {changed}{in_a_row}. {advice}", fault)

    def _weight_that_is_not_finite(self) -> str | None:
        """The name of a weight that is not finite; None: all are."""
        return next((name for name, weight in self.unet.named_parameters() if not weight.isfinite().all()), None)

    @contextmanager
    def _dropout_seeded(self, micro_batch: int) -> Iterator[None]:
        """Dropout draws from torch's own generator: seed it for this step and micro-batch, and put it back after."""
        if not self.has_dropout:
            yield
            return
        where = (self.steps_done, micro_batch, *[self.parallel.rank] * (not self.parallel.is_main_process))
        seed = fold(self.seed, "dropout", *where) & 0xFFFFFFFF
        on_cuda = self.device.type == "cuda"
        with torch.random.fork_rng(devices=[self.device] if on_cuda else []):
            torch.default_generator.manual_seed(seed)  # `torch.manual_seed` would change every other device's, for good
            if on_cuda:
                torch.cuda.manual_seed(seed)
            yield

    @contextmanager
    def ema_weights(self) -> Iterator[None]:
        """Compute with averaged weights for a while, where there is an EMA or the optimizer averages: for pictures."""
        if self.ema is None and not self.averages:
            yield
            return
        try:
            with self._averaged_weights():
                self.masters.write_back()
                yield
        finally:
            self.masters.write_back()

    @contextmanager
    def export_weights(self) -> Iterator[None]:
        """Put the learned weights in fp32 into the UNet for a while, as averages where there are any: for an export."""
        self.raise_if_diverged()
        with self._averaged_weights(), self.masters.lent_weights():
            yield

    @contextmanager
    @torch.no_grad()
    def _averaged_weights(self) -> Iterator[None]:
        if self.ema is not None:
            with self.ema.swapped_in():
                yield
            return
        if not self.averages:
            yield
            return
        trained = [parameter.clone() for parameter in self.parameters.values()]
        switch_mode(self.optimizer, "eval")
        try:
            yield
        finally:  # switching back rounds, and an evaluation must not change what is learned
            switch_mode(self.optimizer, "train")
            torch._foreach_copy_(list(self.parameters.values()), trained)

    @torch.no_grad()
    def adopt_weights(self, weights: Mapping[str, Tensor], step: int) -> None:
        """Training is over, and these weights, of an earlier step, are its result, averaged already."""
        self.raise_if_diverged()
        for name, parameter in self.parameters.items():
            parameter.copy_(weights[name])
        self.masters.write_back()
        self.ema, self.averages, self.steps_done = None, False, step

    def _kept(self) -> dict[str, Tensor]:
        """The tensors of the network that a checkpoint holds."""
        return {**self.parameters, **self.fixed}

    def state_dict(self) -> dict[str, Any]:
        """Everything a resumed run needs beside its config: weights, optimizer, EMA, scaler, steps done.

        Raises NotFinite when the last step was one bad step too many.
        """
        self.raise_if_diverged()
        return {
            "weights": {name: tensor.detach() for name, tensor in self._kept().items()},
            "optimizer": optimizer_state(self.optimizer, self.masters.held),
            "ema": {} if self.ema is None else self.ema.shadow,
            "scaler": self.scaler.state_dict(),
            "step": self.steps_done,
            "updates": self.updates,
            "bad_steps": self.bad_steps,
            "fits": self.oom_micro_batch_size,
        }

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a `state_dict` of a trainer with the same parameters.

        Moments and step counts come from the state, by parameter name; hyperparameters stay those of this trainer's
        optimizer. An EMA that the state lacks starts from its weights.

        Raises:
            RunError: the saved parameters are not this trainer's, or its optimizer's state is of another kind.
        """
        self._before = None
        shapes = {name: weight.shape for name, weight in state["weights"].items()}
        own = self._kept()
        if shapes != {name: tensor.shape for name, tensor in own.items()}:
            raise RunError("the checkpoint holds other parameters than this run trains (model, method or rank differ)")
        for name, tensor in own.items():
            tensor.copy_(state["weights"][name])
        self.masters.write_back()
        kept_options = () if self.learning_rate is not None else ("lr",)
        load_optimizer(self.optimizer, state["optimizer"], self.masters.held, self.parameters, kept_options)
        if self.ema is not None:
            self.ema.load(state["ema"] or state["weights"])
        if state["scaler"]:  # none of a run that was not in fp16
            self.scaler.load_state_dict(dict(state["scaler"]))
        self.steps_done, self.updates = state["step"], state["updates"]
        self.bad_steps = state.get("bad_steps", 0)  # versions without these wrote neither
        self.gate.open(self.bad_steps)
        if oom_micro_batch_size := state.get("fits"):
            self.oom_micro_batch_size = self.micro_batch_size = oom_micro_batch_size


def _drops(module: nn.Module) -> bool:
    """Whether a module draws what it leaves out; peft's LoHa and LoKr keep a share for each adapter."""
    if isinstance(module, nn.Dropout):
        return module.p > 0
    shares = [getattr(module, name, None) for name in ("rank_dropout", "module_dropout")]
    return any(max(share.values(), default=0) > 0 for share in shares if isinstance(share, dict))
