"""A pool of processes for work that may hang, crash, or eat all memory: what overruns is killed and replaced.

What the work is belongs to the callers; nothing here knows rewards. Standard library only: a worker starts in the time
that its own imports take.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib
import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time
import traceback
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from typing import Any

from edge_grpo.types import FailureKind

# For a worker to start: long, since a factory may read a model from a slow disk.
START_SECONDS = 600.0
_END_SECONDS = 2.0  # for idle workers to exit by themselves, with their atexit functions
_PROGRAM = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from edge_grpo.grading.workers import _serve; _serve()"
)


@dataclass(frozen=True)
class Failure:
    """Why a call has no result, and the details: an exception with its traceback, or an exit status."""

    kind: FailureKind
    message: str


class WorkerPool:
    """Calls one function many times in up to ``size`` processes, each call within ``timeout`` seconds.

    ``factory`` names the function that makes the function, ``package.module:name``; every process calls it once, with
    ``arguments``, before its first call, and that does not count against a deadline. Arguments and results are pickled.

    A call that overruns its deadline is ended by killing its process and every process that this one has started; a new
    one takes its place. ``memory_limit`` is the address space that a process may have, in bytes (None: no limit).

    Processes are new interpreters: nothing is forked, whatever threads there are, the caller's main module is not
    imported again (as multiprocessing's spawn would), and a daemonic process may have them. They start when first
    needed and live until ``close``, or the caller's end, however it comes. A pool may be used from any thread; calls
    from several wait for each other.
    """

    def __init__(
        self,
        factory: str,
        arguments: tuple[Any, ...] = (),
        *,
        timeout: float,
        size: int = 1,
        memory_limit: int | None = None,
    ) -> None:
        self.factory = factory
        self.arguments = arguments
        self.timeout = timeout
        self.size = size
        self.memory_limit = memory_limit
        self._workers: list[_Worker] = []
        self._lock = threading.Lock()
        self._owner = os.getpid()
        self._finalizer = weakref.finalize(self, _end, self._workers, self._owner)

    def start(self) -> None:
        """Start a process now, so that what its factory raises is raised here and not in the first ``map``."""
        self._run(deque(), [], at_least=1)

    def map(self, calls: Sequence[tuple[Any, ...]]) -> list[Any]:
        """Return what the function returns for each tuple of arguments, in order; a ``Failure`` where it does not.

        Raises what the factory raised, and RuntimeError for a process that ends or hangs before the factory is done.
        """
        results: list[Any] = [None] * len(calls)
        self._run(deque(enumerate(calls)), results)
        return results

    def close(self) -> None:
        """End all processes. The pool may be used again and then starts new ones."""
        with self._lock:
            _end(self._workers, self._owner)

    def _run(self, waiting: deque[tuple[int, tuple[Any, ...]]], results: list[Any], at_least: int = 0) -> None:
        with self._lock:
            if os.getpid() != self._owner:
                raise RuntimeError(
                    "a WorkerPool cannot be shared with a forked process, where both would read each other's results; "
                    "make the pool after the fork"
                )
            try:
                self._hand_out(waiting, at_least)
                while busy := [worker for worker in self._workers if worker.is_busy]:
                    next_deadline = min(worker.deadline for worker in busy)
                    ready = wait([worker.connection for worker in busy], max(0.0, next_deadline - time.monotonic()))
                    for worker in busy:
                        if worker.connection in ready:
                            self._receive(worker, results)
                        elif time.monotonic() >= worker.deadline and not worker.connection.poll():
                            self._give_up(worker, results)
                    self._hand_out(waiting)
            except BaseException:  # Ctrl-C, or a factory's own: no result may be left for a later call to read
                for worker in [worker for worker in self._workers if worker.is_busy]:
                    self._remove(worker)
                raise

    def _hand_out(self, waiting: deque[tuple[int, tuple[Any, ...]]], at_least: int = 0) -> None:
        """Give every idle worker a call, and start workers for the calls that remain."""
        for worker in [worker for worker in self._workers if not worker.is_busy]:
            if waiting:
                index, arguments = waiting.popleft()
                try:
                    worker.send(index, arguments, self.timeout)
                except OSError:  # it died while it was idle
                    waiting.appendleft((index, arguments))
                    self._remove(worker)
        starting = sum(worker.is_starting for worker in self._workers)
        for _ in range(
            min(self.size - len(self._workers), max(len(waiting) - starting, at_least - len(self._workers)))
        ):
            worker = _Worker(self.memory_limit)
            self._workers.append(worker)
            with contextlib.suppress(OSError):  # it has ended already, which _receive reads from its connection
                worker.send(None, (self.factory, self.arguments), START_SECONDS)

    def _receive(self, worker: _Worker, results: list[Any]) -> None:
        index = worker.call
        try:
            result = worker.connection.recv()
        except (EOFError, OSError):
            status = self._remove(worker)
            result = Failure("died", _describe_status(status))
            if index is None:
                raise RuntimeError(f"a process for {self.factory} could not start: {result.message}") from None
        else:
            worker.is_busy = worker.is_starting = False
        if index is not None:
            results[index] = result
            if isinstance(result, Failure) and result.kind == "out_of_memory":
                self._remove(worker)
        elif result is not None:
            self._remove(worker)
            raise result

    def _give_up(self, worker: _Worker, results: list[Any]) -> None:
        self._remove(worker)
        if worker.call is None:
            raise RuntimeError(f"a process for {self.factory} was not ready after {START_SECONDS:g} s")
        results[worker.call] = Failure("timed_out", f"no result after {self.timeout:g} s")

    def _remove(self, worker: _Worker) -> int:
        self._workers.remove(worker)
        return worker.kill()


class _Worker:
    """A process and the connection to it. Its standard input is a pipe whose only writing end is ours."""

    def __init__(self, memory_limit: int | None) -> None:
        self.connection, theirs = Pipe()
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-c", _PROGRAM, json.dumps(sys.path), str(theirs.fileno()), str(memory_limit or 0)],
                stdin=subprocess.PIPE,
                stdout=2,  # standard output may be a command's result
                pass_fds=[theirs.fileno()],
                start_new_session=True,
                env=os.environ | {"PYTHONHASHSEED": "0"},  # the order of a set must not decide a comparison
            )
        self.call: int | None = None  # which of the calls it works on; None while it starts
        self.deadline = 0.0
        self.is_busy = False
        self.is_starting = True

    def send(self, call: int | None, message: Any, seconds: float) -> None:
        self.call, self.deadline, self.is_busy = call, time.monotonic() + seconds, True
        self.connection.send(message)

    def kill(self) -> int:
        """Kill the process and what it has started, and return its exit status."""
        self.connection.close()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        status = self.process.wait()
        assert self.process.stdin is not None
        self.process.stdin.close()
        return status


def _end(workers: list[_Worker], owner: int) -> None:
    if os.getpid() != owner:
        return  # a forked child does not own its parent's processes
    idle = [worker for worker in workers if not worker.is_busy]
    for worker in idle:
        worker.connection.close()  # at which it leaves
    deadline = time.monotonic() + _END_SECONDS
    for worker in idle:
        with contextlib.suppress(subprocess.TimeoutExpired):
            worker.process.wait(max(0.0, deadline - time.monotonic()))
    for worker in workers:
        worker.kill()
    workers.clear()


def _describe_status(status: int) -> str:
    if status >= 0:
        return f"its process ended with status {status}"
    try:
        return f"its process was ended by {signal.Signals(-status).name}"
    except ValueError:
        return f"its process was ended by signal {-status}"


# ---- In the worker -------------------------------------------------------------------------------------------------


def resolve(path: str) -> Any:
    """The object that ``package.module:name`` names; raises ImportError or AttributeError."""
    module, _, name = path.partition(":")
    found: Any = importlib.import_module(module)
    for part in name.split("."):
        found = getattr(found, part)
    return found


def _serve() -> None:
    """A worker's whole life: the factory's name comes first, then the arguments of call after call."""
    descriptor, memory_limit = map(int, sys.argv[2:])
    _die_with_the_caller()
    if memory_limit:
        most = resource.getrlimit(resource.RLIMIT_AS)[1]
        limit = memory_limit if most == resource.RLIM_INFINITY else min(memory_limit, most)
        resource.setrlimit(resource.RLIMIT_AS, (limit, most))
    connection = Connection(descriptor)
    factory, arguments = connection.recv()
    try:
        function: Callable[..., Any] = resolve(factory)(*arguments)
    except Exception as error:
        connection.send(error)
        return
    connection.send(None)
    while True:
        try:
            arguments = connection.recv()
        except EOFError:
            return
        try:
            connection.send(function(*arguments))
        except MemoryError:
            connection.send(Failure("out_of_memory", "no memory within its limit"))
            return  # what else could not be allocated is unknown
        except BaseException:  # SystemExit too: a function does not end its process by raising
            connection.send(Failure("raised", traceback.format_exc()))


def _die_with_the_caller() -> None:
    """Have this process and its children killed when standard input closes, as it does when the caller ends.

    On Linux the kernel does it, whatever this process is doing; elsewhere a thread watches, which has to wait for an
    operation that holds the interpreter.
    """
    try:
        fcntl.fcntl(0, fcntl.F_SETSIG, signal.SIGKILL)
        fcntl.fcntl(0, fcntl.F_SETOWN, -os.getpgrp())
        fcntl.fcntl(0, fcntl.F_SETFL, fcntl.fcntl(0, fcntl.F_GETFL) | os.O_ASYNC)
    except (AttributeError, OSError):

        def watch() -> None:
            os.read(0, 1)
            os.killpg(0, signal.SIGKILL)

        threading.Thread(target=watch, daemon=True).start()
