"""What a run comes to, and what cells differ in: pure functions of the records.

Intervals are at 95 % over seeds: a percentile bootstrap from eight seeds on, Student's t below (``report.groups``).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from statistics import fmean
from typing import Any

from edge_grpo.evaluation.estimators import Estimate
from edge_grpo.report.groups import mean_interval

Record = dict[str, Any]
THRESHOLD = 0.3  # held-out accuracy that counts as having learned the task
_KEPT = 0.5  # of its best accuracy that a run must end with


def area(record: Record) -> float:
    """The mean held-out accuracy over the steps: the area under the curve by trapezoids.

    A run that diverged counts 0 for the steps that it did not make.
    """
    points = list(zip(record["steps"], record["accuracy"], strict=True))
    parts = [(b[0] - a[0]) * (a[1] + b[1]) / 2 for a, b in itertools.pairwise(points)]
    return sum(parts) / record.get("of_steps", points[-1][0])


def at_step(record: Record, step: int) -> float:
    """Held-out accuracy after a step; 0 if the run diverged before."""
    return dict(zip(record["steps"], record["accuracy"], strict=True)).get(step, 0.0)


def at_tokens(record: Record, tokens: float) -> float:
    """Held-out accuracy at a number of generated tokens (thousands), linear between evaluations.

    Beyond its last evaluation a run keeps the accuracy of that, unless it diverged, which counts 0.
    """
    points = list(zip(record["tokens"], record["accuracy"], strict=True))
    if "diverged" in record and tokens > points[-1][0]:
        return 0.0
    for (x0, y0), (x1, y1) in itertools.pairwise(points):
        if x0 <= tokens < x1:
            return float(y0 + (y1 - y0) * (tokens - x0) / (x1 - x0))
    return float(points[-1][1])


def reaches(record: Record, axis: str, threshold: float = THRESHOLD) -> float | None:
    """Where a run first reaches the threshold, linear between evaluations, in ``axis`` (steps or tokens); or None."""
    points = list(zip(record[axis], record["accuracy"], strict=True))
    if points[0][1] >= threshold:
        return float(points[0][0])
    for (x0, y0), (x1, y1) in itertools.pairwise(points):
        if y0 < threshold <= y1:
            return float(x0 + (x1 - x0) * (threshold - y0) / (y1 - y0))
    return None


def collapses(record: Record) -> bool:
    """Whether a run ended with less than half of its best accuracy, or diverged."""
    return "diverged" in record or record["accuracy"][-1] < _KEPT * max(record["accuracy"])


def paired(own: Sequence[Record], base: Sequence[Record], value: Callable[[Record], float]) -> Estimate | None:
    """The mean difference within seeds, with its interval; None with fewer than two seeds that both have."""
    other = {record["seed"]: value(record) for record in base}
    gaps = [value(record) - other[record["seed"]] for record in own if record["seed"] in other]
    return mean_interval(gaps) if len(gaps) > 1 else None


def median_reach(records: Sequence[Record], axis: str) -> float | None:
    """The median over runs of where they reach the threshold; None where half of them never do."""
    reached = sorted(r for record in records if (r := reaches(record, axis)) is not None)
    if 2 * len(reached) <= len(records):
        return None
    never = [float("inf")] * (len(records) - len(reached))
    ordered = reached + never
    middle = len(ordered) // 2
    value = ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2
    return None if value == float("inf") else value


def mean_of(records: Sequence[Record], value: Callable[[Record], float]) -> Estimate:
    """The mean over seeds with its interval."""
    return mean_interval([value(record) for record in records])


def mean_curve(record: Record, name: str) -> float:
    """The mean of a logged curve over the run, its missing values left out; NaN where nothing was logged."""
    values = [value for value in record.get(name, []) if value is not None]
    return fmean(values) if values else float("nan")
