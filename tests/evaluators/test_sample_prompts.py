"""Files of sample prompts, as sd-scripts has them."""

import json
from pathlib import Path

import pytest

from finetune.errors import UsageError
from finetune.evaluators.sample_prompts import SamplePrompt, sample_prompts


def test_settings_of_other_tools_are_passed_over_and_kept_for_a_note(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a dog --s 20 --ss euler_a --d 3 --am 0.5\n")
    (found,) = sample_prompts([str(tmp_path / "a.txt")])
    assert found == SamplePrompt("a dog", num_inference_steps=20, seed=3, unknown=("--ss", "--am"))


def test_tables_hold_the_same(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text(
        '[prompt]\nscale = 7.5\nwidth = 64\n[[prompt.subset]]\nprompt = "a dog"\nnegative_prompt = "blur"\n'
        '[[prompt.subset]]\nprompt = "a cat"\nseed = 4\nsample_steps = 9\n'
    )
    dog, cat = sample_prompts([str(tmp_path / "a.toml")])
    assert (dog.text, dog.negative, dog.guidance_scale, dog.other_size) == ("a dog", "blur", 7.5, True)
    assert (cat.text, cat.seed, cat.num_inference_steps, cat.guidance_scale) == ("a cat", 4, 9, 7.5)
    (tmp_path / "a.json").write_text(json.dumps(["a fox", {"prompt": "a dog", "seed": 2}]))
    assert [(p.text, p.seed) for p in sample_prompts([str(tmp_path / "a.json")])] == [("a fox", 0), ("a dog", 2)]
    (tmp_path / "b.json").write_text("{")
    with pytest.raises(UsageError, match=r"b.json: no prompts as sd-scripts has them"):
        sample_prompts([str(tmp_path / "b.json")])
