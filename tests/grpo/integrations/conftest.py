"""Other people's trainers in the tests: quiet, on one thread, in a folder of their own."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """One thread for small tensors, and no telemetry, which TRL leaves out in CI."""
    monkeypatch.setenv("CI", "1")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def make_trainer(tmp_path: Path) -> Callable[..., Any]:
    """Return ``trl_runs.make_trainer`` with its folder."""
    pytest.importorskip("trl", reason="TRL's trainer is what is extended here")
    import trl_runs

    return functools.partial(trl_runs.make_trainer, tmp_path / "trl")
