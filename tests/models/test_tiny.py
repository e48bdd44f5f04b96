import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from draw_world import draw, invent

from finetune.data.transforms import normalize
from finetune.errors import ModelError
from finetune.models.conditioners import spelt_words
from finetune.models.loading import load_model
from finetune.models.tiny import DIGESTS, tiny_folder
from finetune.results.sampling import draw_pictures
from tests.tiny_copy import copy_tiny


def test_all_of_it_takes_no_more_than_12_mb() -> None:
    assert sum(path.stat().st_size for path in tiny_folder().rglob("*") if path.is_file()) <= 12_000_000


def test_its_vae_is_scaled_by_a_factor_of_its_own() -> None:
    encoder = load_model("tiny").encoder
    pixels = torch.rand(4, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert encoder.scaling_factor != 0.18215
    assert encoder.encode(pixels).shape == (4, 8, 16, 16)
    scenes = [np.array(draw(invent(np.random.default_rng([4, i])), 64)) for i in range(60)]
    pictures = normalize(torch.from_numpy(np.stack(scenes)).permute(0, 3, 1, 2))
    x0 = encoder.sample(encoder.encode(pictures), torch.arange(60))
    assert 0.8 < x0.std() < 1.2


def test_a_damaged_file_is_named_with_its_hash(tmp_path: Path) -> None:
    copy_tiny(tmp_path)
    (tmp_path / DIGESTS).write_bytes((tiny_folder() / DIGESTS).read_bytes())
    assert tiny_folder(tmp_path) == tmp_path
    path = tmp_path / "vae/diffusion_pytorch_model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(
        ModelError, match=r"vae/diffusion_pytorch_model\.safetensors is damaged: its SHA-256 is [0-9a-f]{64}"
    ):
        tiny_folder(tmp_path)
    path.unlink()
    with pytest.raises(ModelError, match=r"tiny cannot be read: .*vae/diffusion_pytorch_model\.safetensors"):
        tiny_folder(tmp_path)


def test_its_words_are_single_tokens_and_others_are_spelt() -> None:
    tokenizer = load_model("tiny").conditioner.tokenizer
    assert tokenizer is not None
    known = "a red circle on a pale blue background, a butterfly with orange spots, lumo, sks, ladybird, shaded"
    assert spelt_words(tokenizer, [known]) == []
    assert spelt_words(tokenizer, ["a zebra on a Skateboard", "a zebra"]) == ["skateboard", "zebra"]
    assert tokenizer.unk_token_id not in tokenizer("zebra 象 🦓", add_special_tokens=False)["input_ids"]


def test_a_plain_pipeline_draws_the_same_picture() -> None:
    prompt, settings = "a red circle on a blue background", {"num_inference_steps": 3, "guidance_scale": 5.0}
    with torch.random.fork_rng(devices=[]):
        pipeline = StableDiffusionPipeline.from_pretrained(tiny_folder())
    theirs = pipeline(prompt, generator=torch.Generator().manual_seed(4), **settings).images[0]
    ((ours,),) = draw_pictures(load_model("tiny"), [prompt], [4], resolution=64, **settings)
    assert np.array_equal(np.asarray(ours), np.asarray(theirs))


def test_it_loads_without_a_place_to_write(tmp_path: Path) -> None:
    line = "import finetune; print(finetune.load_model('tiny').unet.config['sample_size'])"
    nowhere = {
        "HOME": "/proc/nowhere",
        "HF_HOME": "/proc/nowhere",
        "XDG_CACHE_HOME": "/proc/nowhere",
        "HF_HUB_OFFLINE": "1",
    }
    done = subprocess.run([sys.executable, "-c", line], env=os.environ | nowhere, capture_output=True, text=True)
    assert done.stdout.strip() == "16", done.stderr
