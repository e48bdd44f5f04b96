"""What somebody adds from outside of the package, through its public protocols."""

import json
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionInstructPix2PixPipeline
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms.v2.functional import pil_to_tensor

import finetune as ft
from finetune import seeding
from finetune.errors import Interrupted
from finetune.models.encoders import Encoder, PixelEncoder
from finetune.models.image_condition import ConditionImages
from finetune.run.context import Run
from finetune.training.forgetting import probe_drift, record_probe
from finetune.training.objective import DiffusionObjective, NoisedBatch, prediction
from tests.small_trainer import small_batch


@pytest.fixture(autouse=True)
def global_generator_untouched() -> None:
    """Whole runs go through diffusers pipelines, which may draw from torch's global generator."""


class WeightNorm:
    """The L2 norm of what learns, every two steps."""

    def __init__(self, run: Run) -> None:
        self._trainer, self._log, self._total = run.trainer, run.log, run.config.max_train_steps

    def should_run(self, step: int) -> bool:
        return step % 2 == 0 or step == self._total

    def run(self, step: int) -> None:
        with self._log.timed("weight_norm", step), self._trainer.ema_weights():
            norm = sum(p.square().sum() for p in self._trainer.parameters.values()).sqrt().item()
        self._log.write(
            "weight_norm",
            {"step": step, "norm": norm, "label": "L2", "event": "norm"},
            tracked={"weights/norm": norm},
            message=f"weights at step {step}: norm {norm:.3f}",
        )


def evaluations(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "evaluations.jsonl").read_text().splitlines()]


def config(pictures: Path, output: Path, **more: object) -> ft.TrainConfig:
    basic = {"data": str(pictures), "output_dir": str(output), "max_train_steps": 5, "train_batch_size": 1, "rank": 2}
    return ft.TrainConfig(**basic | {"num_inference_steps": 0} | more)


def test_an_evaluator_of_the_callers_own(pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    straight = ft.fine_tune(config(pictures, tmp_path / "straight"), evaluators=[WeightNorm])
    lines = evaluations(straight)
    assert [(line["step"], line["name"]) for line in lines] == [(step, "weight_norm") for step in (0, 2, 4, 5)]
    assert len({line["norm"] for line in lines}) == 4
    assert f"weights at step 5: norm {lines[-1]['norm']:.3f}\n" in capsys.readouterr().out
    events = [json.loads(line) for line in (straight / "events.jsonl").read_text().splitlines()]
    assert [event["norm"] for event in events if event["event"] == "evaluation"] == [line["norm"] for line in lines]
    report = (straight / "report.html").read_text()
    assert "<figcaption>weight_norm: norm</figcaption>" in report
    timings = (straight / "timings.jsonl").read_text()
    assert timings.count("weight_norm_seconds") == 4
    plain = ft.fine_tune(config(pictures, tmp_path / "plain"))
    assert (plain / "metrics.jsonl").read_bytes() == (straight / "metrics.jsonl").read_bytes()
    assert not (plain / "evaluations.jsonl").exists()


def test_a_resumed_run_measures_the_same(pictures: Path, tmp_path: Path) -> None:
    straight = ft.fine_tune(config(pictures, tmp_path / "straight"), evaluators=[WeightNorm])
    with pytest.raises(Interrupted):
        ft.fine_tune(config(pictures, tmp_path / "out", max_train_minutes=1e-9), evaluators=[WeightNorm])
    resumed = ft.fine_tune(config(pictures, tmp_path / "out"), evaluators=[WeightNorm])
    assert evaluations(resumed) == evaluations(straight)
    ft.fine_tune(config(pictures, tmp_path / "out", seed=1, overwrite_output_dir=True))
    assert not (tmp_path / "out/evaluations.jsonl").exists()


class RectifiedFlow:
    """Liu et al. 2023, "Flow Straight and Fast", eq. 1: x_t = (1 - t) x0 + t noise, the target is noise - x0."""

    prediction_type = "flow_prediction"

    def sample(self, x0: Tensor, keys: Tensor) -> NoisedBatch:
        noise = seeding.normal(keys, "noise", x0.shape[1:])
        return self.add_noise(x0, noise, self.sample_timesteps(keys))

    def sample_timesteps(self, keys: Tensor) -> Tensor:
        """Logit-normal, as in Esser et al. 2024."""
        return seeding.normal(keys, "timestep", (1,)).flatten().sigmoid() * 1000

    def validation_timesteps(self, keys: Tensor, part: int, parts: int) -> Tensor:
        return torch.full((len(keys),), 1000 * (part + 0.5) / parts)

    def probe_timesteps(self, states: int) -> tuple[int, ...]:
        return tuple(1000 * (state + 1) // states for state in reversed(range(states)))

    def add_noise(self, x0: Tensor, noise: Tensor, t: Tensor) -> NoisedBatch:
        share = (t / 1000).view(-1, 1, 1, 1)
        return NoisedBatch((1 - share) * x0 + share * noise, t, noise - x0, torch.ones(len(t)))

    def loss(
        self, unet: Any, noised: NoisedBatch, cond: Mapping[str, Any], unet_channels: Tensor | None = None
    ) -> Tensor:
        error = prediction(unet, noised.x_t, noised.t, cond) - noised.target
        return error.square().mean(dim=(1, 2, 3))

    def predict_v(self, predicted: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        return predicted

    def step(self, x_t: Tensor, v: Tensor, t: Tensor, to: Tensor) -> Tensor:
        return x_t + ((to - t) / 1000).view(-1, 1, 1, 1) * v


class Constant(nn.Module):
    """Answers one picture, whatever it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.answer = nn.Parameter(torch.zeros(1, 4, 8, 8))

    def forward(self, x: Tensor, t: Tensor, **cond: Tensor) -> SimpleNamespace:
        scale = cond["encoder_hidden_states"].mean(dim=(1, 2)).view(-1, 1, 1, 1)
        return SimpleNamespace(sample=(self.answer * scale).expand(len(x), 4, 8, 8))


def test_an_objective_of_the_callers_own() -> None:
    objective: DiffusionObjective = RectifiedFlow()
    unet = Constant()
    trainer = ft.Trainer(unet, PixelEncoder(), objective, torch.optim.SGD(unet.parameters(), lr=0.5))
    first = trainer.step(small_batch()).loss
    second = trainer.step(small_batch()).loss
    assert second < first
    x0 = PixelEncoder().sample(small_batch().latent_params, torch.arange(2))
    noise = seeding.normal(torch.arange(2), "noise", (4, 8, 8))
    gradient = -2 * (noise - x0).mean(dim=0) / noise[0].numel()
    step = -0.5 * gradient * min(1.0, 1 / gradient.norm().item())
    fresh = Constant()
    ft.Trainer(fresh, PixelEncoder(), objective, torch.optim.SGD(fresh.parameters(), lr=0.5)).step(small_batch())
    torch.testing.assert_close(fresh.answer[0].detach(), step, rtol=1e-4, atol=1e-6)


def test_forgetting_is_measured_of_an_objective_of_the_callers_own() -> None:
    objective, unet = RectifiedFlow(), Constant()
    with torch.no_grad():
        unet.answer.fill_(1)
    prompts, empty = ({"encoder_hidden_states": torch.full((2, 5, 32), value)} for value in (1.0, 0.0))
    noise = seeding.normal(torch.arange(2), "probe", (4, 8, 8))
    probe = record_probe(unet, objective, prompts, empty, noise, states=2)
    assert probe.t == (1000, 500)
    torch.testing.assert_close(probe.x_t[1], noise - 0.5)
    with torch.no_grad():
        unet.answer.fill_(1.5)
    assert probe_drift(unet, probe) == pytest.approx(0.25)


class SourcePicture:
    """Brooks et al. 2023, "InstructPix2Pix", section 3.2: the latents of the picture that is edited, unscaled."""

    companion, pipeline_example = "source", {"image": "photo.png"}

    def variants(self, key: int | None, *, has_companion: bool) -> tuple[int]:
        return (0,)

    def pixels(self, companion: Tensor | None, size: tuple[int, int], key: int | None) -> Tensor:
        return torch.full((3, *size), 127, dtype=torch.uint8) if companion is None else companion

    def cache_name(self, companion: str | None, key: int) -> str:
        return f"source {companion}"

    def encode(self, encoder: Encoder, pixels: Tensor, condition: Tensor) -> dict[str, Tensor]:
        mean, _ = encoder.encode(condition / 127.5 - 1).cpu().chunk(2, dim=1)
        return {"mean": mean}

    def channels(self, encoder: Encoder, latent_params: Mapping[str, Tensor], keys: Tensor) -> Tensor:
        return latent_params["mean"]

    def empty(self, encoder: Encoder, keys: Tensor, side: int) -> Tensor:
        return torch.zeros(len(keys), 4, side // 8, side // 8)

    def preview(self, pixels: Tensor, condition: Tensor) -> Tensor:
        return torch.cat([condition, pixels], dim=2)

    def pipeline_arguments(self, images: ConditionImages | None, *, width: int, height: int) -> dict[str, Any]:
        return {"image": images.condition if images else Image.new("RGB", (width, height), "grey")}

    def summary(self, companions: int, *, live: bool) -> str:
        return f"{companions} source images"


def edit_model() -> ft.DiffusionModel:
    """The embedded model with a UNet that takes four channels more, whose weights are zero at first."""
    model = ft.load_model("tiny")
    old = model.unet.conv_in
    model.unet.conv_in = nn.Conv2d(8, old.out_channels, kernel_size=3, padding=1)
    with torch.no_grad():
        model.unet.conv_in.weight[:, 4:].zero_()
        model.unet.conv_in.weight[:, :4].copy_(old.weight)
        model.unet.conv_in.bias.copy_(old.bias)
    model.unet.register_to_config(in_channels=8)
    model.image_condition = SourcePicture()
    return model


@pytest.mark.parametrize("live", [False, True])
def test_an_image_condition_of_the_callers_own(live: bool) -> None:
    model, plain = edit_model(), ft.load_model("tiny")
    colours = [("red", "blue"), ("green", "yellow")]
    sources, targets = ([Image.new("RGB", (64, 64), pair[which]) for pair in colours] for which in (0, 1))
    rows = [(target, "other", str(i), {"source": sources[i]}) for i, target in enumerate(targets)]
    encoded = ft.encode(rows, model, live=live, cache_dir="none")
    (batch,) = ft.batches(encoded, batch_size=2, steps=1)
    order = [int(name) for name in batch.ids]
    for pictures, channels in ((targets, batch.latent_params[:, :4]), (sources, batch.unet_channels)):
        pixels = torch.stack([pil_to_tensor(pictures[index]) for index in order])
        torch.testing.assert_close(channels, plain.encoder.encode(pixels / 127.5 - 1)[:, :4], rtol=1e-4, atol=1e-5)
    trainer = ft.Trainer(
        model.unet.requires_grad_(True),
        model.encoder,
        ft.NoisePrediction(model.scheduler),
        torch.optim.SGD(model.unet.parameters(), lr=0.1),
    )
    trainer.step(batch)
    assert model.unet.conv_in.weight[:, 4:].abs().max() > 0
    preview = encoded.visits.preview_pixels(0, 0)
    assert preview[:, 0, 0].tolist() == [255, 0, 0]
    assert preview[:, 0, -1].tolist() == [0, 0, 255]


def test_a_pipeline_is_given_the_image_condition_of_the_callers_own() -> None:
    model = edit_model()
    parts = dict(model.pipeline().components) | {"unet": model.unet, "image_encoder": None}
    model.make_pipeline = lambda unet: StableDiffusionInstructPix2PixPipeline(**parts, requires_safety_checker=False)
    with torch.no_grad():
        model.unet.conv_in.weight[:, 4:].fill_(0.5)
    drawn = [
        ft.draw_pictures(
            model, ["a"], [0], resolution=64, num_inference_steps=2, condition=ConditionImages(picture, picture)
        )[0][0].tobytes()
        for picture in (Image.new("RGB", (64, 64), colour) for colour in ("red", "blue"))
    ]
    assert drawn[0] != drawn[1]
