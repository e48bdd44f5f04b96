import json

import torch

from finetune.data.transforms import normalize
from finetune.models.encoders import PixelEncoder
from finetune.models.loading import load_model
from tests.tiny_copy import copy_tiny


def test_scaling_comes_from_the_vaes_config_and_decode_undoes_sample(tmp_path) -> None:
    copy_tiny(tmp_path)
    path = tmp_path / "vae/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"scaling_factor": 0.3}))
    encoder = load_model(tmp_path).encoder
    mean, std = torch.full((1, 4, 16, 16), 2.0), torch.zeros(1, 4, 16, 16)
    x0 = encoder.sample(torch.cat([mean, std], dim=1), torch.tensor([1]))
    vae = encoder.vae
    torch.testing.assert_close(x0, mean * 0.3)
    with torch.no_grad():
        torch.testing.assert_close(encoder.decode(x0), vae.decode(mean).sample)


def test_a_pictures_bits_do_not_depend_on_its_neighbours() -> None:
    encoder = load_model("tiny").encoder
    pixels = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert torch.equal(encoder.encode(pixels)[1:2], encoder.encode(pixels[1:2]))


def test_pixels_survive_the_way_through_bytes_exactly() -> None:
    every = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 3, 16, 16)
    encoder = PixelEncoder()
    latent_params = encoder.encode(normalize(every))
    assert torch.equal(latent_params, every)
    torch.testing.assert_close(encoder.sample(latent_params, torch.tensor([1])), normalize(every))
