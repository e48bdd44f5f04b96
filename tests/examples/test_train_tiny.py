import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from train_tiny import Drawings, Reconstruction, train

import finetune as ft
from finetune.models.conditioners import NoCondition
from finetune.models.encoders import PixelEncoder, VaeEncoder

STEPS = 4


class Stopping(Reconstruction):
    """Asks for a stop, as Ctrl-C does, in its second loss."""

    calls = 0

    def loss(self, vae, drawn, cond, unet_channels):
        self.calls += 1
        if self.calls == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return super().loss(vae, drawn, cond, unet_channels)


def trained(folder: Path, objective: Reconstruction) -> dict[str, torch.Tensor]:
    """The VAE of `tiny`, trained on for a few steps of 2: its averaged weights."""
    model = ft.load_model("tiny")
    assert isinstance(model.encoder, VaeEncoder)
    vae = model.encoder.vae.requires_grad_(True)
    source = ft.encode(Drawings(4, seed=0), replace(model, encoder=PixelEncoder(), conditioner=NoCondition()))
    return train(folder, vae, PixelEncoder(), objective, source, steps=STEPS, batch=2, peak=1e-3, seed=0).shadow


def test_an_interrupted_training_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    whole = trained(tmp_path / "whole", Reconstruction())
    with pytest.raises(SystemExit, match="stopped at step 2 of 4; the same command goes on"):
        trained(tmp_path / "cut", Stopping())
    again = trained(tmp_path / "cut", Reconstruction())
    assert whole.keys() == again.keys()
    assert all(torch.equal(whole[name], again[name]) for name in whole)
