"""What each step learns from: collected when it is asked for, or on a thread of its own while the step before learns.

Samples of step s that are collected on time come from the weights after s - 1 steps; those collected ahead, during step
s - 1, from the weights after s - 2 steps.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace

from edge_grpo.policy.together import together
from edge_grpo.rollout.collected import Collected


class Rollouts:
    """Collects each step's samples by ``collect``; with ``ahead``, those of the next step of ``last`` as well.

    Call ``take`` at the beginning of a step, when the engine has the weights after the step before; ``wait`` before it
    gets others; ``close`` once the engine is closed, which ends what a thread generates. All processes call the same.
    """

    def __init__(self, collect: Callable[[int], Collected], *, ahead: bool, last: int) -> None:
        self._collect = collect
        self._ahead = ahead
        self._last = last
        self._thread: threading.Thread | None = None
        self._outcome: Collected | Exception | None = None
        self.pending: Collected | None = None  # the next step's samples, if they are there

    def take(self, step: int) -> Collected:
        """Return the samples of a step, and begin to collect those of the next.

        Raises what collecting raised, on this process or on another.
        """
        collected, self.pending = self.pending, None
        if collected is None:
            collected = together(lambda: self._collect(step))
        if self._ahead and step < self._last:
            # A daemon: a process that is told to stop at once does not wait for it.
            self._thread = threading.Thread(target=self._run, args=(step + 1,), daemon=True)
            self._thread.start()
        return collected

    def wait(self) -> None:
        """Return once the next step's samples are there; raise what collecting them raised, here or elsewhere."""
        if self._thread is not None:
            self.pending = together(self._finish)

    def close(self) -> None:
        """Wait until no thread is left, and forget what it did."""
        if self._thread is not None:
            self._thread.join()
            self._thread = self._outcome = None

    def _run(self, step: int) -> None:
        try:
            self._outcome = replace(self._collect(step), staleness=1)
        except Exception as error:
            self._outcome = error

    def _finish(self) -> Collected:
        assert self._thread is not None
        self._thread.join()
        outcome, self._thread, self._outcome = self._outcome, None, None
        if isinstance(outcome, Exception):
            raise outcome
        assert outcome is not None
        return outcome
