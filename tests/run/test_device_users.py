"""Which processes train on which device."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from finetune.run.device_users import DeviceUser, device_name, device_users, using_device


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_a_process_is_seen_until_it_ends(tmp_path: Path) -> None:
    assert device_users() == []
    with using_device("cuda:1", tmp_path / "run"):
        assert device_users() == [DeviceUser("cuda:1", os.getpid(), str(tmp_path / "run"))]
    assert device_users() == []


def test_a_process_that_was_killed_is_not_seen(tmp_path: Path) -> None:
    code = "import time\nfrom finetune.run.device_users import using_device\nfrom pathlib import Path\n"
    code += "with using_device('cpu', Path('run')):\n    print('in', flush=True)\n    time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        process.stdout.readline()
        assert [user.pid for user in device_users()] == [process.pid]
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert device_users() == []
    assert list((tmp_path / "cache/finetune-unet/devices").iterdir()) == []


def test_a_cache_that_cannot_be_written_stops_no_run(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("")
    with using_device("cpu", tmp_path):
        assert device_users() == []


@pytest.mark.parametrize(
    ("visible", "index", "expected"),
    [
        ("", None, "cuda:0"),
        ("", 1, "cuda:1"),
        ("3", None, "cuda:3"),
        ("2, GPU-8a", 1, "cuda:GPU-8a"),
        ("2", 5, "cuda:5"),
    ],
)
def test_a_gpu_has_the_name_that_the_machine_gives_it(
    monkeypatch: pytest.MonkeyPatch, visible: str, index: int | None, expected: str
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert device_name("cuda", index) == expected
    assert device_name("cpu", None) == "cpu"
