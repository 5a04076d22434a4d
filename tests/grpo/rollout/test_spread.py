"""Which server gets which request, without HTTP: servers that answer when the test lets them."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from edge_grpo.rollout import spread as spread_module
from edge_grpo.rollout.spread import Spread, each
from edge_grpo.rollout.wire import Request
from edge_grpo.types import RolloutError


class Server:
    """Answers with its own name and the prompt; ``before`` may wait, or raise."""

    def __init__(self, name: str, before: Callable[[tuple[int, ...]], None] = lambda prompt: None) -> None:
        self.name, self.before = name, before
        self.prompts: list[tuple[int, ...]] = []
        self.healthy = True

    def ask(self, path: str, body: dict[str, Any], *, stop: threading.Event) -> tuple[str, tuple[int, ...]]:
        prompt = tuple(body["token_ids"])
        self.prompts.append(prompt)
        self.before(prompt)
        return self.name, prompt

    def is_healthy(self) -> bool:
        return self.healthy

    def failure(self, what: str) -> RolloutError:
        return RolloutError(f"{self.name} {what}")


def requests(sizes: Sequence[int], prompts: Sequence[int] | None = None) -> list[Request]:
    """Requests of so many completions each, of different prompts unless said otherwise."""
    prompts = range(len(sizes)) if prompts is None else prompts
    return [Request(0, n, (prompt,), {}) for n, prompt in zip(sizes, prompts, strict=True)]


@pytest.fixture(autouse=True)
def _one_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spread_module, "_CONNECTIONS", 1)
    monkeypatch.setattr(spread_module, "_HEALTH_EVERY", 0.05)


def test_answers_are_in_order_with_their_server():
    servers = [Server("a"), Server("b"), Server("c")]
    answers = Spread(servers).ask("/", requests([1] * 30))
    assert [prompt for _, (_, prompt) in answers] == [(number,) for number in range(30)]
    assert all(server.name == name for server, (name, _) in answers)
    assert Spread(servers).ask("/", []) == []


def test_a_request_goes_where_least_is_outstanding():
    """One server is held up with a big request until all others have been answered: the other gets them."""
    others = threading.Semaphore(0)

    def hold(prompt):
        for _ in range(9):
            assert others.acquire(timeout=60)

    slow = Server("slow", hold)
    quick = Server("quick", lambda prompt: others.release())
    Spread([slow, quick]).ask("/", requests([8, *[1] * 9]))
    assert slow.prompts == [(0,)]
    assert len(quick.prompts) == 9


def test_completions_count_and_not_requests(monkeypatch):
    """Requests that all wait: of 6, 1, 1, 1, 1, 1 and 1 completions the first goes here and the others there."""
    monkeypatch.setattr(spread_module, "_CONNECTIONS", 4)
    everyone = threading.Barrier(7)
    servers = [Server("a", lambda prompt: everyone.wait(60)), Server("b", lambda prompt: everyone.wait(60))]
    Spread(servers).ask("/", requests([6, *[1] * 6]))
    assert servers[0].prompts == [(0,)]
    assert len(servers[1].prompts) == 6


def test_a_prompts_requests_stay_together():
    """Groups larger than a request can be, as rollout.batch_size cuts them; the prefix is read once."""
    servers = [Server("a"), Server("b")]
    Spread(servers).ask("/", requests([4] * 12, [number // 3 for number in range(12)]))
    for prompt, times in Counter(servers[0].prompts + servers[1].prompts).items():
        assert times == 3
        assert (prompt in servers[0].prompts) != (prompt in servers[1].prompts)


def test_processes_begin_at_different_servers():
    """Four processes with one request each, two servers."""
    servers = [Server("a"), Server("b")]
    for rank in range(4):
        Spread(servers, first=rank).ask("/", requests([1]))
    assert [len(server.prompts) for server in servers] == [2, 2]


def test_the_last_request_may_fail():
    def fail(prompt):
        if prompt == (2,):
            raise RolloutError("the last one")

    with pytest.raises(RolloutError, match="the last one"):
        Spread([Server("a", fail)]).ask("/", requests([1, 1, 1]))


def test_after_a_failure_nothing_more_is_asked():
    def fail(prompt):
        raise RolloutError("no")

    server = Server("a", fail)
    with pytest.raises(RolloutError, match="no"):
        Spread([server]).ask("/", requests([1] * 1000))
    assert server.prompts == [(0,)]


def test_a_dead_server_is_noticed_while_others_answer():
    """It keeps its connection open and is silent; the other one goes on answering as long as anybody asks."""
    end = threading.Event()
    dead = Server("dead", lambda prompt: end.wait(60))
    dead.healthy = False
    alive = Server("alive", lambda prompt: end.wait(0.01))
    with pytest.raises(RolloutError, match="dead failed 3 health checks in a row"):
        Spread([dead, alive]).ask("/", requests([1] * 10_000))
    end.set()


def test_each_calls_all_at_once_and_raises_the_first_error():
    everyone = threading.Barrier(3)
    servers = [Server("a"), Server("b"), Server("c")]

    def meet(server):
        everyone.wait(60)
        return server.name

    assert each(meet, servers) == ["a", "b", "c"]

    def fail(server):
        everyone.wait(60)
        if server.name != "a":
            raise RolloutError(server.name)

    with pytest.raises(RolloutError, match="b"):
        each(fail, servers)
