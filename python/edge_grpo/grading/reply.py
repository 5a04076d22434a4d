"""What a reward function of the user gave, as it crosses from its process; making one is ``functions``'."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

LARGEST = 1e30  # of a reward: what becomes of it is float32


@dataclass
class Reply:
    """What a function gave: for each completion a number, None, or how what is neither looks; and what it logged.

    ``metrics`` holds the values of each metric, ``extra`` of each column one per completion.
    """

    values: list[float | str | None] = field(default_factory=list)
    metrics: dict[str, list[float]] = field(default_factory=dict)
    extra: dict[str, list[Any]] = field(default_factory=dict)

    def log_metric(self, name: str, value: float) -> None:
        """Log a number of this batch, as TRL's function of this name."""
        self.metrics.setdefault(str(name), []).append(float(value))

    def log_extra(self, column: str, values: Sequence[Any]) -> None:
        """Log a value for each completion, as TRL's function of this name."""
        self.extra.setdefault(str(column), []).extend(map(plain, values))


def plain(value: Any) -> Any:
    """Return a value that a log can hold: what it has no form for, as text."""
    if value is None or isinstance(value, (bool, int, str)):
        return value
    return value if isinstance(value, float) and math.isfinite(value) else str(value)
