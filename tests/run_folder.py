"""Run folders as the trainer leaves them, with plausible curves and completions: what the tests of ``run`` read."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import yaml

from edge_grpo.config import from_dict, to_dict


def make_run(
    folder: Path, *, method: str = "edge", steps: int = 30, seed: int = 0, final_accuracy: float = 0.7
) -> Path:
    """A finished run's folder."""
    rng = random.Random(seed)
    folder.mkdir(parents=True)
    tree = {"method": method, "steps": steps, "output": str(folder), "eval": {"data": "arithmetic@test"}}
    (folder / "config.yaml").write_text(yaml.safe_dump(to_dict(from_dict(tree)), sort_keys=False))
    metrics: list[dict[str, Any]] = [{"step": 0, "eval/accuracy": 0.22, "eval/stderr": 0.029}]
    completions = []
    for step in range(1, steps + 1):
        level = 0.22 + (final_accuracy - 0.22) * (1 - math.exp(-3 * step / steps))
        row = metrics_row(rng, method, step, steps, level)
        if step == steps or step % 10 == 0:
            accuracy = level * 0.97
            row |= {"eval/accuracy": accuracy, "eval/stderr": math.sqrt(accuracy * (1 - accuracy) / 200)}
        metrics.append(row)
        kinds = [None] if method == "grpo" else [None, "reflect", "answer", "solution"]
        completions += [completion(rng, step, index, kind) for index, kind in enumerate(kinds)]
    for name, records in (("metrics.jsonl", metrics), ("completions.jsonl", completions)):
        (folder / name).write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def append(path: Path, text: str) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(text)


def metrics_row(rng: random.Random, method: str, step: int, steps: int, level: float) -> dict[str, Any]:
    """A step's line of metrics.jsonl, where the policy's accuracy is about ``level``."""
    corrects = method != "grpo"
    before = min(1.0, max(0.0, rng.gauss(level, 0.07)))
    after = before + (1 - before) * 0.6 * corrects
    entropy = 0.9 * math.exp(-step / steps) + rng.gauss(0, 0.03)
    wrong = round(64 * (1 - before))
    return {
        "step": step,
        "loss": rng.gauss(0, 0.02),
        "reward/mean": after,
        "reward/std": math.sqrt(after * (1 - after)),
        "reward/accuracy": after,
        "accuracy/before": before,
        "accuracy/after": after,
        "collapsed/before": abs(rng.gauss(0.4, 0.1)),
        "collapsed/after": abs(rng.gauss(0.1 if corrects else 0.4, 0.05)),
        "advantage/var": abs(rng.gauss(0.8 if corrects else 0.5, 0.08)),
        "entropy/token_mean": entropy,
        "entropy/response_mean": entropy * 1.05,
        "eda/weight_min": 0.6 if method == "edge" else 1.0,
        "eda/weight_mean": 1.08 if method == "edge" else 1.0,
        "eda/weight_max": rng.uniform(1.6, 3.0) if method == "edge" else 1.0,
        "tokens/injected_share": 0.2 * (1 - before) * corrects,
        "length/mean": rng.gauss(48, 3),
        "length/min": 12,
        "length/max": 128,
        "length/truncated": abs(rng.gauss(0.04, 0.02)),
        "kl/mean": 0.0,
        "clip/low": 0.001,
        "clip/high": 0.002,
        "clip/region": abs(rng.gauss(0.003, 0.001)),
        "ratio/mean": 1 + rng.gauss(0, 1e-3),
        "ratio/max": 1.3 + rng.random(),
        "grad/norm": math.exp(rng.gauss(-0.5, 0.4)),
        "optim/lr": 1e-3 * min(1, step / 5),
        "drift/logprob_mean": 2e-7 * math.exp(rng.gauss(0, 0.3)),
        "drift/logprob_max": 4e-6 * math.exp(rng.gauss(0, 0.6)),
        "drift/entropy_max": 6e-6 * math.exp(rng.gauss(0, 0.6)),
        "correction/reflect": round(wrong * 0.5) * corrects,
        "correction/answer": round(wrong * 0.25) * corrects,
        "correction/solution": round(wrong * 0.25) * corrects,
        "outcome/correct": 64 - wrong,
        "outcome/wrong": wrong - wrong // 4,
        "outcome/unparseable": wrong // 4,
        "outcome/timed_out": 0,
        "throughput/tokens_per_s": rng.gauss(2100, 120),
        "time/rollout": 0.8 + rng.random() * 0.2,
        "time/reward": 0.05,
        "time/correction": 0.3 * corrects,
        "time/score": 0.1,
        "time/update": 0.5,
        "time/total": 2.1 if corrects else 1.7,
        "memory/peak_bytes": 9.1e8,
    }


def completion(rng: random.Random, step: int, index: int, correction: str | None) -> dict[str, Any]:
    """A line of completions.jsonl: right at once, or wrong and then corrected."""
    a, b, c = rng.randint(2, 30), rng.randint(2, 30), rng.randint(2, 9)
    attempt = f"First I add {a} and {b}.\n{a} + {b} = {a + b}.\nThen I multiply by {c}: the answer is "
    right, wrong_text = f"\\boxed{{{(a + b) * c}}}", f"\\boxed{{{(a + b) * c + 3}}}"
    segments = {
        None: [["sampled", attempt + right]],
        "reflect": [
            ["sampled", attempt + wrong_text],
            ["injected", " Wait! Something is wrong here."],
            ["continued", f" Let me check.\n{a + b} * {c} = {(a + b) * c}, so the answer is {right}<eos>"],
        ],
        "answer": [
            ["sampled", attempt + wrong_text],
            ["injected", f" Wait! Something is wrong here. The correct answer is {right}."],
            ["injected", "<eos>"],
        ],
        "solution": [["injected", f"{a} + {b} = {a + b}; {a + b} * {c} = {(a + b) * c}. {right}<eos>"]],
    }[correction]
    return {
        "step": step,
        "index": step * 10 + index,
        "problem": f"What is ({a} + {b}) * {c}?",
        "prompt": f"<user>What is ({a} + {b}) * {c}?<assistant>",
        "answer": str((a + b) * c),
        "segments": segments,
        "correction": correction,
        "reward_before": 0.0 if correction else 1.0,
        "reward": 1.0,
        "outcome_before": "wrong" if correction else "correct",
        "outcome": "correct",
        "advantage": rng.gauss(0, 1),
        "weight": rng.uniform(0.6, 2),
    }
