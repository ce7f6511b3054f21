"""Several real processes for a test: forked from one that has imported the libraries, joined by gloo."""

import multiprocessing
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(
    ["pytorch_lightning", "zo_lightning.modules", "zo_lightning.callbacks", "zo_lightning.data"]
)


def together(folder: Path, size: int, task: Callable[..., Any], *args: Any, timeout: float = 300) -> list[Any]:
    """What ``task(rank, *args)`` gives in each of ``size`` processes; None of one that was killed.

    They are in the environment that Lightning's and ``torchrun``'s launchers make, so that a ``Trainer``, a ``Fabric``
    or ``init_process_group("gloo")`` joins them.
    """
    folder.mkdir(exist_ok=True)
    port = free_port()
    ranks = [_SERVER.Process(target=_run, args=(rank, size, port, folder, task, args)) for rank in range(size)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(timeout)
    late = [process for process in ranks if process.is_alive()]
    for process in late:
        process.kill()
    assert not late, f"{len(late)} of {size} processes did not end within {timeout} s"
    files = [folder / f"{rank}.result" for rank in range(size)]
    return [torch.load(file, weights_only=False) if file.exists() else None for file in files]


def free_port() -> int:
    """A port of this machine that nobody listens at."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def _run(rank: int, size: int, port: int, folder: Path, task: Callable[..., Any], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": size, "RANK": rank}
    environment |= {"LOCAL_RANK": rank, "NODE_RANK": 0}
    os.environ.update({name: str(value) for name, value in environment.items()})
    os.chdir(folder)
    file = folder / f"{rank}.result"
    torch.save(task(rank, *args), file.with_suffix(".part"))
    file.with_suffix(".part").rename(file)
    os._exit(0)  # a group that has lost a member cannot be closed
