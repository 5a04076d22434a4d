"""Signs in a run's metrics that training diverged: what a report says of it. Pure functions of the rows.

Stopping a run that diverges is ``learner``'s.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean, median, variance

from edge_grpo.text import percent

SPIKE = 100  # times the median gradient norm: a spike that is said
_FEWEST = 20  # steps, below which their median says little
_FEWEST_TO_SPLIT = 50  # steps, below which a tenth of them says little
_LEAST_FALL = 0.2  # of training accuracy
_CLEAR = 3  # standard errors that accuracy must have lost, and the factor by which training accuracy must have fallen

Row = tuple[int, Mapping[str, float | None]]  # a step and its metrics; None where the number was not finite


def non_finite_steps(rows: Sequence[Row]) -> list[int]:
    """The steps whose loss or gradient norm was not finite; those in which every response was skipped do not count."""
    return [
        step
        for step, row in rows
        if any(key in row and row[key] is None for key in ("loss", "grad/norm"))
        and row.get("reward/mean", 0.0) is not None
    ]


def signs_of_divergence(rows: Sequence[Row]) -> list[str]:
    """Sentences for the reader of a report, the gravest first; none for a run that looks sound."""
    trained = [(step, row) for step, row in rows if any(not key.startswith("eval/") for key in row)]
    found = []
    if broken := non_finite_steps(trained):
        where = f"step {broken[0]}" if len(broken) == 1 else f"{len(broken)} steps, first in step {broken[0]}"
        found.append(f"diverged: loss or gradient norm not finite in {where}")
    if skipped := sum(row.get("optim/skipped") or 0.0 for _, row in trained):
        found.append(f"{skipped:,.0f} optimizer {'step' if skipped == 1 else 'steps'} skipped as not finite")
    return [*found, *_held_out_loss(rows), *_training_loss(trained), *_spike(trained)]


def _held_out_loss(rows: Sequence[Row]) -> list[str]:
    evals = [(row["eval/accuracy"] or 0.0, row.get("eval/stderr"), step) for step, row in rows if _has_accuracy(row)]
    if len(evals) < 2:
        return []
    (best, best_error, best_step), (last, error, last_step) = max(evals, key=lambda found: found[0]), evals[-1]
    if best_error is None or error is None or best - last <= _CLEAR * math.hypot(best_error, error):
        return []
    return [f"held-out accuracy fell from {percent(best)} in step {best_step} to {percent(last)} in step {last_step}"]


def _has_accuracy(row: Mapping[str, float | None]) -> bool:
    return row.get("eval/accuracy") is not None


def _training_loss(rows: Sequence[Row]) -> list[str]:
    """Accuracy of the first attempts, in tenths of the run: the last one far below the best, beyond their noise."""
    values = [value for _, row in rows if (value := row.get("accuracy/before")) is not None]
    if len(values) < _FEWEST_TO_SPLIT:
        return []
    size = len(values) // 10
    tenths = [values[i : i + size] for i in range(0, size * 10, size)]
    best, last = max(tenths, key=fmean), tenths[-1]
    fall, error = fmean(best) - fmean(last), math.sqrt((variance(best) + variance(last)) / size)
    if fall <= max(_LEAST_FALL, _CLEAR * error) or fmean(last) > fmean(best) / _CLEAR:
        return []
    share = f"from {percent(fmean(best))} to {percent(fmean(last))}"
    return [f"training accuracy fell {share} (means over tenths of the run)"]


def _spike(rows: Sequence[Row]) -> list[str]:
    norms = [(value, step) for step, row in rows if (value := row.get("grad/norm")) is not None and value > 0]
    if len(norms) < _FEWEST:
        return []
    usual = median(value for value, _ in norms)
    largest, step = max(norms)
    if largest < SPIKE * usual:
        return []
    shown = f"{largest:,.0f}" if 1000 <= largest < 1e9 else f"{largest:.3g}"
    return [f"gradient norm {shown} in step {step}, {largest / usual:,.0f} times the median"]
