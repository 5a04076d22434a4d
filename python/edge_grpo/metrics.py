"""What a training step reports: pure functions from the step's samples to named numbers, and a timer for its phases.

Names are ``group/quantity``; counts and shares say which they are. Everything is over all processes' samples. The
metrics of the loss itself are in ``learning``.
"""

from __future__ import annotations

import contextlib
import math
import resource
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from statistics import fmean, pvariance, stdev
from typing import get_args

import torch

from edge_grpo.batching import Sample
from edge_grpo.config import TrainConfig
from edge_grpo.types import Correction, Provenance, Reward
from edge_kernels import GRPOLossConfig

Recomputed = Sequence[float | None]  # of each token of a response


class PhaseTimes:
    """Adds up the seconds of each phase of a step; all work queued on ``device`` in a phase counts in it."""

    def __init__(self, device: torch.device) -> None:
        self.seconds: dict[str, float] = {}
        self._device = device

    @contextlib.contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        if self._device.type == "cuda":
            torch.cuda.synchronize()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - started


def step_metrics(samples: Sequence[Sample]) -> dict[str, float]:
    """Return the metrics that rewards, correction and advantages decide, for one rollout.

    ``outcome`` counts first attempts, ``grading`` what went wrong in any grading, the one after correction included.
    Everything else is over the responses that were not skipped, and NaN if all were.
    """
    outcomes = Counter(sample.first_reward.outcome for sample in samples)
    metrics = {
        f"outcome/{outcome}": float(outcomes[outcome]) for outcome in ("correct", "wrong", "unparseable", "timed_out")
    }
    metrics |= _grading(samples)
    names = samples[0].reward.parts
    samples = [sample for sample in samples if not sample.reward.skipped]
    rewards = [sample.reward.total for sample in samples]
    tokens = [float(value) for sample in samples for value in _entropy(sample)]
    per_response = [fmean(_entropy(sample)) for sample in samples if len(_entropy(sample))]
    weights = [sample.weight for sample in samples]
    lengths = [len(sample.response.token_ids) for sample in samples]
    injected = sum(sample.response.provenance.count(Provenance.INJECTED) for sample in samples)
    corrections = Counter(sample.response.correction for sample in samples)
    metrics |= {
        "reward/mean": _mean(rewards),
        "reward/std": stdev(rewards) if len(rewards) > 1 else 0.0 if rewards else math.nan,
        "accuracy/before": _share(sample.first_reward.correct for sample in samples),
        "accuracy/after": _share(sample.reward.correct for sample in samples),
        "collapsed/before": _collapsed((sample.group, sample.first_reward) for sample in samples),
        "collapsed/after": _collapsed((sample.group, sample.reward) for sample in samples),
        "advantage/var": pvariance([sample.advantage for sample in samples]) if samples else math.nan,
        "entropy/token_mean": _mean(tokens),
        "entropy/response_mean": _mean(per_response),
        "eda/weight_min": min(weights, default=math.nan),
        "eda/weight_mean": _mean(weights),
        "eda/weight_max": max(weights, default=math.nan),
        "tokens/injected_share": injected / sum(lengths) if lengths else math.nan,
        "length/mean": _mean(lengths),
        "length/min": float(min(lengths, default=math.nan)),
        "length/max": float(max(lengths, default=math.nan)),
        "length/truncated": _share(sample.first.finish_reason == "length" for sample in samples),
    }
    metrics |= {f"correction/{kind}": float(corrections[kind]) for kind in get_args(Correction)}
    for name in names:
        metrics[f"reward/{name}"] = _mean([sample.reward.parts[name] for sample in samples])
    return metrics


def _grading(samples: Sequence[Sample]) -> dict[str, float]:
    """Counts of what could not be judged, over both gradings of each response."""
    gradings = [sample.first_reward for sample in samples]
    gradings += [sample.reward for sample in samples if sample.response.correction is not None]
    ends = Counter(kind for reward in gradings for kind in reward.failures.values())
    return {
        "grading/answers_timed_out": float(sum(reward.outcome == "timed_out" for reward in gradings)),
        "grading/functions_timed_out": float(ends["timed_out"]),
        "grading/functions_failed": float(ends.total() - ends["timed_out"]),
        "grading/skipped": float(sum(sample.reward.skipped for sample in samples)),
    }


def function_metrics(logged: Sequence[Mapping[str, Sequence[float]]]) -> dict[str, float]:
    """Return the mean of each metric that reward functions logged; one mapping of values by name per process."""
    names = dict.fromkeys(name for own in logged for name in own)
    return {f"function/{name}": _mean([value for own in logged for value in own.get(name, ())]) for name in names}


def treatment_metrics(samples: Sequence[Sample], config: TrainConfig, loss: GRPOLossConfig) -> dict[str, float]:
    """Return what the options in use did to rewards and loss: penalties, masks, corrections of the sampler's ratio."""
    metrics: dict[str, float] = {}
    if config.reward.kl_coef:
        metrics |= reward_kl_metrics(samples)
    if loss.mask_truncated_completions:
        metrics |= truncation_metrics(samples)
    if config.use_gec and config.correction.superseded == "mask":
        metrics |= superseded_metrics(samples)
    if loss.sampler_ratio_cap is not None:
        metrics |= sampler_metrics(samples, loss)
    return metrics


def sampler_metrics(samples: Sequence[Sample], config: GRPOLossConfig) -> dict[str, float]:
    """Return how the trainer's probabilities compare with the sampler's: exp(trainer's logprob - sampler's).

    Of each token that has the sampler's record, or, as ``config.sampler_ratio_mode`` says, of the product of those of
    each response; before truncation or masking. ``truncated`` is the share outside of [floor, cap], which is truncated
    or masked in the loss. Injected tokens have no record and take no part, nor do skipped responses; nothing recorded
    makes no metrics.
    """
    logs: list[float] = []
    for sample in samples:
        if sample.reward.skipped:
            continue
        assert sample.logprobs is not None, "the scoring pass fills the logprobs of every sample"
        pairs = zip(sample.logprobs.tolist(), sample.response.logprobs, strict=True)
        differences = [own - recorded for own, recorded in pairs if not math.isnan(recorded)]
        logs += [sum(differences)] if config.sampler_ratio_mode.startswith("sequence") and differences else differences
    if not logs:
        return {}
    cap = math.inf if config.sampler_ratio_cap is None else config.sampler_ratio_cap
    ratios = torch.tensor(logs, dtype=torch.float64).exp()
    ordered = ratios.sort().values
    return {
        "ratio/sampler_mean": float(ratios.mean()),
        "ratio/sampler_p99": float(ordered[math.ceil(0.99 * len(ordered)) - 1]),
        "ratio/sampler_max": float(ordered[-1]),
        "ratio/sampler_truncated": _share(not config.sampler_ratio_floor <= ratio <= cap for ratio in ordered.tolist()),
    }


def reward_kl_metrics(samples: Sequence[Sample]) -> dict[str, float]:
    """Return the mean over responses of the KL divergence that their rewards were lessened by, before its weight."""
    return {"reward/kl": _mean([sample.reward_kl for sample in samples if not sample.reward.skipped])}


def truncation_metrics(samples: Sequence[Sample]) -> dict[str, float]:
    """Return the share of responses that the loss leaves out because they were cut off."""
    return {"masked/truncated": _share(sample.is_truncated for sample in samples if not sample.reward.skipped)}


def superseded_metrics(samples: Sequence[Sample]) -> dict[str, float]:
    """Return the share of tokens that the loss leaves out because a correction has superseded them."""
    return {
        "masked/superseded": _share(
            old for sample in samples if not sample.reward.skipped for old in sample.response.superseded
        )
    }


def resample_metrics(samples: Sequence[Sample], dropped: Sequence[Sample], rounds: Sequence[int]) -> dict[str, float]:
    """Return how many groups were dropped for others, and the accuracy of all first attempts, dropped ones included.

    ``rounds`` has the rounds that each process needed; the step waits for the longest.
    """
    everything = [sample for sample in (*samples, *dropped) if not sample.reward.skipped]
    return {
        "resample/rounds": float(max(rounds)),
        "resample/dropped": len(dropped) * len({sample.group for sample in samples}) / len(samples),
        "resample/accuracy": _share(sample.first_reward.correct for sample in everything),
    }


def num_generated(samples: Sequence[Sample]) -> int:
    """Return how many tokens the policy generated: its first attempts and its continuations."""
    return sum(
        len(sample.first.token_ids) + sample.response.provenance.count(Provenance.CONTINUED) for sample in samples
    )


def peak_bytes() -> int:
    """Return the process's peak memory: the accelerator's where there is one, else the resident set's."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def drift_metrics(pairs: Sequence[tuple[Sample, Recomputed, Recomputed]]) -> dict[str, float]:
    """Return how far the trainer's recomputed logprobs and entropies lie from those recorded while sampling.

    ``pairs`` holds a sample and the recomputed logprobs and entropies of its tokens, under the weights that
    the step began with: those that sampled it, or with ``rollout.ahead`` those one step later.
    Tokens without a record, or not recomputed (None), do not count; with none at all there are no metrics.
    """
    logprob_errors: list[float] = []
    entropy_errors: list[float] = []
    for sample, logprobs, entropy in pairs:
        for recorded, recomputed in zip(sample.response.logprobs, logprobs, strict=True):
            if recomputed is not None and not math.isnan(recorded):
                logprob_errors.append(abs(recorded - recomputed))
        for recorded, recomputed in zip(sample.response.entropy, entropy, strict=True):
            if recomputed is not None and not math.isnan(recorded):
                entropy_errors.append(abs(recorded - recomputed))
    metrics: dict[str, float] = {}
    if logprob_errors:
        metrics |= {"drift/logprob_mean": fmean(logprob_errors), "drift/logprob_max": max(logprob_errors)}
    if entropy_errors:
        metrics["drift/entropy_max"] = max(entropy_errors)
    return metrics


def _entropy(sample: Sample) -> list[float]:
    assert sample.entropy is not None, "the scoring pass fills the entropy of every sample"
    return sample.entropy.tolist()


def _mean(values: Sequence[float]) -> float:
    return fmean(values) if values else math.nan


def _share(flags: Iterable[bool]) -> float:
    return _mean([float(flag) for flag in flags])


def _collapsed(rewards: Iterable[tuple[int, Reward]]) -> float:
    """Return the share of groups whose rewards are all equal: they teach nothing."""
    groups: defaultdict[int, set[float]] = defaultdict(set)
    for group, reward in rewards:
        groups[group].add(reward.total)
    return _share(len(values) == 1 for values in groups.values())


def correction_metrics(counts: Sequence[tuple[int, int]], num_rejected: int) -> dict[str, float]:
    """Return corrections that did not fit (replaced, cut) over all processes, and the data's rejected solutions."""
    return {
        "correction/fallbacks": float(sum(fallbacks for fallbacks, _ in counts)),
        "correction/truncated": float(sum(truncated for _, truncated in counts)),
        "correction/rejected_solutions": float(num_rejected),
    }
