"""Processes that share an engine: rounds of unequal numbers of calls, and who fails when.

They are real ones over gloo; what they do is in engine_groups.py. With vLLM: test_colocated.py.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from forked import run_program

from edge_grpo.config import RolloutConfig
from edge_grpo.rollout.group import check_processes


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("groups")
    said = run_program("engine_groups.py", folder, fails=True)
    # The last case: process 1 ends with status 3; process 0, which waits for it, sees that or is ended.
    assert re.search(r"exit codes \[(-9|3), 3\]$", said.rstrip()), said[-3000:]
    return folder


def members(folder: Path, case: int, ranks: range) -> list[dict[str, Any]]:
    return [json.loads((folder / f"{case}-{rank}.json").read_text()) for rank in ranks]


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 4])
def test_each_gets_its_own_answers_however_often_others_call(folder: Path, processes: int) -> None:
    own = members(folder, processes, range(processes))
    for rank, member in enumerate(own):
        assert member["said"][0] == [[10 * (100 * rank + call)] * rank for call in range(rank)]
    # The engine of the second pair runs three times: twice for both, in the order of processes.
    expected = [[[100]], [[200, 200, 300, 300, 300], [201, 201, 301, 301, 301], [302, 302, 302]]]
    for rank, member in enumerate(own):
        rounds = expected[rank // 2]
        assert member["rounds"][: len(rounds)] == rounds
        assert member["rounds"] == own[rank ^ 1]["rounds"]


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 4])
def test_a_process_that_fails_helps_the_others_and_then_ends_all(folder: Path, processes: int) -> None:
    own = members(folder, processes, range(processes))
    for member in own[:2]:
        assert member["rounds"][1:7] == [[0, 1], [0], [0], [0, 1], [1], [1]]
    for rank, member in enumerate(own):
        for number, failed in ((1, 1), (2, 0)):
            text = "ValueError: the grader is gone"
            others = f"RolloutError: process {failed} of this run failed: {text}"
            assert member["said"][number] == (text if rank == failed else others)
        assert member["said"][-1] == [[10 * rank]]  # the next phase is an ordinary one


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 4])
def test_different_answers_are_noticed(folder: Path, processes: int) -> None:
    """By all who share the engine, before the phase ends."""
    text = "RolloutError: the processes that share an engine got different answers from it"
    for rank, member in enumerate(members(folder, processes, range(processes))):
        said = member["said"][3]
        assert said.startswith(text if rank < 2 else f"RolloutError: process 0 of this run failed: {text}")


@pytest.mark.slow
def test_a_process_whose_engine_fails_ends_without_waiting(folder: Path) -> None:
    [member] = members(folder, 0, range(1, 2))
    assert member["said"] == [
        "BrokenEngineError: the engine of 2 processes failed: MemoryError: no room for the cache",
    ]


def test_processes_that_cannot_share_engines_are_refused() -> None:
    def refused(engine: str, size: int, processes: int) -> str:
        rollout = RolloutConfig(engine=engine, vllm={"tensor_parallel_size": size})  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=r"rollout\.vllm\.tensor_parallel_size") as caught:
            check_processes(rollout, processes)
        return str(caught.value)

    assert "needs a multiple of 2 processes, 2 for each engine; got 1;" in refused("vllm", 2, 1)
    assert refused("vllm", 2, 1).endswith("set it to 1")
    assert refused("vllm", 4, 6).endswith("set it to 1 or another divisor of 6")
    assert "has no effect with rollout.engine transformers" in refused("transformers", 2, 2)
    for engine, size, processes in (("vllm", 2, 4), ("vllm", 1, 3), ("vllm-server", 4, 1), ("transformers", 1, 3)):
        check_processes(RolloutConfig(engine=engine, vllm={"tensor_parallel_size": size}), processes)  # type: ignore[arg-type]
