"""What the machine has left."""

from pathlib import Path

from finetune.page.machine import Machine, Meter, gpus_of


def test_memory_and_disk_are_shown(tmp_path: Path) -> None:
    meters = {meter.name: meter for meter in Machine(tmp_path).meters()}
    assert {"Memory", "Disk"} <= meters.keys()
    assert all(0 < meter.used < meter.total for meter in meters.values())
    assert "GB free" in meters["Disk"].text


def test_gpus_are_read_from_nvidia_smi() -> None:
    printed = "NVIDIA GeForce RTX 3060, 2048, 12288, 97, 71\nNVIDIA Thor, [N/A], [N/A], 3, 40\n"
    printed += "A100, 1024, 40960, [N/A], [N/A]\n"
    assert gpus_of(printed) == [
        Meter("NVIDIA GeForce RTX 3060", 2.147483648, 12.884901888, "97 % busy, 71 °C"),
        Meter("A100", 1.073741824, 42.94967296, ""),
    ]
    assert gpus_of("NVIDIA-SMI has failed because it couldn't communicate with the driver") == []
