"""What the tests of ``edge_grpo.grading.workers`` have done in other processes: every way to misbehave."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def tasks(**unused: Any) -> Callable[..., Any]:
    return do


def do(what: str, *arguments: Any) -> Any:
    return globals()[f"_{what}"](*arguments)


def broken() -> Callable[..., Any]:
    raise ValueError("no such model")


def exits_at_once() -> Callable[..., Any]:
    os._exit(3)


def _square(number: int) -> int:
    return number * number


def _pid() -> int:
    return os.getpid()


def _sleep(seconds: float) -> str:
    time.sleep(seconds)
    return "slept"


def _swallow() -> None:
    """Hangs whatever signals and exceptions come, but one."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGALRM):
        signal.signal(number, signal.SIG_IGN)
    while True:
        try:
            time.sleep(100)
        except BaseException:
            continue


def _hold_the_interpreter() -> int:
    return len(str(7 ** (7**12)))  # one operation: neither threads nor Python's signal handlers run meanwhile


def _with_a_child(path: str) -> None:
    """Hangs with a process of its own, as a function does that runs a program to test it."""
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"])
    Path(path).write_text(str(child.pid))
    time.sleep(1000)


def _allocate(size: int) -> int:
    return len(bytearray(size))


def _raise() -> None:
    raise LookupError("deep inside")


def _leave() -> None:
    sys.exit(5)


def _crash() -> None:
    os.kill(os.getpid(), signal.SIGSEGV)


def _unpicklable() -> Any:
    return lambda: None


def _loaded() -> list[str]:
    """What is heavy, and the caller's main module, if they are here."""
    main = getattr(sys.modules["__main__"], "__file__", None)
    return [name for name in ("torch", "numpy", "transformers") if name in sys.modules] + ([main] if main else [])
