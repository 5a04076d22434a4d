"""Work in forked processes of one group, of a program that has imported everything and begun nothing else.

Programs of their own, because what pytest's process has done before (threads, accelerate's state) is not to be
inherited.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from accelerate.state import AcceleratorState, PartialState


def run_program(name: str, *arguments: str | Path, fails: bool = False) -> str:
    """Run a program that lies beside this file and return what it wrote to stderr; it must succeed, or fail."""
    result = subprocess.run(
        [sys.executable, str(Path(__file__).with_name(name)), *map(str, arguments)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert (result.returncode != 0) == fails, result.stderr[-6000:]
    return result.stderr


def alone(work: Callable[[], Any], path: Path) -> Any:
    """What ``work`` returns in a process of its own. This one does nothing but fork: what it began might hang later."""
    together(1, lambda: torch.save(work(), path))
    return torch.load(path, weights_only=False)


def together(
    processes: int, work: Callable[[], object], *, kill_when: Callable[[], bool] | None = None, seconds: float = 240
) -> None:
    """Run ``work`` in forked processes of one group. With ``kill_when`` they get SIGKILL as soon as it holds.

    One that fails, or takes more than ``seconds``, ends all.
    """
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]

    def run(rank: int) -> None:
        # Loading a model takes threads, and those race for the thread pool that torch makes anew after a fork.
        torch.set_num_threads(1)
        if processes > 1:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1"}
            os.environ |= {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes), "MASTER_PORT": str(port)}
        AcceleratorState._reset_state(reset_partial_state=True)
        PartialState(cpu=True)
        work()
        if dist.is_initialized():
            dist.destroy_process_group()

    started = [mp.get_context("fork").Process(target=run, args=(rank,)) for rank in range(processes)]
    for process in started:
        process.start()
    deadline = time.monotonic() + seconds
    while any(process.is_alive() for process in started):
        failed = [process.exitcode for process in started if process.exitcode]
        killed = kill_when is not None and kill_when()
        if failed or killed or time.monotonic() > deadline:
            for process in started:
                process.kill()
                process.join()
            if killed and not failed:
                return
            raise SystemExit(f"a process failed or hung; exit codes {[process.exitcode for process in started]}")
        time.sleep(0.02)
    if failed := [process.exitcode for process in started if process.exitcode]:  # since it was last looked at
        raise SystemExit(f"processes failed; exit codes {failed}")
    assert kill_when is None, "the run ended before it was to be killed"
