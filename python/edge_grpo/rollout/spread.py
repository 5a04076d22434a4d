"""Requests spread over several vLLM servers: each goes to the one with the least to do, and their health is watched."""

from __future__ import annotations

import queue
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from edge_grpo.rollout.connection import Connection
from edge_grpo.rollout.wire import Request
from edge_grpo.types import RolloutError

_CONNECTIONS = 64  # to each server
_HEALTH_EVERY = 5.0  # seconds between health checks of the servers that have requests
_HEALTH_MISSES = 3  # failed checks in a row after which a server counts as dead

Result = TypeVar("Result")


class Spread:
    """Has requests answered by ``servers``.

    A request goes to the server with the fewest sequences of ours outstanding, among equals to the next one from number
    ``first`` on: processes that each have little to ask shall not all ask the same server. Requests of one prompt in a
    call go to the same server, whose prefix cache then holds the prompt.
    """

    def __init__(self, servers: Sequence[Connection], *, first: int = 0) -> None:
        start = first % len(servers)
        self._servers = [*servers[start:], *servers[:start]]
        self._calls: list[queue.SimpleQueue[tuple[int, Any]]] = []
        self._is_closed = False

    def ask(self, path: str, requests: Sequence[Request]) -> list[tuple[Connection, Any]]:
        """Return the answer to each request and who gave it, in order.

        Raises RolloutError, and asks nothing more, where one request fails for good or a server is dead, which is
        noticed within half a minute even where no connection breaks.
        """
        results: queue.SimpleQueue[tuple[int, Any]] = queue.SimpleQueue()
        stop = threading.Event()
        outstanding = dict.fromkeys(self._servers, 0)  # sequences
        waiting = deque(enumerate(requests))
        prompts: dict[tuple[int, ...], Connection] = {}
        lock = threading.Lock()

        def work() -> None:
            while True:
                with lock:
                    if stop.is_set() or not waiting:
                        return
                    place, request = waiting.popleft()
                    idlest = min(self._servers, key=outstanding.__getitem__)
                    server = prompts.setdefault(request.prompt, idlest)
                    outstanding[server] += request.n
                body = {"token_ids": list(request.prompt), "sampling_params": dict(request.sampling_params)}
                result: Any
                try:
                    result = server, server.ask(path, body, stop=stop)
                except Exception as error:
                    result = error
                with lock:
                    outstanding[server] -= request.n
                results.put((place, result))
                if isinstance(result, Exception):
                    stop.set()  # only now: others that it ends shall come after it

        self._calls.append(results)
        try:
            if self._is_closed:
                raise RolloutError("the rollout engine is closed")
            # Daemons, so that a process which gives up does not wait for a dead connection.
            for _ in range(min(len(requests), _CONNECTIONS * len(self._servers))):
                threading.Thread(target=work, daemon=True).start()
            return self._receive(results, len(requests), outstanding)
        finally:
            stop.set()
            self._calls.remove(results)

    def close(self) -> None:
        """End all calls, in whatever threads they wait, and refuse later ones."""
        self._is_closed = True
        for results in list(self._calls):
            results.put((0, RolloutError("the rollout engine was closed while it sampled")))

    def _receive(
        self, results: queue.SimpleQueue[tuple[int, Any]], count: int, outstanding: dict[Connection, int]
    ) -> list[tuple[Connection, Any]]:
        """Return ``count`` results in order; raise the first that is an error, or that a server is dead."""
        answers: dict[int, tuple[Connection, Any]] = {}
        misses: Counter[Connection] = Counter()
        next_check = time.monotonic() + _HEALTH_EVERY
        while len(answers) < count:
            try:
                place, result = results.get(timeout=max(0.0, next_check - time.monotonic()))
            except queue.Empty:
                busy = [server for server in self._servers if outstanding[server]]
                for server, is_healthy in zip(busy, each(lambda one: one.is_healthy(), busy), strict=True):
                    misses[server] = 0 if is_healthy else misses[server] + 1
                    if misses[server] == _HEALTH_MISSES:
                        raise server.failure(f"failed {_HEALTH_MISSES} health checks in a row") from None
                next_check = time.monotonic() + _HEALTH_EVERY
                continue
            if isinstance(result, Exception):
                raise result
            answers[place] = result
        return [answers[place] for place in range(count)]


def each(function: Callable[[Connection], Result], servers: Sequence[Connection]) -> list[Result]:
    """Return the function's results for the servers, called for all at once; raise the first error once all ended."""
    if len(servers) == 1:
        return [function(servers[0])]
    results: dict[Connection, Result] = {}
    errors: dict[Connection, Exception] = {}

    def call(server: Connection) -> None:
        try:
            results[server] = function(server)
        except Exception as error:
            errors[server] = error

    threads = [threading.Thread(target=call, args=(server,), daemon=True) for server in servers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for server in servers:
        if server in errors:
            raise errors[server]
    return [results[server] for server in servers]
