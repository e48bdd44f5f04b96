"""The numeric environment: what determines the bits of a computation, apart from weights and inputs."""

import platform
from importlib.metadata import version

import torch


def device_name(device: torch.device) -> str:
    """The processor: a GPU by its model, a CPU by its instruction set."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({platform.machine()}, {torch.backends.cpu.get_cpu_capability()})"


def numeric_environment(device: torch.device) -> str:
    """Processor, number of threads or TF32, and library versions: with another one the last bits may be others.

    A GPU's sums may differ from run to run all the same, unless torch is held to deterministic algorithms.
    """
    backends = torch.backends
    if device.type == "cuda":
        how = f"tf32 {backends.cuda.matmul.allow_tf32} {backends.cudnn.allow_tf32}"
        how += f" deterministic {torch.are_deterministic_algorithms_enabled()}"
    else:
        how = f"{torch.get_num_threads()} threads"
    libraries = " ".join(f"{name} {version(name)}" for name in ("torch", "diffusers", "transformers"))
    return f"{device_name(device)}, {how}, {libraries}"
