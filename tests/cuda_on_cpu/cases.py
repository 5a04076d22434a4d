"""Calls of the CUDA kernels and what must come out of them, from plain PyTorch in float64: all of them, by unit."""

from __future__ import annotations

from torch import Tensor

from cuda_on_cpu.loss_cases import grpo_sweep_cases, token_loss_cases
from cuda_on_cpu.matrices import Case
from cuda_on_cpu.stats_cases import token_stats_cases

ALL = {"token_stats": token_stats_cases, "grpo_sweep": grpo_sweep_cases, "token_loss": token_loss_cases}


def run_checks(cases: list[Case], results: list[dict[str, Tensor]]) -> None:
    for case, result in zip(cases, results, strict=True):
        try:
            case.check(result)
        except AssertionError as error:
            raise AssertionError(f"{case.name}: {error}") from error
