"""Several processes that train together, as accelerate or torchrun would launch them, and started in a moment."""

import multiprocessing
import os
import socket
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import torch
from accelerate import PartialState

_SERVER = multiprocessing.get_context(
    "forkserver"
)  # has imported, and computed nothing: its children may start threads
_SERVER.set_forkserver_preload(["finetune.recipe", "finetune.results.sampling"])


def together(function: Callable[..., Any], *arguments: Any, world: int = 2) -> list[Any]:
    """What the function answers in each of `world` connected processes, or the error that it raised there."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with ProcessPoolExecutor(world, mp_context=_SERVER) as pool:
        running = [pool.submit(_in_rank, rank, world, port, function, arguments) for rank in range(world)]
        return [future.exception() or future.result() for future in running]


def _in_rank(rank: int, world: int, port: int, function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "MASTER_PORT": port}
    os.environ |= {name: str(number) for name, number in places.items()} | {"MASTER_ADDR": "127.0.0.1"}
    os.environ |= {"ACCELERATE_USE_CPU": "true", "TQDM_DISABLE": "1"}
    torch.set_num_threads(1)
    PartialState()
    try:
        return function(*arguments)
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()  # as the end of a process does, which the others notice
