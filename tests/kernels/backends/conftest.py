"""The fixture that runs a test once for each instruction set of this machine."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from extension_calls import _C


@pytest.fixture(params=_C.instruction_sets())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs a test once for each instruction set of this machine."""
    before = _C.instruction_set()
    _C.use_instruction_set(request.param)
    yield request.param
    _C.use_instruction_set(before)
