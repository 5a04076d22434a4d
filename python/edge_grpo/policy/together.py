"""Work that may fail on one process of a run and must then fail on all: the others would wait for it without end."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from typing import TypeVar

from accelerate.utils import gather_object

from edge_grpo.config import RolloutConfig
from edge_grpo.types import BrokenEngineError, RolloutError

Result = TypeVar("Result")


def patience(rollout: RolloutConfig) -> timedelta:
    """Return how long a process waits for others: the slowest to sample, the first to send weights in 3 attempts."""
    return timedelta(seconds=1800 + 4 * rollout.timeout)


def together(work: Callable[[], Result], *, within: AbstractContextManager[None] | None = None) -> Result:
    """Return what ``work`` returns here, once it has ended on every process. All processes call it.

    ``within`` is the phase of the engine that ``work`` samples with.

    ``work`` must not communicate with the other processes, unless it does as much where it fails as where it does not.
    What it raises is raised here; where it raises on another process alone, RolloutError says on which one and what.
    BrokenEngineError is raised without telling anyone.
    """
    failure: Exception | None = None
    try:
        with within or nullcontext():
            result = work()
    except BrokenEngineError:
        raise
    except Exception as error:
        failure = error
    said = gather_object([None if failure is None else f"{type(failure).__name__}: {failure}"])
    if failure is not None:
        raise failure
    for rank, text in enumerate(said):
        if text is not None:
            raise RolloutError(f"process {rank} of this run failed: {text}")
    return result
