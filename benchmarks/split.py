"""Whether near duplicates are told from other pictures: plants changed copies of real ones, and counts.

python benchmarks/split.py [FOLDER]    the pictures to change; those of the demo unless given
"""

import io
import random
import sys
import tempfile
import time
from pathlib import Path

from PIL import Image, ImageEnhance, ImageOps

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from finetune.data.image_folder import ImageFolder
from finetune.data.images import open_image
from finetune.data.listing import is_picture
from finetune.data.near_duplicates import make_thumbnail, near_duplicates
from finetune.data.split import held_out

PLANTED = 200
SEEDS = 3


def changed(picture: Image.Image, rng: random.Random) -> Image.Image:
    """A crop of at least 60 % of each side, a mirror image, other tints, a smaller JPEG; each of them mostly."""
    if rng.random() < 0.75:
        width, height = (int(side * rng.uniform(0.6, 0.95)) for side in picture.size)
        left, top = rng.randint(0, picture.width - width), rng.randint(0, picture.height - height)
        picture = picture.crop((left, top, left + width, top + height))
    if rng.random() < 0.5:
        picture = ImageOps.mirror(picture)
    if rng.random() < 0.75:
        for enhance in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
            picture = enhance(picture).enhance(rng.uniform(0.85, 1.15))
    scale = rng.uniform(0.5, 1)
    smaller = picture.resize((max(1, int(picture.width * scale)), max(1, int(picture.height * scale))))
    smaller.save(file := io.BytesIO(), "JPEG", quality=rng.randint(40, 90))
    return Image.open(file).convert("RGB")


def main() -> None:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "examples/butterflies"
    originals = [open_image(path) for path in sorted(folder.rglob("*")) if is_picture(path.name)]
    count, rng = len(originals), random.Random(0)
    copies = [changed(originals[number % count], rng) for number in range(PLANTED)]
    thumbnails = [make_thumbnail(picture) for picture in (*originals, *copies)]

    clock = time.perf_counter()
    joined = near_duplicates(thumbnails[:count], range(count))
    seconds = time.perf_counter() - clock
    pairs = sum(map(len, joined)) // 2
    print(f"{count} pictures compared with each other in {seconds:.1f} s: {pairs} of {count * (count - 1) // 2} pairs")
    near = near_duplicates(thumbnails, range(count, count + PLANTED))
    found = sum(number % count in of for number, of in enumerate(near))
    print(f"changed copies known: {found} of {PLANTED}")

    with tempfile.TemporaryDirectory() as scratch:
        for number, picture in enumerate((*originals, *copies)):
            small = picture.resize((256, 256 * picture.height // picture.width))
            small.save(f"{scratch}/{number % count:03d}-{number:03d}.png")
        pictures = ImageFolder(scratch, prompt="", resolution=64)
        apart = 0
        for seed in range(SEEDS):
            held = set(held_out(pictures, 0.1, seed))
            validated = {pictures.ids[index][:3] for index in held}
            trained = {pictures.ids[index][:3] for index in range(len(pictures)) if index not in held}
            apart += sum(name[:3] in validated & trained for name in pictures.ids)
            print(f"seed {seed}: {len(held)} of {len(pictures)} held out")
        print(f"pictures with a near duplicate on the other side: {apart}")


if __name__ == "__main__":
    main()
