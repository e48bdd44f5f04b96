from pathlib import Path

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file

from finetune.config import load_config
from finetune.models.families import FAMILIES
from finetune.models.model_info import ModelInfo
from finetune.run.resolve_config import resolve

CONFIGS = sorted((Path(__file__).parent.parent / "configs").glob("*.toml"))


def test_the_promised_configs_are_there() -> None:
    names = ["ddpm-butterflies-128", "sd15-full", "sd15-lora", "sd21-lora", "sdxl-full", "sdxl-lora"]
    names += ["tiny-butterflies"]
    assert [path.stem for path in CONFIGS] == names


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_loads_and_resolves(path: Path) -> None:
    config = load_config(path)
    family = FAMILIES[config.model]
    found = ModelInfo(config.model, family, folder=None, resolution=family.resolution, multiple=8)
    device = torch.device("cuda" if config.mixed_precision == "fp16" else "cpu")
    resolved = resolve(config, found, pictures=1000, varied_captions=True, device=device)
    assert resolved.max_train_steps
    if path.stem == "ddpm-butterflies-128":
        assert (resolved.max_train_steps, resolved.lr_warmup_steps, resolved.mixed_precision) == (3125, 500, "fp16")


@pytest.mark.parametrize(("name", "machines", "processes"), [("one-machine", 1, 2), ("two-machines", 2, 16)])
def test_accelerate_reads_its_configs(name: str, machines: int, processes: int) -> None:
    path = Path(__file__).parent.parent / f"configs/accelerate-{name}.yaml"
    config = load_config_from_file(str(path))
    assert (config.num_machines, config.num_processes, config.distributed_type) == (machines, processes, "MULTI_GPU")
    assert config.mixed_precision == "no"
