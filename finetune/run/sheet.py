"""The contact sheet of a run: some of its pictures as training sees them, for the report."""

import io

from finetune.cache.visits import Live
from finetune.files import write_whole
from finetune.results.contact_sheet import contact_sheet
from finetune.results.sections import SHEET
from finetune.run.parts import Run
from finetune.seeding import example_key

SHOWN = 20
"""Pictures."""


def lay_out_pictures(run: Run) -> None:
    """Write it, unless an earlier part of the run has, on what may not have changed since; the pictures are spread over
    all that are trained on.
    """
    path, pictures, trained = run.folder / SHEET, run.pictures, run.pictures.trained
    if path.exists() and not run.config.allow_changed:
        return
    some = [trained[number * len(trained) // SHOWN] for number in range(SHOWN)] if len(trained) > SHOWN else trained
    names = [pictures.ids[index] for index in some]
    visits = Live(pictures, run.model.inpainting)
    cells = [visits.shown(i, example_key(run.config.seed, pictures.ids[i], 0))[0] for i in some]
    sheet = contact_sheet(cells, names, [pictures.captions[index] for index in some], [0] * len(some), 0)
    sheet.save(file := io.BytesIO(), "JPEG", quality=85)
    write_whole(path, file.getvalue())
