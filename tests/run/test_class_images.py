"""Class pictures: how they count, and how those that are missing are drawn."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from finetune.cache.encode import encode
from finetune.config import TrainConfig
from finetune.data.buckets import Buckets
from finetune.data.concat import ConcatDataset, Source
from finetune.data.image_dataset import ImageDataset
from finetune.data.image_folder import ImageFolder
from finetune.data.loader import training_steps
from finetune.data.source_settings import SourceSettings
from finetune.errors import UsageError
from finetune.models.loading import load_model
from finetune.models.lora import add_lora, trainable
from finetune.models.model_info import locate
from finetune.recipe import fine_tune
from finetune.run.build_dataset import open_pictures
from finetune.run.class_images import draw_missing
from finetune.training.noise_prediction import NoisePrediction
from finetune.training.optimizers import make_optimizer
from finetune.training.trainer import Trainer

MakePictures = Callable[..., Path]


def folders(make_pictures: MakePictures, tmp_path: Path, subjects: int, others: int) -> tuple[Path, Path]:
    return make_pictures(tmp_path / "dog", count=subjects), make_pictures(tmp_path / "dogs", count=others)


def with_class_pictures(name: str, subject: ImageDataset, kind: ImageDataset, weight: float) -> ConcatDataset:
    settings = SourceSettings(name="class", loss_weight=weight, class_images=True)
    return ConcatDataset([Source(SourceSettings(name=name), subject), Source(settings, kind)])


def test_a_joined_dataset_tells_the_kind_from_the_subject(make_pictures: MakePictures, tmp_path: Path) -> None:
    dog, dogs = folders(make_pictures, tmp_path, 2, 5)
    both = with_class_pictures("dog", ImageFolder(dog, "sks dog"), ImageFolder(dogs, "a dog"), 0.5)
    assert (both.num_subject_images, both.class_pictures, both.epoch_visits) == (2, [2, 3, 4, 5, 6], 4)
    assert both.weights == [1.0, 1.0, 0.5, 0.5, 0.5, 0.5, 0.5]
    assert (both.ids[0], both.ids[2]) == ("dog/00.png", "class/00.png")
    assert both.sources == {"prompt": 2, "class_prompt": 5}


@pytest.mark.parametrize("others", [100, 5, 3])
@pytest.mark.parametrize("weight", [1.0, 0.1])
@pytest.mark.parametrize(("batch_size", "buckets"), [(1, False), (4, False), (4, True)])
def test_the_subjects_share_of_the_gradient_is_what_was_asked_for(
    make_pictures: MakePictures, tmp_path: Path, others: int, weight: float, batch_size: int, buckets: bool
) -> None:
    """The coefficient of each picture's loss, summed over four epochs of a subject of five pictures."""
    dog, dogs = folders(make_pictures, tmp_path, 5, others)
    how = {"resolution": 64, "buckets": Buckets(64, 32, 128, 32)} if buckets else {"resolution": 32}
    subject, kind = ImageFolder(dog, "sks dog", **how), ImageFolder(dogs, "a dog", **how)
    both = with_class_pictures("dog", subject, kind, weight)
    encoded = encode(both, load_model("tiny"), cache_dir="none")
    steps = 4 * encoded.epoch_visits // batch_size
    shares = {"dog": 0.0, "class": 0.0}
    seen: set[str] = set()
    for batches in training_steps(encoded, batch_size=batch_size, steps=steps):
        for batch in batches:
            whole = batch.global_step.weight if batch.global_step else float(batch_size)
            for name, each in zip(batch.ids, batch.weight.tolist(), strict=True):
                shares[name.split("/")[0]] += each / whole
                seen.add(name)
    assert shares["dog"] / sum(shares.values()) == pytest.approx(1 / (1 + weight))
    assert sum(shares.values()) == pytest.approx(steps)
    assert len(seen) == 5 + min(others, 20)  # the kind's pictures take turns


@pytest.mark.parametrize("subjects", [5, 12])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_the_trainer_learns_subject_and_class_in_the_proportion_of_the_weight(
    make_pictures: MakePictures, tmp_path: Path, batch_size: int, subjects: int
) -> None:
    """The update of two epochs against the gradients of their visits: (subject + 0.5 class) / 1.5, at any batch size.

    The rate is so small that all of them are taken at the same weights.
    """
    dog, dogs = folders(make_pictures, tmp_path, subjects, 100)
    both = with_class_pictures(
        "dog", ImageFolder(dog, "sks dog", resolution=32), ImageFolder(dogs, "a dog", resolution=32), 0.5
    )
    model = load_model("tiny")
    add_lora(model.unet, rank=2, target_modules=["attn2.to_q"])
    encoded, objective = encode(both, model, cache_dir="none"), NoisePrediction(model.scheduler)
    steps, rate = 2 * encoded.epoch_visits // batch_size, 1e-6
    plan = list(training_steps(encoded, batch_size=batch_size, steps=steps))
    learned = trainable(model.unet)
    gradients = {False: 0.0, True: 0.0}  # of the subject, and of the class
    for batch in (batch for batches in plan for batch in batches):
        x0 = model.encoder.sample(batch.latent_params, batch.keys)
        losses = objective.loss(model.unet, objective.sample(x0, batch.keys), batch.cond)
        for of_class in gradients:
            chosen = losses[[index for index, each in enumerate(batch.is_class_image) if each == of_class]].sum()
            grads = torch.autograd.grad(chosen, learned, retain_graph=True, allow_unused=True)
            flat = [torch.zeros_like(p) if g is None else g for p, g in zip(learned, grads, strict=True)]
            gradients[of_class] = gradients[of_class] + torch.cat([each.flatten() for each in flat])
    visits = steps * batch_size / 2  # of each kind
    expected = steps * (gradients[False] + 0.5 * gradients[True]) / visits / 1.5
    before = torch.cat([p.detach().flatten() for p in learned])
    optimizer = make_optimizer("sgd", learned, learning_rate=rate, weight_decay=0.0)
    trainer = Trainer(model.unet, model.encoder, objective, optimizer, max_grad_norm=0)
    for batches in plan:
        trainer.step(*batches)
    learned_now = torch.cat([p.detach().flatten() for p in learned])
    update = (before - learned_now) / rate
    assert torch.nn.functional.cosine_similarity(update, expected, dim=0) > 0.9999
    assert update.norm() == pytest.approx(expected.norm().item(), rel=1e-3)


def test_the_weight_counts_where_a_step_is_of_one_picture(make_pictures: MakePictures, tmp_path: Path) -> None:
    """At batch 1 the weight of the only picture must not cancel."""
    dog, dogs = folders(make_pictures, tmp_path, 2, 4)
    learned = []
    for weight in (1.0, 0.1):
        config = TrainConfig(
            data=str(dog), prompt="sks dog", class_data=str(dogs), class_prompt="a dog", prior_loss_weight=weight,
            output_dir=str(tmp_path / str(weight)), max_train_steps=8, train_batch_size=1, rank=2,
            num_inference_steps=0, forgetting_prompts=0, lora_target_modules=["attn2.to_q"], optimizer="sgd",
            learning_rate=0.1, max_grad_norm=0,
        )  # fmt: skip
        learned.append(load_file(fine_tune(config) / "pytorch_lora_weights.safetensors"))
    assert any(not torch.equal(learned[0][name], learned[1][name]) for name in learned[0])


def test_batches_carry_the_weights(make_pictures: MakePictures, tmp_path: Path) -> None:
    dog, dogs = folders(make_pictures, tmp_path, 4, 4)
    both = with_class_pictures(
        "dog", ImageFolder(dog, "sks dog", resolution=64), ImageFolder(dogs, "a dog", resolution=64), 0.25
    )
    encoded = encode(both, load_model("tiny"), cache_dir="none")
    (batch,) = next(training_steps(encoded, batch_size=8, steps=1))
    assert {name.split("/")[0]: weight for name, weight in zip(batch.ids, batch.weight.tolist(), strict=True)} == {
        "dog": 1.0,
        "class": 0.25,
    }
    assert len(set(batch.ids)) == 8


def test_missing_ones_are_drawn_once_and_a_cut_off_drawing_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    kind = tmp_path / "kind"
    options = {"model": "tiny", "data": "x", "resolution": 64, "num_inference_steps": 2, "class_data": str(kind)}
    config = TrainConfig(**options, class_prompt="a red circle", num_class_images=3)
    draw_missing(config, locate("tiny"), torch.device("cpu"))
    names = [f"drawn-{seed:05d}.png" for seed in range(3)]
    assert sorted(path.name for path in kind.iterdir()) == names
    drawn = {path.name: path.read_bytes() for path in kind.iterdir()}
    assert Image.open(kind / names[0]).size == (64, 64)
    assert len(set(drawn.values())) == 3
    (kind / names[1]).unlink()
    capsys.readouterr()
    draw_missing(config, locate("tiny"), torch.device("cpu"))
    assert "1 of 'a red circle'" in capsys.readouterr().out
    assert sorted(path.name for path in kind.iterdir()) == names
    draw_missing(config, locate("tiny"), torch.device("cpu"))
    assert capsys.readouterr().out == ""


def test_what_cannot_be_drawn_or_has_no_caption_is_told(make_pictures: MakePictures, tmp_path: Path) -> None:
    dog, dogs = folders(make_pictures, tmp_path, 2, 2)
    config = TrainConfig(model="tiny", data=str(dog), prompt="x", class_data=str(dogs), num_class_images=3)
    with pytest.raises(UsageError, match=r"class_data .*: 2 of 3 images; give --class_prompt"):
        draw_missing(config, locate("tiny"), torch.device("cpu"))
    with pytest.raises(UsageError, match=r"class_data: 2 of 2 images without a caption; give --class_prompt"):
        open_pictures(config, locate("tiny"), None)


def test_class_pictures_among_those_of_the_subject_are_refused(make_pictures: MakePictures, tmp_path: Path) -> None:
    dog = make_pictures(tmp_path / "dog", count=2)
    config = TrainConfig(model="tiny", data=str(dog), prompt="x", class_data=str(dog / "class"), class_prompt="y")
    with pytest.raises(UsageError, match=r"class_data .*class lies inside --data .*dog, all of which is the subject"):
        fine_tune(config)


def test_a_run_learns_both_and_its_defaults_are_those_of_the_subject(
    make_pictures: MakePictures, tmp_path: Path
) -> None:
    dog, dogs = folders(make_pictures, tmp_path, 3, 3)
    out = fine_tune(
        TrainConfig(
            data=str(dog), prompt="sks dog", class_data=str(dogs), class_prompt="a dog",
            output_dir=str(tmp_path / "out"), max_train_steps=2, train_batch_size=2, rank=2,
            num_inference_steps=0, resolution=64,
        )
    )  # fmt: skip
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]
    assert json.loads((out / "ledger.json").read_text())["found"] == 6
    assert "caption_dropout = 0.0" in (out / "config.toml").read_text()


def test_prior_prediction_teaches_the_kind_as_the_model_knew_it(make_pictures: MakePictures, tmp_path: Path) -> None:
    dog, dogs = folders(make_pictures, tmp_path, 2, 2)
    options = {
        "data": str(dog), "prompt": "sks dog", "class_data": str(dogs), "class_prompt": "a dog", "max_train_steps": 1,
        "train_batch_size": 4, "rank": 2, "num_inference_steps": 0, "resolution": 64,
    }  # fmt: skip
    losses = []
    for name, more in {"noise": {}, "answer": {"prior_prediction": True}}.items():
        out = fine_tune(TrainConfig(**options | more, output_dir=str(tmp_path / name)))
        losses.append(json.loads((out / "metrics.jsonl").read_text())["loss"])
    assert 0 < losses[1] < 0.8 * losses[0]  # two of four answer as they did
    with pytest.raises(UsageError, match="the model does not predict v_prediction yet; leave prediction_type out"):
        fine_tune(TrainConfig(**options, prior_prediction=True, prediction_type="v_prediction"))
