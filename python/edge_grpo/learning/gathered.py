"""The samples of all processes in a step, brought together, and what they say of it."""

from __future__ import annotations

from accelerate.utils import gather_object

from edge_grpo.batching import Sample
from edge_grpo.config import TrainConfig
from edge_grpo.correction import Corrector
from edge_grpo.metrics import (
    correction_metrics,
    function_metrics,
    num_generated,
    resample_metrics,
    step_metrics,
    treatment_metrics,
)
from edge_grpo.rollout.collected import Collected
from edge_kernels import GRPOLossConfig


def gathered(
    collected: Collected, config: TrainConfig, loss: GRPOLossConfig, corrector: Corrector | None
) -> tuple[list[Sample], dict[str, float]]:
    """Return all processes' samples, once they have advantages, and their metrics. All processes call it."""
    samples: list[Sample] = gather_object(collected.samples)
    metrics = step_metrics(samples) | treatment_metrics(samples, config, loss)
    metrics |= function_metrics(gather_object([collected.logged]))
    dropped: list[Sample] = []
    if config.rollout.resample:
        dropped = gather_object(list(collected.dropped))
        metrics |= resample_metrics(samples, dropped, gather_object([collected.rounds]))
    if config.rollout.ahead:
        metrics["rollout/staleness"] = float(collected.staleness)
    if corrector is not None:
        counts = gather_object([(collected.fallbacks, collected.num_truncated)])
        metrics |= correction_metrics(counts, len(corrector.rejected_solutions))
    return samples, metrics | {"tokens/generated": float(num_generated([*samples, *dropped]))}
