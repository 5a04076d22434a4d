"""Fixtures of the ops' tests: the backend they run on, the threads they use."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from edge_kernels import use_backend


@pytest.fixture
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """The backend on which a test runs: a file names its own by ``parametrize("backend", ..., indirect=True)``."""
    with use_backend(request.param):
        yield request.param


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """A few hundred numbers a tensor: threads would only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
