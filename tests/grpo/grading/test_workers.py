"""Killable workers: whatever a call does, the others' results come, in order, and no process stays behind.

Hanging is cut off after half a second where the deadline is what is tested; elsewhere the deadline is far away, so that
a busy machine changes nothing.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from edge_grpo.grading.workers import _PROGRAM, Failure, WorkerPool

FAR, NEAR = 60.0, 0.5


@pytest.fixture
def make() -> Iterator[Callable[..., WorkerPool]]:
    pools: list[WorkerPool] = []

    def make(timeout: float = FAR, factory: str = "worker_tasks:tasks", **settings: object) -> WorkerPool:
        pools.append(WorkerPool(factory, timeout=timeout, **settings))  # type: ignore[arg-type]
        return pools[-1]

    yield make
    for pool in pools:
        pool.close()


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until(condition: Callable[[], bool], seconds: float = 30.0) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    return condition()


def kinds(results: list[object]) -> list[object]:
    return [result.kind if isinstance(result, Failure) else result for result in results]


@pytest.mark.parametrize("size", [1, 3])
def test_results_are_in_order_whoever_made_them(make, size):
    pool = make(size=size)
    calls = [("sleep", 0.05), *(("square", n) for n in range(20))]
    assert pool.map(calls) == ["slept", *(n * n for n in range(20))]
    assert pool.map([]) == []


@pytest.mark.parametrize("what", ["swallow", "hold_the_interpreter"])
def test_what_overruns_is_killed_and_replaced(make, what):
    pool = make(NEAR)
    assert kinds(pool.map([("square", 2), (what,), ("square", 3)])) == [4, "timed_out", 9]


def test_every_other_end_is_a_failure_too(make):
    pool = make(memory_limit=1 << 30)
    calls = [("raise",), ("leave",), ("crash",), ("unpicklable",), ("allocate", 2 << 30), ("square", 4)]
    results = pool.map(calls)
    assert kinds(results) == ["raised", "raised", "died", "raised", "out_of_memory", 16]
    assert 'in _raise\n    raise LookupError("deep inside")' in results[0].message
    assert "SystemExit: 5" in results[1].message
    assert results[2].message == "its process was ended by SIGSEGV"


def test_a_process_that_died_between_calls_is_replaced(make):
    pool = make()
    [pid] = pool.map([("pid",)])
    os.kill(pid, signal.SIGKILL)
    assert wait_until(lambda: not is_running(pid))
    [other] = pool.map([("pid",)])
    assert other != pid


def test_processes_stay_between_calls_and_no_more_start_than_there_is_work(make):
    pool = make(size=2)
    pids = {pid for _ in range(3) for pid in pool.map([("pid",)])}
    assert len(pids) == 1


def test_what_hangs_takes_its_children_along(make, tmp_path):
    file = tmp_path / "pid"
    assert kinds(make(3.0).map([("with_a_child", str(file))])) == ["timed_out"]
    assert wait_until(lambda: not is_running(int(file.read_text())))


def test_a_factory_that_fails_says_why(make):
    with pytest.raises(ValueError, match="no such model"):
        make(factory="worker_tasks:broken").start()
    with pytest.raises(ModuleNotFoundError, match="no_such_module"):
        make(factory="no_such_module:f").map([()])
    with pytest.raises(
        RuntimeError, match="worker_tasks:exits_at_once could not start: its process ended with status 3"
    ):
        make(factory="worker_tasks:exits_at_once").start()


def test_a_process_that_ends_before_it_is_spoken_to_says_why(make, monkeypatch):
    """The order that is rare: its end comes first, so that sending it the factory fails."""

    class Ended(subprocess.Popen):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            self.wait()

    monkeypatch.setattr("edge_grpo.grading.workers._PROGRAM", "raise SystemExit(3)")
    monkeypatch.setattr("edge_grpo.grading.workers.subprocess.Popen", Ended)
    for use in (WorkerPool.start, lambda pool: pool.map([("square", 1)])):
        with pytest.raises(RuntimeError, match="could not start: its process ended with status 3"):
            use(make())


def test_starting_does_not_count_against_the_deadline(make, monkeypatch):
    monkeypatch.setattr("edge_grpo.grading.workers._PROGRAM", f"import time; time.sleep(1.0); {_PROGRAM}")
    assert make(0.9).map([("square", 5)]) == [25]


def test_a_process_that_never_comes_up_is_an_error(make, monkeypatch):
    monkeypatch.setattr("edge_grpo.grading.workers._PROGRAM", "import time; time.sleep(100)")
    monkeypatch.setattr("edge_grpo.grading.workers.START_SECONDS", 0.3)
    with pytest.raises(RuntimeError, match=r"was not ready after 0\.3 s"):
        make().start()


def test_workers_import_only_what_they_need(make):
    assert make().map([("loaded",)]) == [[]]


def test_threads_share_a_pool(make):
    pool = make(size=2)
    found: dict[int, list[int]] = {}

    def work(start: int) -> None:
        found[start] = pool.map([("square", n) for n in range(start, start + 10)])

    threads = [threading.Thread(target=work, args=(start,)) for start in range(0, 40, 10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {start: [n * n for n in range(start, start + 10)] for start in range(0, 40, 10)}


def test_an_interrupted_call_leaves_no_result_for_the_next(make, monkeypatch):
    pool = make()
    pool.map([("square", 1)])

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("edge_grpo.grading.workers.wait", interrupted)
        with pytest.raises(KeyboardInterrupt):
            pool.map([("sleep", 0.2)])
    assert pool.map([("square", 6)]) == [36]


def test_an_interrupted_hand_out_leaves_no_result_for_the_next(make, monkeypatch):
    """Ctrl-C right after a call is sent: its process has a result that nobody waits for."""
    pool = make()
    pool.map([("square", 1)])
    send = Connection.send

    def interrupted(self: Connection, message: object) -> None:
        send(self, message)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Connection, "send", interrupted)
        with pytest.raises(KeyboardInterrupt):
            pool.map([("square", 3)])
    assert pool.map([("square", 6)]) == [36]


# ---- Nothing stays behind ------------------------------------------------------------------------------------------


def test_close_ends_idle_and_busy_processes(make):
    pool = make(size=2)
    pids = pool.map([("pid",)])
    thread = threading.Thread(target=pool.map, args=([("sleep", 0.5)] * 2,))
    thread.start()
    thread.join()
    pids += [worker.process.pid for worker in pool._workers]
    pool.close()
    assert not any(map(is_running, pids))
    assert pool.map([("square", 7)]) == [49]  # and it may be used again


OWNER = """
import sys, threading, time
from edge_grpo.grading.workers import WorkerPool

pool = WorkerPool("worker_tasks:tasks", timeout=60, size=2)
pids = pool.map([("pid",)])
if sys.argv[1] == "busy":
    threading.Thread(target=pool.map, args=([("hold_the_interpreter",), ("swallow",)],), daemon=True).start()
    while sum(worker.is_busy and not worker.is_starting for worker in pool._workers) < 2:
        time.sleep(0.01)
print(*(worker.process.pid for worker in pool._workers), flush=True)
if sys.argv[2] == "killed":
    time.sleep(100)
"""


@pytest.mark.parametrize("state", ["idle", "busy"])
@pytest.mark.parametrize("end", ["killed", "by itself"])
def test_the_owners_end_is_the_workers_end(state, end):
    """SIGKILL lets the owner do nothing; the interpreter's own end closes what it can."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER, state, end], stdout=subprocess.PIPE, text=True, env=environment
    )
    assert owner.stdout is not None
    pids = [int(pid) for pid in owner.stdout.readline().split()]
    assert len(pids) == (2 if state == "busy" else 1)
    if end == "killed":
        assert all(map(is_running, pids))
        owner.kill()
    owner.wait()
    owner.stdout.close()
    assert wait_until(lambda: not any(map(is_running, pids)))


def in_another_process(queue) -> None:
    queue.put(WorkerPool("worker_tasks:tasks", timeout=FAR, size=2).map([("square", n) for n in range(4)]))


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_a_daemonic_process_may_have_workers(method):
    """Launchers start training processes in either way; multiprocessing has no children for daemonic ones."""
    context = multiprocessing.get_context(method)
    queue = context.Queue()
    process = context.Process(target=in_another_process, args=(queue,), daemon=True)
    process.start()
    assert queue.get(timeout=60) == [0, 1, 4, 9]
    process.join()


def test_a_forked_process_may_not_use_its_parents_workers(make):
    pool = make()
    pool.start()
    child = os.fork()
    if child == 0:
        try:
            pool.map([("square", 1)])
        except RuntimeError as error:
            os._exit(0 if "make the pool after the fork" in str(error) else 2)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert pool.map([("square", 8)]) == [64]
