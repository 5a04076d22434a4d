"""The ops on a vocabulary, or on responses, split over processes: three, and two of them as a group of their own.

What the processes do, case by case: processes.py and the files of cases that it imports. One start serves all, since
importing torch takes longer than a case.
"""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from edge_kernels import parallel

SCRIPT = Path(__file__).with_name("processes.py")
CASES = [
    node.name
    for node in ast.parse(SCRIPT.read_text()).body
    if isinstance(node, ast.FunctionDef)
    and any(isinstance(d, ast.Name) and d.id == "case" for d in node.decorator_list)
] + [
    name.id
    for module in ("sequence_cases.py", "agreement_cases.py", "dtensor_cases.py")
    for node in ast.parse(SCRIPT.with_name(module).read_text()).body
    if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id == "CASES"
    for name in node.value.elts  # type: ignore[attr-defined]
]
MEMBERS = {3: (0, 1, 2), 2: (0, 2)}


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[set[str]], str]:
    """What passed on each process, and what those that failed said."""
    folder = tmp_path_factory.mktemp("parallel")
    processes = [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), str(rank), "3", str(folder)],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(3)
    ]
    try:
        said = [process.communicate(timeout=300)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    failed = [text[-3000:] for process, text in zip(processes, said, strict=True) if process.returncode]
    files = [folder / f"passed.{rank}" for rank in range(3)]
    passed = [set(file.read_text().splitlines()) if file.exists() else set() for file in files]
    return passed, "\n\n".join(failed)


@pytest.mark.slow
def test_every_process_ends_well(outcome: tuple[list[set[str]], str]) -> None:
    assert outcome[1] == ""


@pytest.mark.slow
@pytest.mark.parametrize("world", MEMBERS)
@pytest.mark.parametrize("name", CASES)
def test_shards_give_what_the_whole_gives(name: str, world: int, outcome: tuple[list[set[str]], str]) -> None:
    passed, failed = outcome
    for rank in MEMBERS[world]:
        assert f"{name} {world}" in passed[rank], failed


def test_all_cases_are_found() -> None:
    assert {"every_loss", "traffic", "special_rows", "distributed_tensors"} < set(CASES)
    assert {"every_loss_of_split_responses", "wrong_for_split_responses"} < set(CASES)


def test_needs_a_process_group() -> None:
    with pytest.raises(RuntimeError, match="init_process_group"):
        parallel.token_stats(torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64))
