"""What a report says of a run that diverged, and that it says nothing of one that did not."""

from __future__ import annotations

from edge_grpo.run.health import SPIKE, non_finite_steps, signs_of_divergence

SOUND = [(i, {"loss": 0.1, "grad/norm": 1.0 + i % 3, "accuracy/before": 0.2 + i / 100}) for i in range(1, 41)]


def test_a_sound_run() -> None:
    evals = [(0, {"eval/accuracy": 0.5, "eval/stderr": 0.03}), (41, {"eval/accuracy": 0.42, "eval/stderr": 0.03})]
    assert signs_of_divergence([]) == []
    assert signs_of_divergence([evals[0], *SOUND, evals[1]]) == []  # the fall is within three standard errors


def test_numbers_that_are_not_finite() -> None:
    skipped = {
        "loss": None,
        "grad/norm": None,
        "reward/mean": None,
    }  # every response was skipped: nothing to learn from
    rows = [*SOUND, (41, skipped), (42, {"loss": 0.1, "grad/norm": None, "reward/mean": 0.5, "optim/skipped": 1.0})]
    assert non_finite_steps(rows) == [42]
    assert signs_of_divergence(rows) == [
        "diverged: loss or gradient norm not finite in step 42",
        "1 optimizer step skipped as not finite",
    ]
    rows.append((43, {"loss": None, "optim/skipped": 1.0}))
    assert signs_of_divergence(rows) == [
        "diverged: loss or gradient norm not finite in 2 steps, first in step 42",
        "2 optimizer steps skipped as not finite",
    ]


def test_accuracy_that_fell() -> None:
    evals = [
        (step, {"eval/accuracy": accuracy, "eval/stderr": 0.03})
        for step, accuracy in ((0, 0.2), (20, 0.68), (40, 0.02))
    ]
    assert signs_of_divergence(evals) == ["held-out accuracy fell from 68.0% in step 20 to 2.0% in step 40"]
    rows = [(i, {"accuracy/before": 0.6 if i <= 20 else 0.1}) for i in range(1, 61)]
    assert signs_of_divergence(rows) == ["training accuracy fell from 60.0% to 10.0% (means over tenths of the run)"]
    noise = [(i, {"accuracy/before": float(i % 4 == 0 or i in (5, 6, 7))}) for i in range(1, 61)]
    noise[-6:] = [(i, {"accuracy/before": float(i == 55)}) for i in range(55, 61)]  # 67 % to 17 %, of six steps each
    assert signs_of_divergence(noise) == []


def test_a_spike_of_the_gradient_norm() -> None:
    assert signs_of_divergence([*SOUND, (41, {"grad/norm": SPIKE * 1.9})]) == []  # the median is 2
    assert signs_of_divergence([*SOUND, (41, {"grad/norm": SPIKE * 2.5})]) == [
        "gradient norm 250 in step 41, 125 times the median"
    ]
