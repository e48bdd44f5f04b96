"""Versions of diffusers that people have, each with the peft and the transformers of its time, in a folder of its own.

    python -m tests.clients.environments FOLDER

A folder holds only what differs; torch, numpy and safetensors are those of the environment that runs this.
"""

import subprocess
import sys
from pathlib import Path

CLIENTS = {
    "0.30.3": {"peft": "0.12.0", "transformers": "4.44.2", "tokenizers": "0.19.1", "huggingface_hub": "0.24.7"},
    "0.32.2": {"peft": "0.14.0", "transformers": "4.48.3", "tokenizers": "0.21.4", "huggingface_hub": "0.28.1"},
    "0.35.2": {"peft": "0.17.0", "transformers": "4.56.2", "tokenizers": "0.22.1", "huggingface_hub": "0.35.3"},
    "0.38.0": {"peft": "0.18.1", "transformers": "4.57.6", "tokenizers": "0.22.2", "huggingface_hub": "0.36.2"},
    "0.40.0": {"peft": "0.19.1", "transformers": "5.5.4", "tokenizers": "0.22.2", "huggingface_hub": "1.33.0"},
    "0.42.1": {"peft": "0.21.2", "transformers": "5.24.0", "tokenizers": "0.23.3", "huggingface_hub": "2.4.0"},
}
"""Version of diffusers -> of the packages that it works with."""


def make(folder: Path) -> None:
    """Install every client into `folder`, each under its version; those that are there are kept."""
    for version, packages in CLIENTS.items():
        place = folder / version
        if (place / "diffusers").is_dir():
            continue
        pinned = [f"{name}=={number}" for name, number in {"diffusers": version, **packages}.items()]
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(place)]
        subprocess.run([*pip, *pinned], check=True)


if __name__ == "__main__":
    make(Path(sys.argv[1]))
