"""CLIP's tokenizer for checkpoints without one: from a folder, a vocabulary file, or an installed package.

Nothing is asked of the network.
"""

import gzip
import importlib.util
import json
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache
from transformers import CLIPTokenizer

from finetune.errors import ModelError, UsageError

START, END = "<|startoftext|>", "<|endoftext|>"
_PACKAGED = "bpe_simple_vocab_16e6.txt.gz"
"""OpenAI's vocabulary, as open_clip_torch ships it."""
_REPOSITORIES = ("openai/clip-vit-large-patch14", "stable-diffusion-v1-5/stable-diffusion-v1-5")
_WAYS = f"a folder with vocab.json and merges.txt (tokenizer/ of any Stable Diffusion), or {_PACKAGED}"


def clip_tokenizer(given: str | None, pad: str = END) -> CLIPTokenizer:
    """The tokenizer of Stable Diffusion's text encoders.

    Args:
        given: a tokenizer's folder, or a vocabulary file; None: the package open_clip, or the hub's cache.
        pad: what short prompts are filled with: "<|endoftext|>", or "!" (OpenCLIP's).

    Raises:
        UsageError: `given` is neither.
        ModelError: none is here; the message says how to get one.
    """
    place = Path(given).expanduser() if given is not None else _installed()
    if place is None:
        raise ModelError(
            f"the file holds no vocabulary, and none is installed: give --tokenizer PATH ({_WAYS}), "
            "or pip install 'finetune-unet[single-file]'"
        )
    if (place / "merges.txt").is_file() or (place / "tokenizer.json").is_file():
        tokenizer = CLIPTokenizer.from_pretrained(place, local_files_only=True)
    elif place.is_file() and place.name.endswith(".txt.gz"):
        tokenizer = _from_vocabulary(place)
    else:
        raise UsageError(f"tokenizer {given}: no tokenizer; expected {_WAYS}")
    tokenizer.pad_token = pad
    return tokenizer


def _installed() -> Path | None:
    spec = importlib.util.find_spec("open_clip")
    if spec is not None and spec.origin and (Path(spec.origin).parent / _PACKAGED).is_file():
        return Path(spec.origin).parent / _PACKAGED
    for repository in _REPOSITORIES:
        inside = "" if repository.startswith("openai") else "tokenizer/"
        files = [try_to_load_from_cache(repository, f"{inside}{name}") for name in ("vocab.json", "merges.txt")]
        if all(isinstance(file, str) for file in files):
            return Path(str(files[0])).parent
    return None


def _from_vocabulary(path: Path) -> CLIPTokenizer:
    """From OpenAI's list of merges (Radford et al. 2021): bytes, bytes at a word's end, merged pairs, two marks."""
    try:
        lines = gzip.decompress(path.read_bytes()).decode("utf-8").split("\n")
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise UsageError(f"tokenizer {path}: cannot be read: {error}") from error
    merges = lines[1 : 49152 - 256 - 2 + 1]
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    letters = [chr(byte) for byte in printable] + [chr(256 + number) for number in range(256 - len(printable))]
    words = [*letters, *(f"{letter}</w>" for letter in letters), *("".join(merge.split()) for merge in merges)]
    settings = {
        "bos_token": START, "eos_token": END, "unk_token": END, "pad_token": END, "model_max_length": 77,
        "do_lower_case": True, "tokenizer_class": "CLIPTokenizer",
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _write_files(folder, {word: number for number, word in enumerate([*words, START, END])}, merges)
        (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
        return CLIPTokenizer.from_pretrained(folder, local_files_only=True)


def write_vocabulary(tokenizer: Any, folder: Path) -> None:
    """Write `vocab.json` and `merges.txt`, without which transformers 4 loads no CLIP tokenizer.

    transformers 5 writes `tokenizer.json` alone.

    Args:
        tokenizer: as `clip_tokenizer` returns it.
        folder: the tokenizer's folder.
    """
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    pairs = (merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"])
    _write_files(folder, model["vocab"], pairs)


def _write_files(folder: Path, vocabulary: Mapping[str, int], merges: Iterable[str]) -> None:
    """Write the two files of a byte-pair vocabulary, as OpenAI published GPT-2's."""
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")
