"""Tests of Triton's kernels on CPU tensors; tests/backends.py: how, and why they run in a process of their own."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from backends import INTERPRETING

from edge_kernels import use_backend

collect_ignore_glob = [] if INTERPRETING else ["test_*.py"]


@pytest.fixture(autouse=True)
def triton() -> Iterator[None]:
    with use_backend("triton"):
        yield


@pytest.fixture(autouse=True)
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a kernel is to write holds NaN before, so that an element left out is seen."""
    empty = torch.empty

    def poisoned(*arguments: object, **options: object) -> torch.Tensor:
        out = empty(*arguments, **options)  # type: ignore[call-overload]
        return out.fill_(float("nan")) if out.is_floating_point() else out

    monkeypatch.setattr(torch, "empty", poisoned)


@pytest.fixture
def multiprocessors(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> int:
    """How many the device claims to have: with more of them than rows, rows are split over programs."""
    from edge_kernels.backends.triton import tuning

    number = int(request.param)
    monkeypatch.setattr(tuning, "device_of", lambda tensor: tuning.Device("interpreter", 16, number, 0))
    return number
