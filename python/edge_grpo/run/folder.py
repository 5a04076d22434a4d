"""Who may write into a run's folder: one run at a time, and a new one only where no other would be lost.

What is written there is ``log``'s and ``checkpoint``'s.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

RUN_FILES = (
    "config.yaml",
    "identity.json",
    "metrics.jsonl",
    "completions.jsonl",
    "checkpoints",
    "final",
    "report.html",
)
_LOCK = ".lock"
_REPLACED = ".replaced"


def is_main_process() -> bool:
    """Return whether this is the process of a run that writes; known before the processes have met."""
    return int(os.environ.get("RANK", "0")) == 0


@contextlib.contextmanager
def claim(output: Path, *, resume: bool = False, overwrite: bool = False) -> Iterator[None]:
    """Hold a run's folder: until the block or this process ends, no other run can.

    The processes of one run share the claim of the main one. Raises FileExistsError, and leaves everything as it is,
    for a folder that another process holds, and for one with an earlier run unless this one is to ``resume`` or
    ``overwrite`` it; ValueError where a file of that run is a link. Overwriting itself is left to ``discard``, once the
    new run has loaded.
    """
    if not is_main_process():
        yield
        return
    if output.exists() and not output.is_dir():
        raise FileExistsError(f"output must be a folder; {output} is a file")
    is_new = not output.exists()
    try:
        output.mkdir(parents=True, exist_ok=True)
        lock = _lock(output)
    except OSError as error:
        if isinstance(error, FileExistsError):
            raise
        raise ValueError(f"output: {output} cannot be written to: {error.strerror}") from error
    try:
        if _present(output) and not (resume or overwrite):
            raise FileExistsError(
                f"{output} already holds a run; continue it with --resume, replace it with --overwrite, or choose "
                "another folder with --output"
            )
        if links := [name for name in RUN_FILES if "." in name and (output / name).is_symlink()]:
            raise ValueError(
                f"{output}: {', '.join(links)} is a link, through which a run would write elsewhere; replace it by the "
                "file itself"
            )
        yield
    finally:
        (output / _LOCK).unlink(
            missing_ok=True
        )  # before it is released: whoever has opened it looks whether it is gone
        os.close(lock)
        if is_new:
            with contextlib.suppress(OSError):  # the run has begun
                output.rmdir()


def discard(output: Path) -> None:
    """Remove the files of an earlier run, and nothing else: all are renamed away before the first one is deleted."""
    replaced = output / _REPLACED
    shutil.rmtree(replaced, ignore_errors=True)
    if present := _present(output):
        replaced.mkdir()
        for path in present:
            os.replace(path, replaced / path.name)
        shutil.rmtree(replaced)


def _present(output: Path) -> list[Path]:
    return [output / name for name in RUN_FILES if os.path.lexists(output / name)]


def _lock(output: Path) -> int:
    """Lock the folder and return the lock's file descriptor, which no program started from here inherits."""
    path = output / _LOCK
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.read(descriptor, 300).decode(errors="replace").strip() or "another process"
            os.close(descriptor)
            raise FileExistsError(
                f"{output} is in use by {owner}; wait for its end, stop it, or choose another folder with --output"
            ) from None
        except OSError as error:
            print(
                f"{output}: its file system has no locks ({error.strerror}); start no second run in it", file=sys.stderr
            )
            return descriptor
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), path.stat()):
                break
        os.close(descriptor)  # its owner has removed it since it was opened
    os.ftruncate(descriptor, 0)
    os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
    return descriptor
