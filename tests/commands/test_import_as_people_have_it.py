"""Files of other tools as they lie about: variables, quotes of Windows, zeros that mean off, and nested tables."""

import json
from pathlib import Path
from typing import Any

import pytest

from finetune.cli import main
from finetune.options import ATTENTION_AND_FEED_FORWARD
from finetune.source_options import parse_settings
from tests.commands.test_import import imported

LORA = "train_network.py --network_module=networks.lora --network_dim=8 --train_data_dir=img"
"""A command of sd-scripts, to be gone on with."""


def test_variables_that_the_file_sets_are_put_in_and_others_are_listed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = f"export MODEL=/m/xl.safetensors\nOUT=out\naccelerate launch {LORA} --vae=$VAE"
    text += " --pretrained_model_name_or_path=$MODEL --output_dir=${OUT} --output_name=dog"
    found = imported(tmp_path, "train.sh", text)
    assert (found["model"], found["output_dir"]) == ("/m/xl.safetensors", "out/dog")
    assert "vae" not in found
    assert "left: vae = '$VAE': a variable that the file does not set" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.bat", 'set M=C:\\m\\a.safetensors\naccelerate launch "{}" ^\n --vae="D:\\v\\" {}=%M%'),
        ("a.ps1", '$m = "C:\\m\\a.safetensors"\naccelerate launch "{}" `\n --vae="D:\\v\\" {}=$m'),
        ("a.txt", "accelerate launch {} ^\n --vae=D:\\v\\ {}=C:\\m\\a.safetensors"),
    ],
)
def test_backslashes_of_windows_stay(name: str, text: str, tmp_path: Path) -> None:
    script, _, rest = LORA.partition(" ")
    found = imported(tmp_path, name, text.format(f"C:\\sd\\{script}", "--pretrained_model_name_or_path") + f" {rest}")
    assert (found["model"], found["vae"], found["rank"]) == ("C:\\m\\a.safetensors", "D:\\v\\", 8)


def test_a_notebook(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cells = [
        {"cell_type": "markdown", "source": ["# train.py"]},
        {"cell_type": "code", "source": ["model = 'm.safetensors' # @param\n", "rank = 4\n"]},
        {"cell_type": "code", "source": [f"!accelerate launch {LORA} \\\n", " --vae={vae} --max_train_steps=9 \\\n",
                                         " --pretrained_model_name_or_path={model}\n"]},
    ]  # fmt: skip
    found = imported(tmp_path, "train.ipynb", json.dumps({"cells": cells}))
    assert (found["model"], found["max_train_steps"]) == ("m.safetensors", 9)
    assert "left: vae = '{vae}'" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "expected", "told"),
    [
        ("--max_train_epochs=0 --save_every_n_epochs=0 --min_snr_gamma=0", {"num_train_epochs": None}, "0 left out"),
        ("--network_alpha=0", {"lora_alpha": 8.0}, "0 left out"),
        ("--seed=-1", {"seed": None}, "left: seed = -1"),
        ("--learning_rate=fast --seed=4", {"seed": 4, "learning_rate": 2e-6}, "left: learning_rate = 'fast'"),
        ("--output_name=001", {"output_dir": "001"}, "0 left out"),
        ("--output_dir=D:/my out --output_name=dog", {"output_dir": "D:/my out/dog"}, "0 left out"),
        ("--lr_scheduler=cosine_with_restarts --lr_scheduler_num_cycles=3 --lr_scheduler_power=1",
         {"lr_scheduler": "cosine_with_restarts", "lr_num_cycles": 3, "lr_power": None}, "0 left out"),
        ("--lr_scheduler=cosine_with_min_lr --lr_scheduler_min_lr_ratio=0.1 --learning_rate=1e-4",
         {"lr_scheduler": "cosine", "lr_end": 1e-5}, "0 left out"),
        ("--lr_scheduler=warmup_stable_decay --lr_decay_steps=0.25 --max_train_steps=400",
         {"lr_scheduler": "wsd", "lr_decay_steps": 0.25}, "0 left out"),
        ("--lr_scheduler=piecewise_constant", {"lr_scheduler": "constant"}, "left: lr_scheduler = 'piecewise_const"),
        ("--optimizer_type=Lion --optimizer_args betas=0.9,0.95 weight_decay=0.1",
         {"optimizer": "lion", "optimizer_args": ("betas=0.9,0.95",), "adam_weight_decay": 0.1}, "0 left out"),
        ("--optimizer_type=Prodigy --optimizer_args d_coef=2 decouple=True weight_decay=0.01 speed=1",
         {"optimizer": "prodigy", "optimizer_args": ("d_coef=2", "decouple=True"), "adam_weight_decay": 0.01},
         "left: optimizer_args.speed = 1: the optimizer has no such argument"),
        ("--optimizer_type=pytorch_optimizer.CAME", {"optimizer": "came"}, "0 left out"),
        ("--optimizer_type=torch.optim.NAdam", {"optimizer": "torch.optim:NAdam"}, "0 left out"),
        ("--optimizer_type=AdamWScheduleFree --lr_scheduler=cosine --lr_warmup_steps=10",
         {"optimizer": "schedulefree_adamw", "lr_scheduler": "constant", "lr_warmup_steps": 0}, "0 left out"),
        ("--network_args conv_dim=4 rank_dropout=0.1 module_dropout=0.2 --scale_weight_norms=1",
         {"conv_rank": 4, "conv_alpha": 1.0, "rank_dropout": 0.1, "module_dropout": 0.2, "scale_weight_norms": 1.0,
          "lora_target_modules": (*ATTENTION_AND_FEED_FORWARD, "proj_in", "proj_out")}, "0 left out"),
        ("--network_module=lycoris.kohya --network_alpha=2 --network_args preset=attn-mlp algo=locon conv_dim=4",
         {"lora_type": "lora", "conv_rank": None, "lora_target_modules": ATTENTION_AND_FEED_FORWARD}, "0 left out"),
        ("--network_module=lycoris.kohya --network_alpha=2 --network_args algo=locon conv_dim=4",
         {"lora_type": "lora", "conv_rank": 4, "conv_alpha": 2.0, "lora_alpha": 2.0}, "0 left out"),
        ("--use_8bit_adam --dataset_repeats=2", {"optimizer": "adamw8bit", "repeats": (2,)}, "0 left out"),
        ("--in_json=m.json", {}, "left: in_json = 'm.json': captions were in it"),
        ("--network_args algo=lokr dora_wd=True", {"lora_type": "lokr"}, "left: network_args.dora_wd = True: lokr is"),
        ("", {"gradient_accumulation_steps": 1, "validation_fraction": 0.0}, "0 left out"),
        ("--shuffle_caption --keep_tokens=2 --keep_tokens_separator=||| --secondary_separator=;;; "
         "--caption_prefix=best",
         {"keep_tokens": 2, "keep_tokens_separator": "|||", "secondary_separator": ";;;", "caption_prefix": "best",
          "caption_lines": "first"}, "0 left out"),
        ("--keep_tokens=2 --keep_tokens_separator=||| --enable_wildcard",
         {"keep_tokens": None, "keep_tokens_separator": None, "enable_wildcard": True, "caption_lines": "chosen"},
         "0 left out"),
        ("--caption_tag_dropout_rate=0.2 --keep_tokens=1", {"caption_tag_dropout": 0.2, "keep_tokens": 1}, "0 left"),
        ("--token_warmup_step=10 --token_warmup_min=2 --keep_tokens=1 --caption_dropout_every_n_epochs=3",
         {"token_warmup_step": 10, "token_warmup_min": 2, "keep_tokens": 1, "caption_dropout_every_n_epochs": 3},
         "0 left out"),
        ("--max_timestep=1000 --loss_type=l2 --caption_extension=.txt", {"huber_c": None}, "0 left out"),
        ("--huber_schedule=snr --huber_c=0.1 --multires_noise_discount=0.3", {"huber_c": None}, "0 left out"),
        ("--loss_type=smooth_l1 --huber_c=0.2", {"loss_type": "smooth_l1", "huber_c": 0.2}, "0 left out"),
        ("--v_parameterization --zero_terminal_snr --min_snr_gamma=1 --scale_v_pred_loss_like_noise_pred",
         {"prediction_type": "v_prediction", "zero_terminal_snr": True, "snr_gamma": 1.0,
          "scale_v_pred_loss_like_noise_pred": True}, "0 left out"),
        ("--zero_terminal_snr", {"zero_terminal_snr": None}, "left: zero_terminal_snr = True: at zero terminal SNR"),
        ("--scale_v_pred_loss_like_noise_pred", {"scale_v_pred_loss_like_noise_pred": None}, "0 left out"),
        ("--noise_offset=0.05 --noise_offset_random_strength --ip_noise_gamma=0.1 --ip_noise_gamma_random_strength",
         {"noise_offset_random_strength": True, "input_perturbation_random_strength": True}, "0 left out"),
        ("--noise_offset_random_strength --ip_noise_gamma_random_strength",
         {"noise_offset_random_strength": None, "input_perturbation_random_strength": None}, "0 left out"),
        ("--debiased_estimation_loss --multires_noise_iterations=6 --multires_noise_discount=0.1 --min_timestep=100",
         {"debiased_estimation": True, "multires_noise_iterations": 6, "multires_noise_discount": 0.1,
          "min_timestep": 100}, "0 left out"),
    ],
)  # fmt: skip
def test_one_value_never_ends_the_import(
    words: str, expected: dict[str, Any], told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = f"accelerate launch {LORA} --pretrained_model_name_or_path=m --network_train_unet_only {words}"
    found = imported(tmp_path, "train.sh", line)
    assert {name: found.get(name) for name in expected} == expected
    assert told in capsys.readouterr().out


@pytest.mark.parametrize(
    ("model", "asked", "taken"),
    [
        ("sd_xl_base_1.0.safetensors", 2, None),
        ("owner/my-SDXL", 2, None),
        ("anime.ckpt", 2, 2),
        ("anime.ckpt", 1, None),
    ],
)
def test_clip_skip_means_nothing_for_xl_and_1_nothing_at_all(
    tmp_path: Path, model: str, asked: int, taken: int | None
) -> None:
    text = f"pretrained_model_name_or_path = {json.dumps(model)}\nclip_skip = {asked}\nnetwork_dim = 8\n"
    assert imported(tmp_path, "gui.toml", text).get("clip_skip") == taken


def test_a_warm_up_that_is_a_share_of_epochs_stays_one(tmp_path: Path) -> None:
    text = "train_network.py --max_train_epochs=10 --lr_warmup_steps=0.1 --train_data_dir=C:\\train\\dog ^\n"
    found = imported(tmp_path, "train.bat", text)
    assert (found["lr_warmup_steps"], found["data"]) == (0.1, ("C:\\train\\dog",))


@pytest.mark.parametrize(
    "preset",
    [
        {"LoRA_type": "Standard", "lr_warmup": "some", "network_dim": 8, "pretrained_model_name_or_path": "a"},
        {"training_method": "LORA", "learning_rate_warmup_steps": "some", "lora_rank": 8},
    ],
)
def test_a_warm_up_that_is_no_number_ends_no_import(tmp_path: Path, preset: dict[str, object]) -> None:
    assert imported(tmp_path, "preset.json", json.dumps(preset))["rank"] == 8
    assert "warmup_steps = 'some'" in (tmp_path / "config.toml").read_text()


def test_tables_are_read_at_any_depth(tmp_path: Path) -> None:
    text = """
    [[subsets]]
    image_dir = "5_dog"
    num_repeats = 5
    [general_args.args]
    pretrained_model_name_or_path = "xl.safetensors"
    sdxl = true
    clip_skip = 2
    [general_args.dataset_args]
    batch_size = 2
    [network_args.args]
    network_dim = 16
    [optimizer_args.args]
    optimizer_type = "AdamW8bit"
    [optimizer_args.args.optimizer_args]
    weight_decay = "0.1"
    """
    found = imported(tmp_path, "lora.toml", text)
    expected = {
        "model": "xl.safetensors", "method": "lora", "rank": 16, "optimizer": "adamw8bit", "adam_weight_decay": 0.1,
        "train_batch_size": 2, "data": ("5_dog",), "repeats": (5,), "clip_skip": None,
    }  # fmt: skip
    assert {name: found.get(name) for name in expected} == expected


def test_a_preset_of_kohya_ss(tmp_path: Path) -> None:
    preset = {
        "LoRA_type": "Standard", "pretrained_model_name_or_path": "sd.safetensors", "train_data_dir": "img",
        "max_resolution": "768,768", "epoch": 50, "max_train_epochs": "", "lr_warmup": 0, "optimizer": "AdamW8bit",
        "network_dim": 32, "network_alpha": 0, "learning_rate": 3e-5, "unet_lr": 1e-4, "noise_offset": 0,
        "clip_skip": "1", "keep_tokens": "0", "sdxl": False, "min_snr_gamma": 0, "output_name": "007",
    }  # fmt: skip
    found = imported(tmp_path, "preset.json", json.dumps(preset))
    expected = {
        "model": "sd.safetensors", "resolution": 768, "num_train_epochs": 50, "optimizer": "adamw8bit", "rank": 32,
        "lora_alpha": 32.0, "learning_rate": 1e-4, "clip_skip": None, "output_dir": "007", "data": ("img",),
    }  # fmt: skip
    assert {name: found.get(name) for name in expected} == expected


def test_the_dataset_file_that_a_run_names_is_read(tmp_path: Path) -> None:
    (tmp_path / "data.toml").write_text('[[datasets]]\nbatch_size = 3\n[[datasets.subsets]]\nimage_dir = "dog"\n')
    found = imported(tmp_path, "train.sh", f"{LORA} --dataset_config=data.toml --train_batch_size=1")
    assert (found["data"], found["train_batch_size"]) == (("dog",), 3)
    (tmp_path / "config.toml").unlink()
    both = {"datasets": [{"batch_size": 2, "subsets": [{"image_dir": "cat"}]}]}
    found = imported(tmp_path, "data.json", json.dumps(both))
    assert (found["data"], found["train_batch_size"]) == (("cat",), 2)


def test_each_folder_keeps_its_prompt(tmp_path: Path) -> None:
    subsets = [{"image_dir": name, "class_tokens": f"sks {name}"} for name in ("girl", "boy")]
    found = imported(tmp_path, "data.json", json.dumps({"datasets": [{"subsets": subsets}]}))
    assert "prompt" not in found
    assert found["source_settings"] == ('prompt = "sks girl"', 'prompt = "sks boy"')
    (tmp_path / "config.toml").unlink()
    same = [{"image_dir": name, "class_tokens": "sks"} for name in ("girl", "boy")]
    assert imported(tmp_path, "same.json", json.dumps({"datasets": [{"subsets": same}]}))["prompt"] == "sks"


def test_scripts_of_diffusers_have_the_launchers_precision_and_their_own_layers(tmp_path: Path) -> None:
    line = "accelerate launch --mixed_precision=fp16 train_text_to_image_lora.py --dataset_name=a --lr_warmup_steps=9"
    found = imported(tmp_path, "run.sh", line)
    expected = {
        "mixed_precision": "fp16", "lora_target_modules": ("to_k", "to_q", "to_v", "to_out.0"), "center_crop": False,
        "lr_scheduler": "constant", "lr_warmup_steps": 0,
    }  # fmt: skip
    assert {name: found.get(name) for name in expected} == expected


def test_a_config_of_onetrainer_says_what_is_left_and_no_defaults(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    concept = {"path": "dog", "include_subdirectories": True, "loss_weight": 0.5,
               "image": {"enable_random_flip": True}, "text": {"enable_tag_shuffling": True, "keep_tags_count": 1,
                                                               "prompt_source": "filename"}}  # fmt: skip
    given = {
        "training_method": "LORA", "base_model_name": "xl", "model_type": "STABLE_DIFFUSION_XL_10_BASE",
        "learning_rate_warmup_steps": 0.1, "force_v_prediction": True, "concepts": [concept],
        "text_encoder": {"train": False, "dropout_probability": 0.05, "weight_dtype": "FLOAT_16"},
        "latent_caching": True, "tensorboard": True, "sample_after": 10, "unet_weight_dtype": "NONE",
        "weight_decay": 0.02, "optimizer": "ADAMW", "unet_learning_rate": 2e-4, "min_snr_gamma": 5.0,
    }  # fmt: skip
    found = imported(tmp_path, "config.json", json.dumps(given))
    expected = {
        "prediction_type": "v_prediction", "random_flip": True, "shuffle_caption": True, "keep_tokens": 1,
        "caption_source": "filename", "caption_dropout": 0.05, "adam_weight_decay": 0.02,
        "learning_rate": 2e-4, "snr_gamma": 5.0,
    }  # fmt: skip
    assert {name: found.get(name) for name in expected} == expected
    assert "conv1" in found["lora_target_modules"]
    told = capsys.readouterr().out
    left = {line.split(" = ")[0] for line in told.splitlines() if line.startswith("left")}
    assert not left
    assert "source_settings" not in found  # a weight that all images have changes nothing


@pytest.mark.parametrize("folders", [("dogs",), ("dogs", "people")])
def test_the_weight_of_class_images_in_a_dataset_file_is_kept(tmp_path: Path, folders: tuple[str, ...]) -> None:
    subsets = [{"image_dir": "dog"}, *({"image_dir": name, "is_reg": True} for name in folders)]
    (tmp_path / "data.json").write_text(json.dumps({"datasets": [{"subsets": subsets}]}))
    line = f"accelerate launch {LORA.replace(' --train_data_dir=img', '')} --prior_loss_weight=0.5"
    found = imported(tmp_path, "train.sh", f"{line} --dataset_config={tmp_path / 'data.json'}")
    if len(folders) == 1:
        assert (found["class_data"], found["prior_loss_weight"]) == ("dogs", 0.5)
    else:
        class_images = "class_images = true, loss_weight = 0.5"
        assert found["source_settings"] == ("", class_images, class_images)
        assert "prior_loss_weight" not in found


def test_fractions_of_repeats_and_tag_dropout_of_onetrainer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """0.5 and 2 repeats are 1 and 4 in half as many epochs."""
    text = {"tag_dropout_enable": True, "tag_dropout_mode": "RANDOM WEIGHTED", "tag_dropout_probability": 0.3,
            "tag_dropout_special_tags_mode": "NONE", "keep_tags_count": 2}  # fmt: skip
    given = {
        "training_method": "LORA", "base_model_name": "m", "epochs": 40,
        "concepts": [
            {"path": "few", "balancing": 2.0, "text": text}, {"path": "many", "balancing": 0.5, "text": text},
        ],
    }  # fmt: skip
    found = imported(tmp_path, "config.json", json.dumps(given))
    expected = {
        "repeats": (4, 1), "num_train_epochs": 20, "caption_tag_dropout": 0.3, "caption_tag_dropout_mode": "rising",
        "keep_tokens": 2,
    }  # fmt: skip
    assert {name: found.get(name) for name in expected} == expected
    told = capsys.readouterr().out
    assert "note: an epoch here has the visits of 2 of OneTrainer's" in told
    assert "left" not in told.replace("0 left out", "")


def test_samples_of_a_concept_of_onetrainer_are_visited_in_turns(tmp_path: Path) -> None:
    concepts = [
        {"path": "few", "balancing": 0.5},
        {"path": "many", "balancing": 30, "balancing_strategy": "SAMPLES"},
    ]
    given = {"training_method": "LORA", "base_model_name": "m", "epochs": 40, "concepts": concepts}
    found = imported(tmp_path, "config.json", json.dumps(given))
    assert (found.get("repeats", (1, 1)), found["num_train_epochs"]) == ((1, 1), 20)
    assert [parse_settings(text).get("samples") for text in found["source_settings"]] == [None, 60]


def test_a_key_of_a_service_is_written_nowhere(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = (
        f"accelerate launch {LORA} --pretrained_model_name_or_path=m --wandb_api_key=secret --huggingface_token=secret"
    )
    imported(tmp_path, "train.sh", line)
    assert "secret" not in capsys.readouterr().out + (tmp_path / "config.toml").read_text()


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.sh", "accelerate launch flux_train_network.py --network_dim=4", "flux_train_network.py cannot be"),
        ("a.sh", "python train_dreambooth_lora_sd3.py --rank=4", "lora_sd3.py cannot be imported"),
        ("a.sh", "python train_instruct_pix2pix.py --seed=1", "pix2pix.py cannot be imported; expected"),
        ("a.json", json.dumps({"training_method": "LORA", "model_type": "FLUX_DEV_1"}), "model_type FLUX_DEV_1: "),
        ("a.json", json.dumps({"training_method": "EMBEDDING", "base_model_name": "m"}), "method EMBEDDING: "),
        ("a.json", json.dumps({"model_family": "flux"}), "model_family flux: Stable Diffusion 1, 2 and XL"),
        ("a.yaml", "job: extension\nconfig: {process: [{type: sd_trainer, model: {arch: 'flux:x'}}]}", "arch flux: "),
        ("a.yaml", "job: extension\nconfig: {process: [{type: sd_trainer, model: {is_v3: true}}]}", "model is_v3: "),
        ("a.yaml", "job: extension\nconfig: {process: [{type: slider}]}", "process type slider: expected sd_trainer"),
        ("a.yaml", "job: [", "is not valid YAML"),
        ("a.yaml", "name: x", "no config of OneTrainer, kohya_ss, ai-toolkit, SimpleTuner, EveryDream2"),
    ],
)  # fmt: skip
def test_what_trains_something_else_is_refused_in_one_line(
    name: str, text: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / name).write_text(text)
    assert main(["import", "--file", str(tmp_path / name), "--to", str(tmp_path / "config.toml")]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
    assert not (tmp_path / "config.toml").exists()


NULLS = """
job: extension
config:
  name: null
  process:
    - type: sd_trainer
      trigger_word: null
      network: {type: lora, linear: 8, linear_alpha: null, conv: null, lokr_factor: null, network_kwargs: null}
      datasets:
        - {folder_path: dog, num_repeats: null, resolution: 512, caption_ext: null, loss_multiplier: null}
        - {folder_path: null}
      train: {steps: 10, optimizer_params: null, lr_scheduler_params: null, ema_config: null, min_snr_gamma: null}
      model: {name_or_path: m, vae_path: null}
      save: null
      sample: {samples: [{prompt: null}, {prompt: a dog}]}
"""


def test_entries_that_are_null_stand_for_the_default(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = imported(tmp_path, "job.yaml", NULLS)
    expected = {"rank": 8, "lora_alpha": 1.0, "data": ("dog",), "sample_prompts": ("a dog",), "resolution": 512}
    assert {name: found.get(name) for name in expected} == expected
    assert "a dataset without a folder" in capsys.readouterr().out
    (tmp_path / "config.toml").unlink()
    found = imported(tmp_path, "config.json", json.dumps({"model_family": "sd1x", "lr_end": None, "learning_rate": ""}))
    assert (found["learning_rate"], found["num_train_epochs"]) == (4e-7, 1)
    (tmp_path / "config.toml").unlink()
    given = {"model_family": "sd1x", "instance_data_dir": "dogs", "caption_strategy": "textfile", "resolution": 512,
             "validation_seed": 1, "peft_lora_target_modules": "to_q", "model_type": "lora"}  # fmt: skip
    found = imported(tmp_path, "config.json", json.dumps(given))
    expected = {"data": ("dogs",), "resolution": 512, "caption_lines": "chosen", "lora_target_modules": ("to_q",)}
    assert {name: found.get(name) for name in expected} == expected
    assert "without effect here: validation_seed" in capsys.readouterr().out


def test_data_backends_of_another_form_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "backend.json").write_text(json.dumps({"id": "dogs"}))
    (tmp_path / "config.json").write_text(json.dumps({"model_family": "sd1x", "data_backend_config": "backend.json"}))
    assert main(["import", "--file", str(tmp_path / "config.json"), "--to", str(tmp_path / "config.toml")]) == 2
    assert "data_backend_config backend.json: expected a list of data backends" in capsys.readouterr().err
