from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune.data.chunks import (
    AT_ONCE,
    VOLUME,
    Chunks,
    SourceChunks,
    SourceInfo,
    merge_sources,
    num_chunks_for,
    split_into_chunks,
)
from finetune.data.companions import pictures_among
from finetune.data.image_folder import FolderPart, ImageFolder
from finetune.data.listing import is_picture
from finetune.data.sampler import Sampler
from finetune.errors import DataError
from finetune.models.families import total_steps


def dealt_folder(folder: Path | str, files: list[str], size: int | None = None) -> SourceChunks:
    """Alone."""
    source_info = SourceInfo(str(folder), len(pictures_among(files)), files)
    return split_into_chunks(source_info, num_chunks_for([source_info], size))


VISITS = st.lists(st.integers(1, 40), min_size=2, max_size=6)


def volumes_of(visits: list[int]) -> Chunks:
    """Their pictures are not asked for."""
    return Chunks(cast(Any, None), counts=visits, visits=visits)


@given(visits=VISITS, batch_size=st.integers(1, 50), epochs=st.integers(1, 3))
def test_each_epoch_visits_every_picture_of_every_volume_and_few_a_second_time(
    visits: list[int], batch_size: int, epochs: int
) -> None:
    steps = total_steps(sum(visits), visits, batch_size, epochs, None)
    seen = [Counter[int]() for _ in visits]
    done = 0
    for chunk, own in volumes_of(visits).chunk_steps(range(steps), batch_size):
        sampler = Sampler([0] * visits[chunk], batch_size=batch_size, seed=0)
        seen[chunk].update(visit.example for step in own for visit in sampler.visits(step))
        done += len(own)
    assert done == steps
    for counts, size in zip(seen, visits, strict=True):
        assert min(counts[example] for example in range(size)) >= epochs
        assert epochs * size <= counts.total() < epochs * size + batch_size


@given(visits=VISITS, batch_size=st.integers(1, 50), start=st.integers(0, 80), length=st.integers(0, 40))
def test_which_volume_a_step_visits_is_the_same_wherever_a_run_begins(
    visits: list[int], batch_size: int, start: int, length: int
) -> None:
    chunks, stop = volumes_of(visits), start + length

    def single(steps: range) -> list[tuple[int, int]]:
        return [(chunk, step) for chunk, own in chunks.chunk_steps(steps, batch_size) for step in own]

    whole = single(range(stop))
    assert single(range(start, stop)) == whole[start:]
    for chunk in range(len(visits)):
        assert [step for found, step in whole if found == chunk] == list(
            range(chunks.steps_per_chunk(stop, batch_size)[chunk])
        )
        later = [step for found, step in whole[start:] if found == chunk]
        assert list(chunks.local_steps(chunk, range(start, stop), batch_size)) == later


def test_one_volume_is_visited_as_pictures_always_were() -> None:
    assert list(volumes_of([7]).chunk_steps(range(3, 99), 4)) == [(0, range(3, 99))]


def test_what_is_called_alike_comes_into_one_volume_and_all_are_as_large() -> None:
    files = [f"{folder}/{n}{ending}" for folder in "ab" for n in range(50) for ending in (".jpg", ".txt", ".mask.png")]
    files = sorted([*files, "a/7.png", "notes.md", "lonely.txt"])
    dealt = dealt_folder("data", files, 30)
    assert sorted(file for part in dealt.parts for file in part.files) == sorted(files)
    assert sorted(dealt.counts) == sorted(dealt.visits) == [25, 25, 25, 26]
    for part, count in zip(dealt.parts, dealt.counts, strict=True):
        stems = {file.split(".")[0] for file in part.files if file.endswith(".jpg")}
        assert {file.split(".")[0] for file in part.files if not file.startswith(("notes", "lonely"))} == stems
        assert sum(is_picture(file) and ".mask." not in file for file in part.files) == count
        assert list(part.files) == sorted(part.files)
    assert all({"a", "b"} == {file[0] for file in part.files if "/" in file} for part in dealt.parts)


def test_only_what_is_large_is_dealt_unless_asked() -> None:
    few, many = ([f"{number}.jpg" for number in range(count)] for count in (AT_ONCE, AT_ONCE + 1))
    assert [part.files for part in dealt_folder("data", few).parts] == [few]
    assert [part.files for part in dealt_folder("data", many, 0).parts] == [many]
    dealt = dealt_folder("data", many)
    assert max(dealt.counts) <= VOLUME
    assert len(dealt.parts) == 5
    assert dealt.digest != dealt_folder("data", [*many, "another.jpg"]).digest


def test_numbers_are_dealt_at_random_each_once() -> None:
    table = SourceInfo(None, 103)
    dealt = split_into_chunks(table, num_chunks_for([table], 30))
    parts = [list(part) for part in dealt.parts if not isinstance(part, FolderPart | None)]
    assert sorted(number for part in parts for number in part) == list(range(103))
    assert sorted(dealt.counts) == sorted(dealt.found) == [25, 26, 26, 26]
    assert all(part == sorted(part) and max(part) - min(part) > 50 for part in parts)
    assert parts[0][0] == 0
    assert split_into_chunks(table, num_chunks_for([table])).parts == [None]


def test_a_small_source_beside_a_large_one_is_in_the_first_volume_and_lies_in_no_empty_one() -> None:
    files = [f"{name}{ending}" for name in ("a", "b") for ending in (".jpg", ".txt")] + ["notes.md", "z.txt"]
    source_infos = [SourceInfo("few", 2, files), SourceInfo(None, 100), SourceInfo(None, 3)]
    number = num_chunks_for(source_infos, 10)
    assert number == 11  # of 105 pictures
    chunks_by_source = [split_into_chunks(source_info, number) for source_info in source_infos]
    for source_chunks in chunks_by_source:
        assert source_chunks.counts[0] > 0
        assert all(
            bool(found) == bool(count) for found, count in zip(source_chunks.found, source_chunks.counts, strict=True)
        )
    assert sum(chunks_by_source[0].found) == len(files)
    whole = merge_sources(chunks_by_source, (3, 1, 1))
    assert (sum(whole.found), sum(whole.counts), sum(whole.visits)) == (6 + 103, 105, 6 + 103)
    assert min(whole.counts) > 0
    assert whole.digest != merge_sources(chunks_by_source, (2, 1, 1)).digest
    assert num_chunks_for([SourceInfo(None, 2)] * 3, 1) == 2  # so that none is empty


def test_a_volume_is_a_folder_with_the_captions_and_repeats_that_it_has_in_the_whole(
    make_pictures: Callable[..., Path], tmp_path: Path
) -> None:
    make_pictures(tmp_path / "3_red disc", count=7)
    make_pictures(tmp_path / "2_disc", count=5, captions=True)
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "3_red disc/02.png", "text": "the second"}\n')
    whole = ImageFolder(tmp_path)
    dealt = dealt_folder(tmp_path, [*whole.ids, *(f"2_disc/0{n}.txt" for n in range(5)), "metadata.jsonl"], 4)
    chunks = [ImageFolder(tmp_path, part=part) for part in dealt.parts]
    told = {
        name: (text, n) for some in chunks for name, text, n in zip(some.ids, some.captions, some.repeats, strict=True)
    }
    assert told == dict(zip(whole.ids, zip(whole.captions, whole.repeats, strict=True), strict=True))
    assert [sum(some.repeats) for some in chunks] == list(dealt.visits)
    assert sum(some.ledger().found for some in chunks) == whole.ledger().found == 18


def test_a_volume_takes_no_folder_names_for_repeats_where_the_whole_does_not(
    make_pictures: Callable[..., Path], tmp_path: Path
) -> None:
    make_pictures(tmp_path / "3_discs", count=7)
    make_pictures(tmp_path, count=1)
    dealt = dealt_folder(tmp_path, ImageFolder(tmp_path).ids, 2)
    assert {n for part in dealt.parts for n in ImageFolder(tmp_path, part=part).repeats} == {1}


def test_metadata_that_names_no_picture_of_any_volume_is_told(
    make_pictures: Callable[..., Path], tmp_path: Path
) -> None:
    make_pictures(tmp_path, count=4)
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "99.png", "text": "none"}\n')
    with pytest.raises(DataError, match=r"99\.png does not exist"):
        dealt_folder(tmp_path, [f"0{n}.png" for n in range(4)] + ["metadata.jsonl"], 2)
