"""The first-step gradient of a LoRA under sd-scripts' own loss functions, and under ours.

    git clone https://github.com/kohya-ss/sd-scripts
    python benchmarks/beside_sd_scripts.py sd-scripts

The functions are taken from its files as they are (`library/custom_train_functions.py`, `library/train_util.py`), so
that none of its packages need be installed, and put together as `train_network.py` does. Both sides get the same UNet
with the same LoRA, latents, noise, timesteps and masks, in fp32. Printed is |theirs - ours| / |theirs| of the whole
gradient.
"""

import argparse
import ast
import math
import random
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import DDPMScheduler
from torch import Tensor

from finetune.models.loading import load_model
from finetune.models.lora import add_lora, trainable
from finetune.training.loss_function import LossFunction
from finetune.training.noise_prediction import NoisePrediction
from finetune.training.noise_sampler import pyramid_noise

SCHEDULE: Mapping[str, Any] = {
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "num_train_timesteps": 1000,
    "clip_sample": False,
}
V: Mapping[str, Any] = {"v_parameterization": True}
SETTINGS: Mapping[str, Mapping[str, Any]] = {
    "epsilon": {},
    "v_prediction": V,
    "zero_terminal_snr, v_prediction": {**V, "zero_terminal_snr": True},
    "min_snr_gamma 5": {"min_snr_gamma": 5.0},
    "min_snr_gamma 5, v_prediction": {**V, "min_snr_gamma": 5.0},
    "min_snr_gamma 5, zero_terminal_snr, v_prediction": {**V, "zero_terminal_snr": True, "min_snr_gamma": 5.0},
    "the same, with the SNR of the rescaled schedule": {
        **V,
        "zero_terminal_snr": True,
        "min_snr_gamma": 5.0,
        "rescaled_snr": True,
    },
    "debiased_estimation_loss": {"debiased_estimation_loss": True},
    "debiased_estimation_loss, v_prediction": {**V, "debiased_estimation_loss": True},
    "scale_v_pred_loss_like_noise_pred": {**V, "scale_v_pred_loss_like_noise_pred": True},
    "loss_type l1": {"loss_type": "l1"},
    "loss_type huber, snr": {"loss_type": "huber"},
    "loss_type huber, exponential": {"loss_type": "huber", "huber_schedule": "exponential"},
    "loss_type huber, constant": {"loss_type": "huber", "huber_schedule": "constant"},
    "loss_type smooth_l1, snr": {"loss_type": "smooth_l1"},
    "masked loss": {"masked": True},
    "masked loss, huber": {"masked": True, "loss_type": "huber"},
    "prior_loss_weight 0.5": {"prior_loss_weight": 0.5},
    "prior_loss_weight 0.5, undivided": {"prior_loss_weight": 0.5, "undivided": True},
}
"""Name -> options as sd-scripts names them.

Half of the images are of the class. Ours divides the loss of a step by the mean weight; `undivided` does not.

Its trainer computes the SNR before it rescales the schedule to zero terminal SNR; `rescaled_snr` computes it after.
"""


def taken(folder: Path, file: str, *names: str) -> dict[str, Any]:
    """Functions of one of its files, defined in a namespace of their own."""
    tree = ast.parse((folder / file).read_text(encoding="utf-8"))
    wanted = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name in names]
    assert len(wanted) == len(names), f"{file} has not all of {', '.join(names)}"
    namespace: dict[str, Any] = {"torch": torch, "math": math, "random": random, "DDPMScheduler": DDPMScheduler}
    namespace |= {"logger": SimpleNamespace(info=lambda *_: None), "Number": float}
    header = "from __future__ import annotations\n"
    exec(compile(header + "\n".join(map(ast.unparse, wanted)), file, "exec"), namespace)
    return namespace


def weights(options: Mapping[str, Any]) -> Tensor:
    """The weight of each of six images, of which the last three are of the class."""
    return torch.tensor([1.0] * 3 + [options.get("prior_loss_weight", 1.0)] * 3)


def theirs(folder: Path, options: Mapping[str, Any], x0: Tensor, noise: Tensor, t: Any, mask: Tensor) -> Any:
    """UNet -> the loss, as `get_noise_pred_and_target`, `process_batch` and `post_process_loss` make it."""
    own = taken(
        folder, "library/custom_train_functions.py", "prepare_scheduler_for_custom_training", "get_snr_scale",
        "fix_noise_scheduler_betas_for_zero_terminal_snr", "apply_snr_weight", "apply_debiased_estimation",
        "scale_v_prediction_loss_like_noise_prediction", "apply_masked_loss",
    )  # fmt: skip
    util = taken(folder, "library/train_util.py", "get_huber_threshold_if_needed", "conditional_loss")
    args = SimpleNamespace(
        loss_type=options.get("loss_type", "l2"), huber_schedule=options.get("huber_schedule", "snr"), huber_c=0.1,
        huber_scale=1.0,
    )  # fmt: skip
    v = bool(options.get("v_parameterization"))
    scheduler: Any = DDPMScheduler(**SCHEDULE)
    own["prepare_scheduler_for_custom_training"](scheduler, "cpu")
    if options.get("zero_terminal_snr"):
        own["fix_noise_scheduler_betas_for_zero_terminal_snr"](scheduler)
    if options.get("rescaled_snr"):
        del scheduler.all_snr
        own["prepare_scheduler_for_custom_training"](scheduler, "cpu")
    noisy = scheduler.add_noise(x0, noise, t)
    target = scheduler.get_velocity(x0, noise, t) if v else noise

    def loss(unet: Any, cond: Mapping[str, Tensor]) -> Tensor:
        predicted = unet(noisy, t, **cond).sample
        threshold = util["get_huber_threshold_if_needed"](args, t, scheduler)
        error = util["conditional_loss"](predicted, target, args.loss_type, "none", threshold)
        if options.get("masked"):
            error = own["apply_masked_loss"](error, {"alpha_masks": mask[:, 0]})
        each = error.mean([1, 2, 3])
        if gamma := options.get("min_snr_gamma"):
            each = own["apply_snr_weight"](each, t, scheduler, gamma, v)
        if options.get("scale_v_pred_loss_like_noise_pred"):
            each = own["scale_v_prediction_loss_like_noise_prediction"](each, t, scheduler)
        if options.get("debiased_estimation_loss"):
            each = own["apply_debiased_estimation"](each, t, scheduler, v)
        return (each * weights(options)).mean()

    return loss


def ours(options: Mapping[str, Any], x0: Tensor, noise: Tensor, t: Tensor, mask: Tensor) -> Any:
    """UNet -> the loss of our objective."""
    scheduler = DDPMScheduler(
        **SCHEDULE,
        prediction_type="v_prediction" if options.get("v_parameterization") else "epsilon",
        rescale_betas_zero_snr=bool(options.get("zero_terminal_snr")),
    )
    objective = NoisePrediction(
        scheduler,
        snr_gamma=options.get("min_snr_gamma"),
        debiased_estimation=bool(options.get("debiased_estimation_loss")),
        scale_v_pred_loss_like_noise_pred=bool(options.get("scale_v_pred_loss_like_noise_pred")),
        loss_function=LossFunction(options.get("loss_type", "l2"), huber_schedule=options.get("huber_schedule", "snr")),
    )
    noised = replace(objective.add_noise(x0, noise, t), mask=mask if options.get("masked") else None)
    weight = weights(options)
    whole = len(weight) if options.get("undivided") else weight.sum()
    return lambda unet, cond: (weight * objective.loss(unet, noised, cond)).sum() / whole


def gradient(unet: Any, loss: Callable[..., Tensor], cond: Mapping[str, Tensor]) -> Tensor:
    """Of the whole LoRA, as one vector."""
    unet.zero_grad()
    loss(unet, cond).backward()
    return torch.cat([p.grad.flatten() for p in trainable(unet) if p.grad is not None])


def main() -> None:
    """Print a row for each setting, and one for the noise of several resolutions."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sd_scripts", type=Path, help="a checkout of sd-scripts")
    folder = parser.parse_args().sd_scripts
    source = torch.Generator().manual_seed(0)
    model = load_model("tiny")
    add_lora(model.unet, rank=4)
    for parameter in trainable(model.unet):  # or one of the two matrices has no gradient
        parameter.data += 0.02 * torch.randn(parameter.shape, generator=source)
    x0, noise = (torch.randn(6, 4, 8, 8, generator=source) for _ in range(2))
    t, mask = torch.tensor([0, 20, 250, 600, 900, 998]), torch.rand(6, 1, 8, 8, generator=source)
    width = model.unet.config["cross_attention_dim"]
    cond = {"encoder_hidden_states": torch.randn(6, 77, width, generator=source)}
    for name, options in SETTINGS.items():
        pair = [
            gradient(model.unet, side, cond)
            for side in (theirs(folder, options, x0, noise, t, mask), ours(options, x0, noise, t, mask))
        ]
        print(f"{name:52} {((pair[0] - pair[1]).norm() / pair[0].norm()).item():.1e}")
    own = taken(folder, "library/custom_train_functions.py", "pyramid_noise_like")
    print(f"{'multires_noise_iterations 6, discount 0.3':52} {pyramid_difference(own, noise[:1]):.1e}")


def pyramid_difference(own: dict[str, Any], noise: Tensor) -> float:
    """Of the noise of one example, with its random numbers drawn as ours are."""
    source = torch.Generator().manual_seed(1)
    ratio = lambda: torch.rand((), generator=source, dtype=torch.float64).item()  # noqa: E731
    own["random"] = SimpleNamespace(random=ratio)
    own["torch"] = SimpleNamespace(nn=torch.nn, randn=lambda *shape: torch.randn(shape, generator=source))
    theirs = own["pyramid_noise_like"](noise.clone(), "cpu", 6, 0.3)
    mine = pyramid_noise(noise[0], torch.Generator().manual_seed(1), iterations=6, discount=0.3)
    return ((theirs[0] - mine).norm() / theirs.norm()).item()


if __name__ == "__main__":
    main()
