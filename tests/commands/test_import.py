"""finetune-unet import: settings of other tools, as people have them, become a config; nothing is lost."""

import json
from pathlib import Path
from typing import Any

import pytest

from finetune.cli import main
from finetune.commands.foreign.onetrainer import take
from finetune.config import as_dict, load_config
from finetune.options import ATTENTION_AND_FEED_FORWARD


def imported(tmp_path: Path, name: str, text: str) -> dict[str, Any]:
    """The options that the written config gives."""
    (tmp_path / name).write_text(text)
    assert main(["import", "--file", str(tmp_path / name), "--to", str(tmp_path / "config.toml")]) == 0
    config = load_config(tmp_path / "config.toml")
    return {name: value for name, value in as_dict(config).items() if name in config.given}


SD_SCRIPTS = """\
accelerate launch --num_cpu_threads_per_process 1 train_network.py \\
    --pretrained_model_name_or_path="models/v1-5.safetensors" --train_data_dir=./images --resolution=512,512 \\
    --output_dir=out --output_name dog --network_module=networks.lora --network_dim=32 --unet_lr=1e-4 \\
    --learning_rate 5e-5 --text_encoder_lr=5e-6 --max_train_epochs=10 --train_batch_size=2 --optimizer_type=AdamW8bit \\
    --optimizer_args weight_decay=0.1 betas=0.9,0.99 --mixed_precision fp16 --xformers --cache_latents \\
    --enable_bucket --min_snr_gamma=5 --lr_scheduler=cosine_with_restarts --clip_skip=2 --random_crop --flip_aug \\
    --sample_prompts prompts.txt --max_token_length=75 --resume out/state
"""


def test_a_command_line_of_sd_scripts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = imported(tmp_path, "train.sh", SD_SCRIPTS)
    assert found == {
        "model": "models/v1-5.safetensors", "data": ("./images",), "resolution": 512, "output_dir": "out/dog",
        "method": "lora", "rank": 32, "lora_alpha": 1.0, "learning_rate": 1e-4, "num_train_epochs": 10,
        "train_batch_size": 2, "optimizer": "adamw8bit", "adam_weight_decay": 0.1, "adam_beta1": 0.9,
        "adam_beta2": 0.99,
        "mixed_precision": "fp16", "snr_gamma": 5.0, "lr_scheduler": "cosine_with_restarts", "lr_warmup_steps": 0,
        "lora_type": "lora", "clip_skip": 2,
        "center_crop": False, "random_flip": True, "sample_prompts": ("prompts.txt",), "max_token_length": 77,
        "caption_dropout": 0.0, "lora_target_modules": (*ATTENTION_AND_FEED_FORWARD, "proj_in", "proj_out"),
        "aspect_ratio_bucketing": True, "min_bucket_reso": 256, "max_bucket_reso": 1024, "bucket_reso_steps": 64,
        "bucket_upscale": True, "shuffle_caption": False, "caption_lines": "first",
        "gradient_accumulation_steps": 1, "validation_fraction": 0.0,
    }  # fmt: skip
    told = capsys.readouterr().out
    for line in (
        "note: alpha is 1 where sd-scripts is told none",
        "note: sd-scripts trained the text encoder too",
        "without effect here: ",
        "text_encoder_lr",
        "xformers",
        "left: resume = 'out/state': a state of sd-scripts cannot be gone on from",
        "1 left out",
        "to train: finetune-unet --config",
    ):
        assert line in told
    assert "# not taken over: resume = " in (tmp_path / "config.toml").read_text()


def test_a_toml_file_of_sd_scripts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = """
    [model_arguments]
    pretrained_model_name_or_path = "sdxl.safetensors"
    v_parameterization = true
    [network_arguments]
    network_module = "lycoris.kohya"
    network_args = ["algo=loha", "conv_dim=8", "preset=full"]
    network_dim = 8
    network_alpha = 4
    network_train_unet_only = true
    [training_arguments]
    max_train_steps = 500
    lr_warmup_steps = 0.1
    resolution = "1024,768"
    optimizer_type = "Lion"
    """
    found = imported(tmp_path, "lora.toml", text)
    expected = {
        "model": "sdxl.safetensors", "prediction_type": "v_prediction", "lora_type": "loha", "rank": 8,
        "lora_alpha": 4.0, "max_train_steps": 500, "lr_warmup_steps": 0.1, "train_batch_size": 1, "learning_rate": 2e-6,
    }  # fmt: skip
    assert {name: found.get(name) for name in expected} == expected
    assert "conv1" in found["lora_target_modules"]
    assert "resolution" not in found
    told = capsys.readouterr().out
    assert "left: resolution = '1024,768': one number of pixels is taken" in told
    assert (found["conv_rank"], found["conv_alpha"], found["optimizer"]) == (8, 4.0, "lion")
    assert "text encoder too" not in told


def test_bf16_alone_is_for_full_fine_tuning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = "--train_data_dir=dog --full_bf16 --mixed_precision bf16 --optimizer_type Adafactor"
    found = imported(tmp_path, "full.sh", f"accelerate launch sdxl_train.py {words}")
    assert (found["method"], found["full_bf16"], found["optimizer"]) == ("full", True, "adafactor")
    (tmp_path / "config.toml").unlink()
    assert "full_bf16" not in imported(tmp_path, "lora.sh", f"accelerate launch train_network.py {words}")
    assert "left: full_bf16 = True: a LoRA keeps its few weights in fp32 here" in capsys.readouterr().out
    (tmp_path / "config.toml").unlink()
    imported(tmp_path, "fused.sh", f"accelerate launch sdxl_train.py {words} --fused_backward_pass")
    assert "left: fused_backward_pass = True: here with --full_bf16, without clipping" in capsys.readouterr().out


def test_class_pictures(tmp_path: Path) -> None:
    words = "train_network.py --prior_loss_weight=0.5 --train_data_dir=dog --reg_data_dir=dogs --network_dim=4"
    found = imported(tmp_path, "kohya.sh", f"accelerate launch {words}")
    assert (found["class_data"], found["prior_loss_weight"]) == ("dogs", 0.5)
    words = "train_network.py --train_data_dir=dog --prior_loss_weight=1.0 --network_dim=4"
    (tmp_path / "config.toml").unlink()
    assert "prior_loss_weight" not in imported(tmp_path, "without.sh", f"accelerate launch {words}")
    words = "train_dreambooth_lora.py --instance_data_dir=dog --instance_prompt=sks --class_data_dir=dogs "
    words += "--class_prompt=dogs --num_class_images=50"
    (tmp_path / "config.toml").unlink()
    assert "class_data" not in imported(tmp_path, "off.sh", f"accelerate launch {words}")
    (tmp_path / "config.toml").unlink()
    found = imported(tmp_path, "on.sh", f"accelerate launch {words} --with_prior_preservation --use_8bit_adam")
    assert (found["class_data"], found["class_prompt"], found["num_class_images"]) == ("dogs", "dogs", 50)
    assert found["optimizer"] == "adamw8bit"


def test_class_pictures_in_a_dataset_file(tmp_path: Path) -> None:
    found = imported(
        tmp_path,
        "dataset.toml",
        """
    [[datasets]]
      [[datasets.subsets]]
      image_dir = "dog"
      class_tokens = "sks dog"
      num_repeats = 10
      [[datasets.subsets]]
      is_reg = true
      image_dir = "dogs"
      class_tokens = "dog"
    """,
    )
    assert (found["data"], found["repeats"], found["prompt"]) == (("dog",), (10,), "sks dog")
    assert (found["class_data"], found["class_prompt"]) == ("dogs", "dog")


def test_a_dataset_file_of_sd_scripts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = """
    [general]
    caption_extension = ".txt"
    shuffle_caption = true
    keep_tokens = 1
    [[datasets]]
    resolution = 768
    batch_size = 2
      [[datasets.subsets]]
      image_dir = "./a"
      num_repeats = 10
      [[datasets.subsets]]
      image_dir = "./b"
    """
    found = imported(tmp_path, "data.toml", text)
    assert found == {
        "data": ("./a", "./b"), "repeats": (10, 1), "resolution": 768, "train_batch_size": 2,
        "aspect_ratio_bucketing": False, "shuffle_caption": True, "keep_tokens": 1, "caption_lines": "first",
    }  # fmt: skip
    told = capsys.readouterr().out
    assert "0 left out" in told


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        (
            "train_text_to_image_lora.py --pretrained_model_name_or_path=$MODEL --dataset_name=me/pokemon --rank=8 "
            "--validation_prompt 'a dragon' --num_validation_images 4 --max_train_steps=1000 --report_to=wandb",
            {"data": ("me/pokemon",), "rank": 8, "method": "lora", "sample_prompts": ("a dragon",),
             "eval_batch_size": 4, "max_train_steps": 1000, "train_batch_size": 16, "report_to": ("wandb",),
             "num_train_epochs": None},
        ),
        (
            "train_dreambooth.py --instance_data_dir=./dog --instance_prompt 'a sks dog' --learning_rate=2e-6",
            {"data": ("./dog",), "prompt": "a sks dog", "method": "full", "learning_rate": 2e-6, "num_train_epochs": 1},
        ),
        (
            "train_unconditional.py --train_data_dir ./b --resolution 128 --ddpm_num_inference_steps 100",
            {"model": "ddpm", "resolution": 128, "num_inference_steps": 100, "method": None, "adam_beta1": 0.95},
        ),
        ("train_dreambooth_lora_sdxl.py --use_dora", {"lora_type": "dora", "resolution": None, "learning_rate": 1e-4,
         "adam_weight_decay": 1e-4, "caption_source": "prompt"}),
    ],
)  # fmt: skip
def test_command_lines_of_diffusers_scripts(script: str, expected: dict[str, Any], tmp_path: Path) -> None:
    found = imported(tmp_path, "run.sh", f"export MODEL=x\naccelerate launch --mixed_precision=fp16 {script}\n")
    assert {name: found.get(name) for name in expected} == expected


def test_a_preset_of_onetrainer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    preset = {
        "base_model_name": "me/sd15", "training_method": "LORA", "model_type": "STABLE_DIFFUSION_15", "batch_size": 4,
        "learning_rate": 3e-4, "resolution": "512", "optimizer": {"optimizer": "PRODIGY", "d_coef": 2.0, "beta2": 0.99},
        "loss_weight_fn": "MIN_SNR_GAMMA", "ema": "GPU", "train_dtype": "BFLOAT_16", "layer_filter_preset": "attn-mlp",
        "text_encoder": {"train": True},
        "concepts": [{"path": "./a"}, {"path": "./b"}, {"path": "./c", "enabled": False}, *[
            {"path": f"./{kind.lower()}{more}", "type": kind}
            for kind in ("PRIOR_PREDICTION", "VALIDATION") for more in ("", "-2")
        ]],
        "masked_training": False,
    }  # fmt: skip
    found = imported(tmp_path, "preset.json", json.dumps(preset))
    assert found == {
        "model": "me/sd15", "method": "lora", "rank": 16, "lora_alpha": 1.0, "train_batch_size": 4,
        "learning_rate": 3e-4, "resolution": 512, "optimizer": "prodigy", "adam_beta2": 0.99, "snr_gamma": 5.0,
        "optimizer_args": ("d_coef=2.0",),
        "use_ema": True, "mixed_precision": "bf16", "data": ("./a", "./b"), "num_train_epochs": 100,
        "lr_warmup_steps": 200, "lr_scheduler": "constant", "aspect_ratio_bucketing": True, "bucket_upscale": True,
        "class_data": "./prior_prediction", "prior_prediction": True, "validation_data": "./validation",
        "masked_loss": False, "gradient_accumulation_steps": 1,
        "lora_target_modules": (*ATTENTION_AND_FEED_FORWARD, "proj_in", "proj_out"),
    }  # fmt: skip
    told = capsys.readouterr().out
    assert "left: concepts.path = './validation-2': one folder is taken for validation_data" in told
    assert "note: alpha is 1 (OneTrainer's default is 1" in told


@pytest.mark.parametrize(("kind", "heeded"), [("STABLE_DIFFUSION_15", False), ("STABLE_DIFFUSION_15_INPAINTING", True)])
def test_masks_are_where_an_inpainting_model_of_onetrainer_paints(kind: str, heeded: bool) -> None:
    without, taken = (take({"model_type": kind, "masked_training": masked}) for masked in (False, True))
    assert without.ours.get("masked_loss") is (None if heeded else False)
    assert ("masked_training" in str(taken.skipped)) == heeded
    assert "model_type" not in str(taken.skipped)


def test_a_whole_config_of_onetrainer_for_a_full_fine_tune_can_be_trained_with(
    tmp_path: Path, pictures: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A whole config says everything, also what does not matter for it."""
    whole = {
        "base_model_name": "tiny", "training_method": "FINE_TUNE", "model_type": "STABLE_DIFFUSION_15",
        "lora_rank": 16, "lora_alpha": 1.0, "lora_decompose": False, "peft_type": "LORA", "dropout_probability": 0.0,
        "learning_rate_warmup_steps": 0.0, "offset_noise_weight": 0.0, "perturbation_noise_weight": 0.1, "epochs": 1,
        "resolution": "64", "train_dtype": "FLOAT_32", "concepts": [{"path": str(pictures)}],
        "workspace_dir": str(tmp_path / "run"),
        "vae": {"model_name": "", "weight_dtype": "FLOAT_32"}, "unet": {"train": True, "learning_rate": None},
    }  # fmt: skip
    found = imported(tmp_path, "whole.json", json.dumps(whole))
    assert found["lr_warmup_steps"] == 0
    assert "rank" not in found
    told = capsys.readouterr().out
    assert "left: lora_rank = 16: a full fine-tune has no LoRA" in told
    assert "left: perturbation_noise_weight = 0.1: there is no such option here" in told
    assert main(["--config", str(tmp_path / "config.toml"), "--num_inference_steps", "0"]) == 0


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("nope", None, "No such file"),
        ("x.json", "{}", "no config of OneTrainer"),
        ("x.json", "{", "is not valid JSON"),
        ("x.toml", "= 1", "is not valid TOML"),
        ("x.sh", "echo hello", "no command line of a Python script"),
        ("x.sh", "python flux_train.py --x", "flux_train.py cannot be imported; expected one of train_network.py"),
        ("x.sh", "python train_network.py --x 'a", "No closing quotation"),
    ],
)
def test_what_is_no_settings_is_told(
    name: str, text: str | None, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if text is not None:
        (tmp_path / name).write_text(text)
    assert main(["import", "--file", str(tmp_path / name), "--to", str(tmp_path / "config.toml")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "config.toml").exists()


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        (
            {"timestep_distribution": "LOGIT_NORMAL", "noising_weight": 0.5, "noising_bias": -0.2},
            {"timestep_sampling": "logit_normal", "logit_mean": -0.2, "logit_std": 1.5},
        ),
        (
            {"timestep_distribution": "BETA", "noising_weight": 0.8, "noising_bias": 1.0},
            {"timestep_sampling": "beta", "beta_alpha": 0.8, "beta_beta": 1.0},
        ),
        ({"timestep_distribution": "UNIFORM", "noising_weight": 0.8}, {"timestep_sampling": None}),
        ({"min_noising_strength": 0.1, "max_noising_strength": 0.9}, {"min_timestep": 100, "max_timestep": 900}),
        ({"max_noising_strength": 1.0, "min_noising_strength": 0.0}, {"min_timestep": None, "max_timestep": None}),
        ({"loss_weight_fn": "DEBIASED_ESTIMATION"}, {"debiased_estimation": True}),
        ({"mse_strength": 0.0, "mae_strength": 1.0}, {"loss_type": "l1"}),
        (
            {"rescale_noise_scheduler_to_zero_terminal_snr": True},
            {"zero_terminal_snr": True, "prediction_type": "v_prediction"},
        ),
    ],
)
def test_the_objective_of_onetrainer(theirs: dict[str, Any], ours: dict[str, Any]) -> None:
    taken = take({"training_method": "LORA", **theirs})
    assert {name: taken.ours.get(name) for name in ours} == ours
    assert taken.skipped == {}


def test_a_sum_of_losses_and_an_unknown_distribution_are_listed() -> None:
    taken = take({"mse_strength": 0.5, "mae_strength": 0.5, "timestep_distribution": "HEAVY_TAIL"})
    assert sorted(name.partition(" ")[0] for name in taken.skipped) == [
        "mae_strength",
        "mse_strength",
        "timestep_distribution",
    ]


def test_concepts_of_onetrainer_keep_what_they_have_otherwise() -> None:
    text = {"enable_tag_shuffling": True, "keep_tags_count": 2}
    concepts = [
        {"path": "a", "text": text, "image": {"enable_random_flip": True, "enable_random_hue": True}},
        {"path": "b", "text": text, "loss_weight": 0.5,
         "image": {"enable_resolution_override": True, "resolution_override": "768"}},
    ]  # fmt: skip
    taken = take({"training_method": "LORA", "concepts": concepts})
    assert (taken.ours["shuffle_caption"], taken.ours["keep_tokens"]) == (True, 2)
    assert taken.ours["source_settings"] == ("random_flip = true", "loss_weight = 0.5, resolution = 768")
    assert list(taken.skipped) == ["a.enable_random_hue = True"]
