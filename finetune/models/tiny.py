"""`tiny`: a trained Stable Diffusion that is part of the package. examples/train_tiny.py made it."""

import hashlib
from pathlib import Path

from finetune.errors import ModelError

ASSETS = Path(__file__).parents[1] / "assets" / "tiny"
DIGESTS = "SHA256SUMS"


def tiny_folder(folder: Path = ASSETS) -> Path:
    """The diffusers folder of `tiny`, every file of it compared with its digest. Nothing is written.

    Raises:
        ModelError: a file is missing or is not what was released.
    """
    try:
        lines = (folder / DIGESTS).read_text(encoding="ascii").splitlines()
        if not lines:
            raise ValueError(f"{folder / DIGESTS} is empty")
        for line in lines:
            digest, name = line.split(maxsplit=1)
            actual = hashlib.sha256((folder / name).read_bytes()).hexdigest()
            if actual != digest:
                damage = f"its SHA-256 is {actual}, it should be {digest}"
                raise ModelError(f"{folder / name} is damaged: {damage}; reinstall finetune-unet")
    except (OSError, ValueError) as error:
        raise ModelError(f"tiny cannot be read: {error}; reinstall finetune-unet") from error
    return folder
