"""What test_engine_groups.py runs on two and on four processes: an engine of two shared by them, which only counts.

``engine_groups.py FOLDER`` writes what each process got and saw; the last case ends in a process that cannot tell why.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

os.environ["ACCELERATE_USE_CPU"] = "true"

from accelerate import PartialState
from forked import together as on_processes

from edge_grpo.config import RolloutConfig
from edge_grpo.policy.together import together
from edge_grpo.rollout.group import EngineGroup
from edge_grpo.rollout.wire import Completion, Request

ROLLOUT = RolloutConfig(engine="vllm", vllm={"tensor_parallel_size": 2})
Call = Sequence[int]  # the numbers that one call asks about, each of them a request


class Member:
    """One process's part: it asks about numbers, and remembers about which the engine was asked."""

    def __init__(self) -> None:
        self.rank = PartialState().process_index
        self.group = EngineGroup(ROLLOUT, self.run)
        self.rounds: list[list[int]] = []
        self.said: list[Any] = []
        self.is_broken = self.is_wrong = False

    def run(self, requests: Sequence[Request]) -> list[list[Completion]]:
        if self.is_broken:
            raise MemoryError("no room for the cache")
        numbers = [request.first for request in requests]
        self.rounds.append(numbers)
        return [[Completion((number, 10 * number + self.is_wrong), (0.0, 0.0), "stop")] for number in numbers]

    def ask(self, numbers: Call) -> list[int]:
        answers = self.group.ask([Request(number, 1, (5,), {}) for number in numbers])
        return [completion.token_ids[1] for [completion] in answers]

    def asks(self, calls: Sequence[Call], *, fails: bool = False) -> list[list[int]]:
        answers = [self.ask(numbers) for numbers in calls]
        if fails:
            raise ValueError("the grader is gone")
        return answers

    def attempt(self, work: Callable[[], Any]) -> None:
        """Note what ``work`` returns or raises, within a phase of all processes."""
        try:
            self.said.append(together(work, within=self.group.phase()))
        except Exception as error:
            self.said.append(f"{type(error).__name__}: {error}")


def rounds(folder: Path, processes: int) -> None:
    """The n-th process calls n times, for n numbers each: the first one never."""
    member = Member()
    member.attempt(lambda: member.asks([[100 * member.rank + call] * member.rank for call in range(member.rank)]))
    for failing in (1, 0):  # after its first call
        fails = member.rank == failing
        member.attempt(lambda fails=fails: member.asks([[member.rank]] * (1 if fails else 3), fails=fails))
    member.is_wrong = member.rank == 1
    member.attempt(lambda: member.asks([[7]] * 2))
    member.is_wrong = False
    member.attempt(lambda: member.asks([[member.rank]]))
    with contextlib.suppress(RuntimeError):
        member.said.append(member.ask([1]))
    member.group.close()
    member.group.close()
    write(folder, processes, member)


def broken(folder: Path) -> None:
    """The engine fails on the second process, where the first one would wait for it without end."""
    member = Member()
    member.is_broken = member.rank == 1
    member.attempt(lambda: member.asks([[member.rank]]))
    write(folder, 0, member)
    raise SystemExit(3)


def write(folder: Path, case: int, member: Member) -> None:
    text = json.dumps({"said": member.said, "rounds": member.rounds})
    (folder / f"{case}-{member.rank}.json").write_text(text)


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    for processes in (2, 4):
        on_processes(processes, partial(rounds, folder, processes))
    on_processes(2, partial(broken, folder))
