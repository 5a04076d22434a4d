"""Step metrics on worked examples."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from edge_grpo.batching import Sample
from edge_grpo.config.seeds import derive_seed
from edge_grpo.metrics import drift_metrics, sampler_metrics, step_metrics
from edge_grpo.types import Example, Prompt, Provenance, Response, Reward
from edge_kernels import GRPOLossConfig

SAMPLED, INJECTED, CONTINUED = Provenance.SAMPLED, Provenance.INJECTED, Provenance.CONTINUED
RIGHT, WRONG = Reward(1.0, {"accuracy": 1.0}, "correct"), Reward(0.0, {"accuracy": 0.0}, "wrong")
PROMPT = Prompt(Example(4, "1 + 1 = ?", "2"), "<user>1 + 1 = ?", (1, 2))


def response(provenance, *, correction=None, finish="stop") -> Response:
    ids = tuple(range(len(provenance)))
    records = tuple(math.nan if mark is INJECTED else -0.5 for mark in provenance)
    return Response(ids, records, tuple(-r for r in records), tuple(provenance), finish, correction)


def two_groups() -> list[Sample]:
    """Group 0: wrong and wrong, the second corrected. Group 1: right and right."""
    first, corrected = (
        response([SAMPLED, SAMPLED], finish="length"),
        response([SAMPLED, INJECTED, CONTINUED, CONTINUED], correction="reflect"),
    )
    samples = [
        Sample(PROMPT, 0, first, WRONG, first, WRONG, advantage=-1.0, weight=0.5),
        Sample(PROMPT, 0, first, WRONG, corrected, RIGHT, advantage=1.0, weight=2.0),
        Sample(PROMPT, 1, response([SAMPLED]), RIGHT, response([SAMPLED]), RIGHT),
        Sample(PROMPT, 1, response([SAMPLED]), RIGHT, response([SAMPLED]), RIGHT),
    ]
    for sample, entropy in zip(samples, ([1.0, 3.0], [0.0, 0.0, 2.0, 2.0], [4.0], [6.0]), strict=True):
        sample.entropy = torch.tensor(entropy)
    return samples


def two_with_ratios() -> list[Sample]:
    """Trainer over sampler by token: 1, 2, 4 in one response; 0.5, none (injected), 3 in the other."""
    whole, corrected = response([SAMPLED] * 3), response([SAMPLED, INJECTED, CONTINUED], correction="reflect")
    samples = [Sample(PROMPT, 0, whole, WRONG, r, WRONG) for r in (whole, corrected)]
    for sample, ratios in zip(samples, ([1.0, 2.0, 4.0], [0.5, 100.0, 3.0]), strict=True):
        sample.logprobs = -0.5 + torch.tensor(ratios, dtype=torch.float64).log()
    return samples


@pytest.mark.parametrize(
    ("mode", "mean", "p99", "largest", "truncated"),
    [
        ("token_truncate", 10.5 / 5, 4.0, 4.0, 2 / 5),  # 4 and 3 are above the cap of 2.5
        ("token_mask", 10.5 / 5, 4.0, 4.0, 2 / 5),
        ("sequence_truncate", (8 + 1.5) / 2, 8.0, 8.0, 1 / 2),  # 1 x 2 x 4 and 0.5 x 3
        ("sequence_mask", (8 + 1.5) / 2, 8.0, 8.0, 1 / 2),
    ],
)
def test_sampler_metrics_on_a_worked_example(mode, mean, p99, largest, truncated):
    config = GRPOLossConfig(sampler_ratio_cap=2.5, sampler_ratio_mode=mode)
    found = sampler_metrics(two_with_ratios(), config)
    assert found == pytest.approx(
        {
            "ratio/sampler_mean": mean,
            "ratio/sampler_p99": p99,
            "ratio/sampler_max": largest,
            "ratio/sampler_truncated": truncated,
        }
    )


def test_sampler_metrics_below_the_floor_and_far_from_the_tail():
    config = GRPOLossConfig(sampler_ratio_cap=5.0, sampler_ratio_floor=0.9)
    assert sampler_metrics(two_with_ratios(), config)["ratio/sampler_truncated"] == pytest.approx(1 / 5)
    many = response([SAMPLED] * 200)
    sample = Sample(PROMPT, 0, many, WRONG, many, WRONG, logprobs=torch.full((200,), -0.5, dtype=torch.float64))
    sample.logprobs[:2] += math.log(3)  # one in a hundred
    found = sampler_metrics([sample], config)
    assert (found["ratio/sampler_p99"], found["ratio/sampler_max"]) == pytest.approx((1.0, 3.0))


def test_sampler_metrics_leave_skipped_responses_out():
    kept, skipped = two_with_ratios()
    skipped.reward = Reward(0.0, {"accuracy": 0.0}, "wrong", {}, True)
    config = GRPOLossConfig(sampler_ratio_cap=2.5)
    assert sampler_metrics([kept, skipped], config) == sampler_metrics([kept], config)


def test_sampler_metrics_without_any_record():
    injected = response([INJECTED, INJECTED], correction="solution")
    sample = Sample(PROMPT, 0, injected, WRONG, injected, WRONG, logprobs=torch.zeros(2))
    assert sampler_metrics([sample], GRPOLossConfig(sampler_ratio_cap=2.0)) == {}


def test_step_metrics_on_a_worked_example():
    metrics = step_metrics(two_groups())
    expected = {
        "reward/mean": 0.75,
        "reward/std": 0.5,
        "accuracy/before": 0.5,
        "accuracy/after": 0.75,
        "collapsed/before": 1.0,
        "collapsed/after": 0.5,
        "advantage/var": 0.5,
        "entropy/token_mean": 18 / 8,
        "entropy/response_mean": (2 + 1 + 4 + 6) / 4,
        "eda/weight_min": 0.5,
        "eda/weight_mean": 4.5 / 4,
        "eda/weight_max": 2.0,
        "tokens/injected_share": 1 / 8,
        "length/mean": 2.0,
        "length/min": 1.0,
        "length/max": 4.0,
        "length/truncated": 0.5,
        "correction/reflect": 1.0,
        "correction/answer": 0.0,
        "outcome/correct": 2.0,
        "outcome/wrong": 2.0,
        "reward/accuracy": 0.75,
    }
    assert {key: metrics[key] for key in expected} == pytest.approx(expected)


def test_metrics_count_what_could_not_be_judged_in_either_grading():
    first, second = two_groups()[:2]
    late = Reward(0.0, {"accuracy": 0.0}, "timed_out")
    failed = Reward(9.0, {"accuracy": 0.0}, "wrong", {"a:f": "timed_out", "a:g": "died"}, skipped=True)
    raised = Reward(0.0, {"accuracy": 0.0}, "wrong", {"a:f": "raised", "a:g": "timed_out"})
    samples = [
        replace(first, first_reward=late, reward=late),  # not corrected: one grading
        replace(second, first_reward=late, reward=late),  # corrected: two
        replace(first, first_reward=failed, reward=failed),
        replace(second, first_reward=raised, reward=failed),
    ]
    for sample in samples:
        sample.entropy = torch.ones(len(sample.response.token_ids))
    metrics = step_metrics(samples)
    assert {key: value for key, value in metrics.items() if key.startswith("grading/")} == {
        "grading/answers_timed_out": 3.0,
        "grading/functions_timed_out": 3.0,
        "grading/functions_failed": 3.0,
        "grading/skipped": 2.0,
    }
    assert (metrics["outcome/timed_out"], metrics["outcome/wrong"]) == (2.0, 2.0)  # of first attempts, all of them
    assert metrics["reward/mean"] == 0.0  # without those that were skipped


def test_drift_counts_only_recorded_tokens():
    sample = two_groups()[1]
    metrics = drift_metrics([(sample, [-0.5, 100.0, -0.7, -0.5], [0.5, 100.0, 0.5, 0.4])])
    assert metrics == pytest.approx({"drift/logprob_mean": 0.2 / 3, "drift/logprob_max": 0.2, "drift/entropy_max": 0.1})
    assert drift_metrics([]) == {}


def test_seeds_depend_on_the_whole_place():
    places = [(), ("rollout", 1, 0), ("rollout", 0, 1), ("rollout", 1), ("correction", 1, 0), ("rollout", 10)]
    seeds = {derive_seed(seed, *place) for seed in (0, 1) for place in places}
    assert len(seeds) == 2 * len(places)
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert derive_seed(0, "rollout", 1, 0) == derive_seed(0, "rollout", 1, 0)
