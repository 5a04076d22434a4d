"""Ctrl-C and SIGTERM as requests to stop between two steps, on which all processes of a run agree.

What is saved before the run ends is the trainer's.
"""

from __future__ import annotations

import signal
import sys
import threading
from types import FrameType, TracebackType

from accelerate import Accelerator
from accelerate.utils import gather_object

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stopped(KeyboardInterrupt):  # not an error
    """A run ended by a signal, after it saved what it had."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.status = 128 + number  # of the command, as shells have it


class StopRequests:
    """Notes the first SIGINT or SIGTERM while it is entered; a second one does what it would have done without us.

    Only in the main thread, where Python runs signal handlers. A signal that was ignored, as SIGINT is in the
    background of a script, stays ignored.
    """

    def __init__(self, *, quiet: bool = False) -> None:
        self._quiet = quiet
        self._received = 0
        self._before: dict[int, signal._HANDLER] = {}

    def __enter__(self) -> StopRequests:
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                if (handler := signal.getsignal(number)) is not signal.SIG_IGN:
                    self._before[number] = handler
                    signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()

    def agreed(self, accelerator: Accelerator) -> int:
        """Return the signal that any process has received, 0 for none: the same on all, which all call."""
        return max(gather_object([self._received]))

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._received = number
        self._restore()
        if not self._quiet:
            name = "Ctrl-C" if number == signal.SIGINT else "SIGTERM"
            print(
                f"\n{name}: the run saves a checkpoint after this step and stops; again stops at once", file=sys.stderr
            )

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._before.clear()
