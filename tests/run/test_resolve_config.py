from pathlib import Path
from typing import Any

import pytest
import torch

from finetune.config import TrainConfig
from finetune.data.buckets import Buckets
from finetune.errors import UsageError
from finetune.evaluators.evaluator import eval_interval
from finetune.evaluators.sample_grids import MOST_GRIDS, SAMPLING_SHARE, default_prompts, plan_samples
from finetune.evaluators.sample_prompts import SamplePrompt
from finetune.models.families import FAMILIES, pictures_seen
from finetune.models.model_info import ModelInfo
from finetune.run.resolve_config import resolve


def location(family: str, resolution: int) -> ModelInfo:
    return ModelInfo(family, FAMILIES[family], folder=Path("somewhere"), resolution=resolution, multiple=8)


CPU = torch.device("cpu")
SD15, DDPM = location("sd15", 512), ModelInfo("ddpm", FAMILIES["ddpm"], folder=None, resolution=64, multiple=8)


@pytest.mark.parametrize(
    ("pictures", "seen"), [(5, 1500), (12, 1500), (20, 2000), (49, 4900), (50, 4950), (100, 7000), (10_000, 70_000)]
)
def test_pictures_seen(pictures: int, seen: int) -> None:
    assert pictures_seen(pictures) == seen


def test_twelve_photos_on_sd15() -> None:
    config = resolve(TrainConfig(model="sd15"), SD15, pictures=12, varied_captions=True, device=CPU)
    expected = {
        "method": "lora", "resolution": 512, "rank": 16, "lora_alpha": 16.0, "learning_rate": 1e-4,
        "train_batch_size": 4, "max_train_steps": 375, "lr_warmup_steps": 18, "lr_scheduler": "constant",
        "adam_beta1": 0.9, "adam_beta2": 0.999, "adam_weight_decay": 0.01, "max_grad_norm": 1.0, "random_flip": False,
        "noise_offset": 0.0, "snr_gamma": None, "caption_dropout": 0.05, "use_ema": False,
    }  # fmt: skip
    assert {name: getattr(config, name) for name in expected} == expected


def test_full_fine_tuning_is_gentler_and_gentlest_on_few_pictures() -> None:
    few = resolve(TrainConfig(model="sd15", method="full"), SD15, pictures=50, varied_captions=False, device=CPU)
    many = resolve(TrainConfig(model="sd15", method="full"), SD15, pictures=51, varied_captions=False, device=CPU)
    assert (few.learning_rate, many.learning_rate) == (2e-6, 1e-5)
    assert few.caption_dropout == 0.0


def test_ddpm_takes_the_tutorials_numbers_at_128_and_ema_below() -> None:
    large = resolve(TrainConfig(model="ddpm", resolution=128), DDPM, pictures=1000, varied_captions=False, device=CPU)
    assert (large.num_train_epochs, large.train_batch_size, large.learning_rate) == (50, 16, 1e-4)
    assert (large.lr_scheduler, large.lr_warmup_steps, large.use_ema) == ("cosine", 500, False)
    assert large.max_train_steps == 50 * 1000 // 16
    small = resolve(TrainConfig(model="ddpm"), DDPM, pictures=48, varied_captions=False, device=CPU)
    assert (small.adam_beta1, small.use_ema) == (0.95, True)
    assert (small.num_train_epochs, small.max_train_steps, small.learning_rate) == (334, 1002, 4e-4)
    longer = resolve(TrainConfig(model="ddpm"), location("ddpm", 64), pictures=48, varied_captions=False, device=CPU)
    assert (longer.max_train_steps, longer.learning_rate) == (300, 1e-4)
    many = resolve(TrainConfig(model="ddpm"), DDPM, pictures=1000, varied_captions=False, device=CPU)
    assert many.num_train_epochs == 100
    few = resolve(TrainConfig(model="ddpm", resolution=128), DDPM, pictures=48, varied_captions=False, device=CPU)
    assert few.max_train_steps == 3126  # the tutorial's 3125, in whole epochs


def test_every_picture_count_sees_what_the_formula_promises() -> None:
    for pictures in (1, 2, 3, 5, 9, 12, 50):
        config = resolve(TrainConfig(model="sd15"), SD15, pictures=pictures, varied_captions=False, device=CPU)
        seen = config.max_train_steps * 4
        assert pictures_seen(pictures) <= seen < pictures_seen(pictures) + 4


def test_a_short_large_ddpm_run_does_not_warm_up_for_ever() -> None:
    short = resolve(
        TrainConfig(model="ddpm", resolution=128, num_epochs=50), DDPM, pictures=48, varied_captions=False, device=CPU
    )
    assert (short.max_train_steps, short.lr_warmup_steps) == (150, 25)
    shares = TrainConfig(lr_warmup_steps=0.1, lr_decay_steps=0.25, lr_scheduler="wsd", max_train_steps=200)
    resolved = resolve(shares, SD15, pictures=9, varied_captions=False, device=CPU)
    assert (resolved.lr_warmup_steps, resolved.lr_decay_steps) == (20, 50)
    with pytest.raises(UsageError, match=r"lr_warmup_steps = 1.5: expected a whole number, or below 1"):
        TrainConfig(lr_warmup_steps=1.5)
    with pytest.raises(UsageError, match="lr_warmup_steps = 10: the whole run has only 5 steps"):
        resolve(TrainConfig(lr_warmup_steps=10, max_train_steps=5), SD15, pictures=9, varied_captions=False, device=CPU)


def test_what_the_user_gives_wins_and_steps_count_accumulation() -> None:
    given = TrainConfig(model="sd15", num_train_epochs=3, train_batch_size=2, gradient_accumulation_steps=3, rank=8)
    config = resolve(given, SD15, pictures=20, varied_captions=False, device=CPU)
    assert config.max_train_steps == 10  # 3 x 20 pictures, 6 a step
    assert config.lora_alpha == 8.0
    assert (
        resolve(TrainConfig(max_train_steps=7), SD15, pictures=20, varied_captions=False, device=CPU).max_train_steps
        == 7
    )


@pytest.mark.parametrize(
    ("options", "found", "message"),
    [
        ({"prompt": "a dog"}, DDPM, "prompt cannot be used with ddpm: a pixel-space model takes no text"),
        ({"trigger": "sks"}, DDPM, "trigger cannot be used"),
        ({"caption_dropout": 0.1}, DDPM, "caption_dropout cannot be used"),
        ({"method": "lora"}, DDPM, "choose full"),
        ({"method": "full", "lora_alpha": 4.0}, SD15, "lora_alpha cannot be used with method full"),
        ({"method": "full", "rank": 4}, SD15, "rank cannot be used with method full"),
        ({"optimizer": "sgd", "adam_beta1": 0.5}, SD15, "adam_beta1 .* needs an optimizer of the Adam family"),
        ({"use_ema": False, "ema_power": 0.5}, SD15, "ema_power cannot be used here: it needs use_ema"),
        ({"tokenizer": "x"}, SD15, "tokenizer cannot be used here: it needs a checkpoint in one file"),
        ({"hub_model_id": "x"}, SD15, "hub_model_id cannot be used here: it needs push_to_hub"),
        ({"guidance_scale": 2.0}, DDPM, "guidance_scale cannot be used here: it needs a model that takes text"),
    ],
)
def test_an_option_that_cannot_be_used_is_an_error(options: dict, found: ModelInfo, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        resolve(TrainConfig(**options), found, pictures=5, varied_captions=False, device=CPU)


def planned(**options: object):
    config = resolve(TrainConfig(**options), SD15, pictures=12, varied_captions=False, device=CPU)
    return plan_samples(config, latent=True, captions=["a dog"] * 12, visits=12)


def test_unasked_grids_stay_within_their_share_of_the_run() -> None:
    long, usual, short = planned(max_train_steps=20_000), planned(), planned(max_train_steps=10)
    assert (len(long.prompts), long.pictures) == (3, 2)
    assert 0 < usual.share <= SAMPLING_SHARE
    assert 0 < long.share <= SAMPLING_SHARE
    assert (len(short.prompts), short.pictures) == (1, 1)  # always something to look at


def test_as_many_grids_are_drawn_between_as_the_measured_times_allow() -> None:
    grids = {"share": SAMPLING_SHARE, "most": MOST_GRIDS}
    assert eval_interval(10.0, 1.0, 500, **grids) is None  # 25 s for grids: the first and the last
    assert eval_interval(10.0, 1.0, 600, **grids) == 300  # one more between them
    assert eval_interval(1.0, 1.0, 1000, **grids) == 112  # never more than 10
    for total in (100, 799, 5000):
        every = eval_interval(3.0, 0.5, total, **grids)
        drawn = 2 + ((total - 1) // every if every else 0)
        assert drawn == 2 or drawn * 3.0 <= SAMPLING_SHARE * total * 0.5


def test_grids_that_are_asked_for_are_drawn_whatever_they_cost() -> None:
    asked = planned(max_train_steps=10, sample_every=5)
    assert (len(asked.prompts), asked.pictures, asked.every) == (3, 2, 5)
    assert asked.share > 1
    assert planned(save_image_epochs=2).every == 6  # three steps an epoch
    assert planned(sample_prompts=["x"], max_train_steps=10).prompts == (SamplePrompt("x"),)


def test_zero_turns_grids_off() -> None:
    assert planned(sample_every=0).prompts == ()
    assert planned(num_inference_steps=0, sample_prompts=["x"]).prompts == ()


def test_default_prompts_show_the_subject_elsewhere_and_the_class_without_the_trigger() -> None:
    with_trigger = default_prompts(TrainConfig(trigger="sks"), ["sks a photo of a dog"])
    assert with_trigger == ("sks a photo of a dog", "sks a photo of a dog in the snow", "a photo of a dog")
    placed = default_prompts(TrainConfig(trigger="sks", prompt="a photo of [trigger] dog"), ["a photo of sks dog"])
    assert placed == ("a photo of sks dog", "a photo of sks dog in the snow", "a photo of dog")
    assert default_prompts(TrainConfig(prompt="a butterfly"), ["a butterfly"])[1:] == (
        "a butterfly in the snow",
        "a picture",
    )


def test_bf16_alone_decides_what_follows_from_it() -> None:
    given = {"model": "sd15", "method": "full", "full_bf16": True}
    few = {"pictures": 50, "varied_captions": False, "device": CPU}
    config = resolve(TrainConfig(**given), SD15, **few)
    assert (config.mixed_precision, config.use_ema) == ("bf16", False)
    pixels = resolve(TrainConfig(model="ddpm", full_bf16=True), DDPM, **few)
    assert pixels.use_ema is False  # its default is to have one
    with pytest.raises(UsageError, match="full_bf16 with mixed_precision = no: choose bf16 or auto"):
        resolve(TrainConfig(**given, mixed_precision="no"), SD15, **few)
    for more in ({"optimizer": "prodigy"}, {"use_ema": True}, {"method": "lora"}):
        with pytest.raises(
            UsageError, match="full_bf16 cannot be used here: it needs method full, no use_ema, and optimizer"
        ):
            resolve(TrainConfig(**(given | more)), SD15, **few)


def test_updates_in_the_backward_pass_take_steps_of_one_pass() -> None:
    given = {"model": "sdxl", "method": "full", "full_bf16": True, "fused_backward_pass": True}
    few: dict[str, Any] = {"pictures": 50, "varied_captions": False, "device": CPU}
    squares = resolve(TrainConfig(**given), SD15, **few)
    assert (squares.max_grad_norm, squares.gradient_accumulation_steps, squares.train_batch_size) == (0, 1, 4)
    buckets = Buckets(512, 256, 1024, 64)
    assert resolve(TrainConfig(**given), SD15, buckets=buckets, **few).train_batch_size == 1
    for name, value in {"gradient_accumulation_steps": 2, "max_grad_norm": 1.0, "max_bad_steps": 3}.items():
        with pytest.raises(UsageError, match=f"fused_backward_pass with {name} = {value}: expected "):
            resolve(TrainConfig(**given, **{name: value}), SD15, **few)
    with pytest.raises(UsageError, match="train_batch_size = 2: expected 1, or --no-aspect_ratio_bucketing"):
        resolve(TrainConfig(**given, train_batch_size=2), SD15, buckets=buckets, **few)
    with pytest.raises(UsageError, match="fused_backward_pass with num_processes = 2: expected 1"):
        resolve(TrainConfig(**given), SD15, processes=2, **few)
    with pytest.raises(UsageError, match="fused_backward_pass cannot be used here: it needs full_bf16"):
        resolve(TrainConfig(method="full", fused_backward_pass=True), SD15, **few)
    assert resolve(TrainConfig(method="full"), SD15, **few).max_grad_norm == 1
