"""Work that may fail on one process of a run and must then fail on all: the others would wait for it without end."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from accelerate.utils import gather_object

from edge_grpo.types import RolloutError

Result = TypeVar("Result")


def together(work: Callable[[], Result]) -> Result:
    """Return what ``work`` returns here, once it has ended on every process. All processes call it.

    ``work`` must not communicate with the other processes, unless it does as much where it fails as where it does not.
    What it raises is raised here; where it raises on another process alone, RolloutError says on which one and what.
    """
    failure: Exception | None = None
    try:
        result = work()
    except Exception as error:
        failure = error
    said = gather_object([None if failure is None else f"{type(failure).__name__}: {failure}"])
    if failure is not None:
        raise failure
    for rank, text in enumerate(said):
        if text is not None:
            raise RolloutError(f"process {rank} of this run failed: {text}")
    return result
