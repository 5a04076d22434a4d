"""The CUDA kernels without a GPU: their own sources, compiled by g++, every thread a fiber, against float64."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from cuda_on_cpu import cases, harness
from cuda_on_cpu.harness import ADDRESS, PLAIN, PLAIN_SM100, THREAD, Build, KernelError
from cuda_on_cpu.mutations import MUTATIONS, Mutation

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(harness.missing() is not None, reason=str(harness.missing())),
]

Compile = Callable[[Build], Path]


def run_group(program: Path, group: str, order: str, build: Build, folder: Path) -> None:
    """Run the cases of a group in one process and check what came out; under ThreadSanitizer those of one dtype."""
    chosen = [case for case in cases.ALL[group]() if build is not THREAD or case.dtype in (None, torch.bfloat16)]
    results = harness.run_calls(program, [case.call for case in chosen], order, build, folder)
    cases.run_checks(chosen, results)


@pytest.mark.parametrize("order", harness.ORDERS)
@pytest.mark.parametrize("group", cases.ALL)
def test_against_float64(group: str, order: str, cuda_program: Compile, tmp_path: Path) -> None:
    run_group(cuda_program(PLAIN), group, order, PLAIN, tmp_path)


@pytest.mark.parametrize("group", ["token_stats", "grpo_sweep"])
def test_against_float64_with_exponentials_by_polynomial(group: str, cuda_program: Compile, tmp_path: Path) -> None:
    run_group(cuda_program(PLAIN_SM100), group, "forward", PLAIN_SM100, tmp_path)


@pytest.mark.parametrize("group", cases.ALL)
def test_under_address_and_undefined_behaviour_sanitizers(group: str, cuda_program: Compile, tmp_path: Path) -> None:
    run_group(cuda_program(ADDRESS), group, "forward", ADDRESS, tmp_path)


@pytest.mark.parametrize("group", cases.ALL)
def test_under_thread_sanitizer(group: str, cuda_program: Compile, tmp_path: Path) -> None:
    run_group(cuda_program(THREAD), group, "random", THREAD, tmp_path)


def is_caught(mutation: Mutation, program: Path, folder: Path) -> bool:
    """Whether any order of the mutated unit's cases fails."""
    mutated = mutation.compile(folder)
    others = [path for path in sorted(program.parent.glob("*.o")) if path.name != mutated.name]
    # The mutated object comes first: of an inline function that several objects have, the linker takes that one's.
    runner = harness.link([mutated, *others], folder / "runner", mutation.build)
    for order in harness.ORDERS:
        try:
            run_group(runner, mutation.unit, order, mutation.build, folder)
        except (AssertionError, KernelError):
            return True
    return False


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_every_planted_bug_is_caught(mutation: Mutation, cuda_program: Compile, tmp_path: Path) -> None:
    assert is_caught(mutation, cuda_program(mutation.build), tmp_path)
