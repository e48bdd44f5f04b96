import errno
import fcntl
import os
import random
import signal
import stat
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest
import torch
from torch import Tensor

from finetune.cache.disk import SHARDS, DiskStore
from finetune.cache.maintenance import contents, prune, verify
from finetune.errors import DataError, RunError, UsageError


def item(number: int) -> dict[str, Tensor]:
    return {"stored": torch.full((8, 4, 4), number / 7), "more": torch.tensor([number, 2**40])}


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) and a[name].dtype == b[name].dtype for name in a)


def shards(folder: Path) -> list[Path]:
    return sorted((folder / SHARDS).iterdir())


def flip_a_bit(file: Path, at: int) -> None:
    content = bytearray(file.read_bytes())
    content[at] ^= 1
    file.write_bytes(content)


def test_items_come_back_to_the_bit_in_another_process_of_the_index(tmp_path: Path) -> None:
    store = DiskStore(tmp_path)
    halves = {"half": torch.randn(3, 5, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)}
    store.put("picture", {"a": item(1), "b": item(2)})
    store.put("caption", {"c": halves})
    again = DiskStore(tmp_path)
    assert again.missing(["z", "b", "a", "z", "c"]) == ["z"]
    assert [equal(*pair) for pair in zip(again.load(["c", "a", "b"]), [halves, item(1), item(2)], strict=True)] == [
        True
    ] * 3
    assert contents(again)[:2] == ({"picture": 2, "caption": 1}, 2)


def test_more_keys_than_a_query_holds(tmp_path: Path) -> None:
    store = DiskStore(tmp_path)
    store.put("picture", {f"key {number}": item(number) for number in range(1200)})
    keys = [f"key {number}" for number in range(1300)]
    assert store.missing(keys) == keys[1200:]
    assert equal(store.load(keys[:1200])[1100], item(1100))


def test_what_one_process_computes_no_other_does_while_it_lives(tmp_path: Path) -> None:
    one, other = DiskStore(tmp_path), DiskStore(tmp_path)
    assert one.claim(["a", "b"]) == ["a", "b"]
    assert other.claim(["a", "b", "c"]) == ["c"]
    one.put("picture", {"a": item(1)})
    one.close()
    assert other.claim(["a", "b"]) == ["b"]


def test_an_item_that_is_there_is_not_replaced(tmp_path: Path) -> None:
    store = DiskStore(tmp_path)
    store.put("picture", {"a": item(1)})
    store.put("picture", {"a": item(2), "b": item(3)})
    assert equal(store.load(["a"])[0], item(1))


def test_a_flipped_bit_is_never_loaded_and_verify_takes_it_out(tmp_path: Path) -> None:
    store = DiskStore(tmp_path)
    store.put("picture", {"a": item(1), "b": item(2)})
    (shard,) = shards(tmp_path)
    flip_a_bit(shard, shard.stat().st_size - 5)
    again = DiskStore(tmp_path)
    damaged = [key for key in "ab" if not _loads(again, key)]
    assert len(damaged) == 1
    with pytest.raises(DataError, match="finetune-unet cache verify"):
        again.load(damaged)
    assert verify(again) == (1, damaged)
    assert again.missing(["a", "b"]) == damaged


def _loads(store: DiskStore, key: str) -> bool:
    try:
        store.load([key])
    except DataError:
        return False
    return True


@pytest.mark.parametrize("harm", ["cut short", "deleted"])
def test_a_shard_cut_short_or_gone_is_found(tmp_path: Path, harm: str) -> None:
    store = DiskStore(tmp_path)
    store.put("picture", {"a": item(1)})
    (shard,) = shards(tmp_path)
    shard.write_bytes(shard.read_bytes()[:-10]) if harm == "cut short" else shard.unlink()
    again = DiskStore(tmp_path)
    assert verify(again) == (0, ["a"])
    assert again.missing(["a"]) == ["a"]


SCRIPT = """
import sys, time
from pathlib import Path
import torch
from finetune.cache import buffered_store
from finetune.cache.disk import DiskStore
from finetune.cache.encode_loop import EncodeJob, encode_missing

buffered_store.SHARD_SECONDS = 0.05
store = buffered_store.BufferedStore(DiskStore(Path(sys.argv[1])))
keys = [f"key {number}" for number in range(int(sys.argv[2]))]

def compute(keys, prepared):
    time.sleep(0.01)
    print(*keys, flush=True)
    return [{"stored": torch.full((4,), float(number))} for number in prepared]

def number(key):
    return int(key.split()[1])

network = torch.nn.Identity()
work = EncodeJob(
    kind="picture", keys=keys, keys_of=lambda index, _: [keys[index]], prepare=number, compute=compute,
    batch_size=lambda _: 1, network=network,
)
print(encode_missing(store, work))
store.close()
"""


def start(folder: Path, count: int) -> subprocess.Popen:
    command = [sys.executable, "-c", SCRIPT, str(folder), str(count)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


def test_two_processes_share_the_work_and_one_that_is_killed_leaves_it_to_the_other(tmp_path: Path) -> None:
    count = 300
    doomed, other = start(tmp_path, count), start(tmp_path, count)
    assert doomed.stdout
    for _ in range(40):
        doomed.stdout.readline()
    doomed.send_signal(signal.SIGKILL)
    doomed.wait()
    output, _ = other.communicate(timeout=120)
    assert other.returncode == 0
    store = DiskStore(tmp_path)
    keys = [f"key {number}" for number in range(count)]
    assert store.missing(keys) == []
    assert [found["stored"][0].item() for found in store.load(keys)] == list(range(count))
    computed = [line for line in output.splitlines() if line.startswith("key")]
    assert len(computed) == len(set(computed)) < count  # the other did not repeat what the first had kept
    assert contents(store).items == {"picture": count}
    prune(store, unused_days=1000, max_bytes=None)
    assert {file.suffix for file in shards(tmp_path)} == {".safetensors"}
    assert store.missing(keys) == []


def test_a_full_disk_is_told_and_leaves_no_torn_shard(tmp_path: Path) -> None:
    script = textwrap.dedent("""
        import resource, sys, torch
        from pathlib import Path
        from finetune.cache.disk import DiskStore
        from finetune.errors import RunError
        store = DiskStore(Path(sys.argv[1]))
        store.put("picture", {"a": {"stored": torch.zeros(10)}})
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
        try:
            store.put("picture", {"b": {"stored": torch.zeros(50_000)}})
        except RunError as error:
            print(error)
    """)
    on_progress = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True)
    assert "File too large" in on_progress.stdout
    assert "what was encoded before is kept" in on_progress.stdout
    store = DiskStore(tmp_path)
    assert store.missing(["a", "b"]) == ["b"]
    assert len(shards(tmp_path)) == 1


def test_pruning_takes_what_was_used_least_lately_until_the_rest_fits(tmp_path: Path) -> None:
    store = DiskStore(tmp_path)
    for number, key in enumerate("abc"):
        store.put("picture", {key: item(number)})
    with store.locked():
        store.base.execute("UPDATE shards SET used = used - 40")
    store.mark_used(["b"])
    size = shards(tmp_path)[0].stat().st_size
    assert prune(store, unused_days=None, max_bytes=2.5 * size) == size
    assert store.missing(["a", "b", "c"]) == ["a"]  # of two used equally long ago, the older shard
    assert prune(store, unused_days=30, max_bytes=None) == size
    assert store.missing(["a", "b", "c"]) == ["a", "c"]
    assert prune(store, unused_days=0, max_bytes=None) == size
    assert shards(tmp_path) == []


def test_a_folder_of_a_later_version_is_left_alone(tmp_path: Path) -> None:
    store = DiskStore(tmp_path)
    store.base.execute("PRAGMA user_version = 7")
    with pytest.raises(UsageError, match="written by another version"):
        DiskStore(tmp_path)


def test_what_is_no_cache_folder_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match=r"cache_dir .*file"):
        DiskStore(tmp_path / "file")
    store = DiskStore(tmp_path / "gone")
    (tmp_path / "gone").rename(tmp_path / "elsewhere")
    with pytest.raises(RunError, match="what was encoded before is kept"):
        store.put("picture", {"a": item(1)})


def test_a_folder_that_cannot_be_written_is_read_from(tmp_path: Path) -> None:
    script = textwrap.dedent("""
        import os, sys, tempfile, torch
        from pathlib import Path
        from finetune.cache.lazy_encoder import LazyEncoder
        from finetune.cache.disk import DiskStore
        from finetune.cache.encode_loop import EncodeJob
        from finetune.cache.buffered_store import BufferedStore
        from finetune.errors import UsageError
        folder = Path(tempfile.mkdtemp())
        store = DiskStore(folder)
        store.put("picture", {"a": {"stored": torch.arange(3.0)}})
        store.close()
        for path in [*folder.rglob("*"), folder]:
            path.chmod(0o555 if path.is_dir() else 0o444)
        if os.getuid() == 0:
            os.setuid(65534)
        store = DiskStore(folder)
        print(store.load(["a"])[0]["stored"].tolist(), store.missing(["a", "b"]))
        store.mark_used(["a"])
        on_demand = EncodeJob(
            kind="picture", keys=["b"], keys_of=lambda *_: ["b"], prepare=str, compute=lambda *_: [],
            batch_size=lambda _: 1, network=torch.nn.Identity(),  # pyright: ignore[reportArgumentType]
        )  # fmt: skip
        for write in (lambda: store.claim(["b"]), lambda: LazyEncoder(BufferedStore(store), on_demand)):
            try:
                write()
            except UsageError as error:
                print(error)
    """)
    on_progress = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert on_progress.stdout.splitlines()[0] == "[0.0, 1.0, 2.0] ['b']", on_progress.stderr
    assert ["cannot be written" in line for line in on_progress.stdout.splitlines()[1:]] == [True, True]


def test_two_threads_read_more_shards_than_are_kept_open(tmp_path: Path) -> None:
    store, numbers = DiskStore(tmp_path), range(150)
    for number in numbers:
        store.put("picture", {str(number): item(number)})
    wrong: list[str] = []

    def read(seed: int) -> None:
        source = random.Random(seed)
        for number in source.choices(numbers, k=3000):
            try:
                (found,) = store.load([str(number)])
            except DataError as error:
                wrong.append(str(error))
                continue
            if not torch.equal(found["stored"], item(number)["stored"]):
                wrong.append(f"{number} is another item")

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(2)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert not wrong
    assert len(store._files) <= 64


def test_a_store_closes_its_shards_when_it_is_dropped(tmp_path: Path) -> None:
    store = DiskStore(tmp_path)
    store.put("picture", {"a": item(1)})
    store.load(["a"])
    (file,) = store._files.values()
    descriptor = file.descriptor
    del store, file
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)


def test_a_file_system_without_locks_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    store = DiskStore(tmp_path)
    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(UsageError, match=r"cache_dir .*: its file system cannot lock files .*; give a --cache_dir on"):
        store.put("picture", {"a": item(1)})


def test_a_file_system_without_fsync_of_folders_is_used_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = os.fsync

    def of_files_alone(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        plain(descriptor)

    monkeypatch.setattr(os, "fsync", of_files_alone)
    DiskStore(tmp_path).put("picture", {"a": item(1)})
    assert equal(DiskStore(tmp_path).load(["a"])[0], item(1))
