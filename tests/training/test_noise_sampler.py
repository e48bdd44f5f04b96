import pytest
import torch
from torch.nn import functional

from finetune.training.noise_sampler import NoiseSampler, pyramid_noise

SHAPE = torch.Size((4, 16, 24))


def test_pyramid_noise_is_the_formula_of_sd_scripts() -> None:
    """`pyramid_noise_like` of its custom_train_functions, on the same numbers."""
    noise = torch.randn(4, 16, 24, generator=torch.Generator().manual_seed(1))
    ours = pyramid_noise(noise, torch.Generator().manual_seed(2), iterations=6, discount=0.4)

    source = torch.Generator().manual_seed(2)
    total = noise.clone()[None]
    i = 0
    for i in range(6):
        r = torch.rand((), generator=source, dtype=torch.float64).item() * 2 + 2
        wn, hn = max(1, int(16 / (r**i))), max(1, int(24 / (r**i)))
        upsample = torch.nn.Upsample(size=(16, 24), mode="bilinear")
        total += upsample(torch.randn(1, 4, wn, hn, generator=source)) * 0.4**i
        if wn == 1 or hn == 1:
            break
    assert i < 5  # the latents are small enough to end early
    torch.testing.assert_close(ours, (total / total.std())[0])


def test_multires_noise_has_more_of_low_frequencies_and_is_a_function_of_the_key() -> None:
    keys = torch.arange(40)
    plain = NoiseSampler().sample(keys, SHAPE)
    multires = NoiseSampler(multires_iterations=6, multires_discount=0.8).sample(keys, SHAPE)
    assert torch.equal(
        NoiseSampler(multires_iterations=6, multires_discount=0.8).sample(keys[7:9], SHAPE), multires[7:9]
    )
    assert multires.std(dim=(1, 2, 3)).sub(1).abs().max() < 1e-4
    coarse = [functional.avg_pool2d(noise, 8).std().item() for noise in (plain, multires)]
    assert coarse[0] == pytest.approx(1 / 8, abs=0.02)
    assert coarse[1] > 2 * coarse[0]


def test_offset_and_perturbation_are_drawn_apart_from_the_noise() -> None:
    keys = torch.tensor([3, 4])
    plain = NoiseSampler().sample(keys, SHAPE)
    offset = NoiseSampler(offset=0.1).sample(keys, SHAPE) - plain
    assert offset.std(dim=(2, 3)).max() < 1e-6
    assert NoiseSampler().perturb(plain, keys) is None
    perturbed = NoiseSampler(input_perturbation=0.1).perturb(plain, keys)
    assert perturbed is not None
    assert (perturbed - plain).std().item() == pytest.approx(0.1, rel=0.05)


def test_random_strengths_are_uniform_up_to_the_given_one_and_a_function_of_the_key() -> None:
    """sd-scripts: `torch.rand(1) * noise_offset`; it draws one for a batch, we one for each visit."""
    keys = torch.arange(400)
    plain = NoiseSampler().sample(keys, SHAPE)
    fixed, drawn = (NoiseSampler(offset=0.2, offset_random_strength=random) for random in (False, True))
    strengths = ((drawn.sample(keys, SHAPE) - plain) / (fixed.sample(keys, SHAPE) - plain)).mean(dim=(2, 3))
    assert (strengths.amax(1) - strengths.amin(1)).max() < 1e-3  # one for all channels
    assert strengths.min() >= -1e-3
    assert strengths.max() <= 1 + 1e-3
    assert strengths.mean().item() == pytest.approx(0.5, abs=0.05)
    assert torch.equal(drawn.sample(keys[7:9], SHAPE), drawn.sample(keys, SHAPE)[7:9])

    fixed, drawn = (
        NoiseSampler(input_perturbation=0.2, input_perturbation_random_strength=random) for random in (False, True)
    )
    always, sometimes = (sampler.perturb(plain, keys) for sampler in (fixed, drawn))
    assert always is not None
    assert sometimes is not None
    shares = (sometimes - plain).std(dim=(1, 2, 3)) / (always - plain).std(dim=(1, 2, 3))
    assert shares.max() <= 1 + 1e-3
    assert shares.mean().item() == pytest.approx(0.5, abs=0.05)
