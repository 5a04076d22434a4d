"""What the micro-batches of an optimizer step add up to, over all processes: the loss's divisors and its metrics."""

from __future__ import annotations

import math
from collections import defaultdict
from typing import NamedTuple

from accelerate.utils import gather_object

from edge_kernels import GRPOLossOutput


class Normalizers(NamedTuple):
    """Totals of one optimizer step over all processes, under the names that the loss gives them."""

    num_items: int
    num_sequences: int
    entropy_threshold: float | None


class LossTotals:
    """Adds up the loss and the metrics of micro-batches; means over all processes are formed once, at the end."""

    def __init__(self) -> None:
        self._sums: defaultdict[str, float] = defaultdict(float)
        self._maxima: dict[str, float] = {}

    def add(self, out: GRPOLossOutput) -> None:
        self._sums["loss"] += float(out.loss.detach())
        for name, value in out.metrics.items():
            if name.endswith("_max"):
                self._maxima[name] = max(self._maxima.get(name, 0.0), float(value))
            else:
                self._sums[name] += float(value)

    @property
    def loss(self) -> float:
        """This process's part of the loss."""
        return self._sums["loss"]

    def merge(self, other: LossTotals) -> None:
        for name, value in other._sums.items():
            self._sums[name] += value
        for name, value in other._maxima.items():
            self._maxima[name] = max(self._maxima.get(name, 0.0), value)

    def metrics(self, optimizer_steps: int) -> dict[str, float]:
        """Return the named means and maxima, of the loss over so many optimizer steps. All processes call it."""
        sums: defaultdict[str, float] = defaultdict(float)
        maxima: dict[str, float] = {}
        for process_sums, process_maxima in gather_object([(self._sums, self._maxima)]):
            for name, value in process_sums.items():
                sums[name] += value
            for name, value in process_maxima.items():
                maxima[name] = max(maxima.get(name, 0.0), value)
        tokens = max(sums["tokens"], 1)
        metrics = {
            "loss": sums["loss"] / optimizer_steps if optimizer_steps else math.nan,
            "clip/low": sums["clip_low"] / tokens,
            "clip/high": sums["clip_high"] / tokens,
            "clip/region": sums["clip_region"] / tokens,
            "ratio/mean": sums["ratio_sum"] / tokens,
            "ratio/max": maxima.get("ratio_max", math.nan),  # where every response was skipped
        }
        if "kl_sum" in sums:
            metrics["kl/mean"] = sums["kl_sum"] / tokens
        if "off_policy_tokens" in sums:
            metrics["masked/off_policy"] = sums["off_policy_tokens"] / tokens
        return metrics
