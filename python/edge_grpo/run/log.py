"""What a run writes while it trains: metrics.jsonl, completions.jsonl, trackers, and the lines on the terminal.

Only the main process writes. Each line is written and flushed whole, so that a killed run leaves a readable log.
Reading a log again is ``history``'s.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from accelerate import Accelerator
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from edge_grpo.batching import Sample
from edge_grpo.run.files import finite, record_of, write_bytes

_SHOWN = {
    "eval/accuracy": "held-out",
    "reward/mean": "reward",
    "accuracy/before": "accuracy",
    "collapsed/before": "collapsed",
    "collapsed/after": "after GEC",
    "entropy/token_mean": "entropy",
    "length/mean": "length",
    "throughput/tokens_per_s": "tok/s",
}


class RunLog:
    """Writes one run's records. What a killed run logged after ``resume_step``, its last checkpoint, is dropped."""

    def __init__(
        self, accelerator: Accelerator, output: Path, *, steps: int, resume_step: int, console: Console | None = None
    ) -> None:
        self._accelerator = accelerator
        self._metrics = output / "metrics.jsonl"
        self._completions = output / "completions.jsonl"
        self._console = console or Console(stderr=True)
        self._progress = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=20),
            TimeRemainingColumn(),
            TextColumn("{task.fields[figures]}"),
            console=self._console,
            disable=not accelerator.is_main_process or not self._console.is_terminal,
        )
        self._task = self._progress.add_task("train", total=steps, completed=resume_step, figures="")
        if accelerator.is_main_process:
            for path in (self._metrics, self._completions):
                if broken := _keep_until(path, resume_step if resume_step else -1):
                    lines = f"line{'s' * (len(broken) > 1)} {', '.join(map(str, broken[:5]))}"
                    more = f" and {len(broken) - 5} more" if broken[5:] else ""
                    self._console.print(f"{path}: no record in {lines}{more}; left as it was", soft_wrap=True)

    def __enter__(self) -> RunLog:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record one step's metrics everywhere."""
        if self._accelerator.is_main_process:
            _append(self._metrics, {"step": step} | {key: finite(value) for key, value in metrics.items()})
            figures = "  ".join(f"{name} {metrics[key]:.3g}" for key, name in _SHOWN.items() if key in metrics)
            self._progress.update(self._task, completed=step, figures=figures)
            if not self._console.is_terminal:
                self._console.print(f"step {step}  {figures}", highlight=False, soft_wrap=True)
            if skipped := metrics.get("optim/skipped"):
                self._console.print(
                    f"step {step}: optimizer steps skipped, because loss or gradient norm was not finite: {skipped:g}",
                    highlight=False,
                    soft_wrap=True,
                )
        self._accelerator.log(dict(metrics), step=step)

    def completions(self, step: int, samples: Sequence[Sample], decode: Callable[[Sequence[int]], str]) -> None:
        """Record whole completions with the provenance of their parts."""
        if self._accelerator.is_main_process:
            for sample in samples:
                _append(self._completions, completion_record(step, sample, decode))


def completion_record(step: int, sample: Sample, decode: Callable[[Sequence[int]], str]) -> dict[str, Any]:
    """Return a completion as completions.jsonl holds it: its text cut where the provenance changes, both its rewards.

    ``*_before`` belongs to the first attempt, everything else to what was trained on; without a correction the two are
    the same.
    """
    segments: list[list[str]] = []
    ids, provenance = sample.response.token_ids, sample.response.provenance
    start = 0
    for stop in range(1, len(ids) + 1):
        if stop == len(ids) or provenance[stop] != provenance[start]:
            segments.append([provenance[start].name.lower(), decode(ids[start:stop])])
            start = stop
    example = sample.prompt.example
    return {
        "step": step,
        "index": example.index,
        "problem": example.problem,
        "prompt": sample.prompt.text,
        "answer": example.answer,
        "segments": segments,
        "correction": sample.response.correction,
        "reward_before": sample.first_reward.total,
        "reward": sample.reward.total,
        "outcome_before": sample.first_reward.outcome,
        "outcome": sample.reward.outcome,
        "parts_before": dict(sample.first_reward.parts),
        "parts": dict(sample.reward.parts),
        "failures": sample.first_reward.failures | sample.reward.failures,
        "skipped": sample.reward.skipped,
        "advantage": sample.advantage,
        "weight": sample.weight,
    }


def _append(path: Path, record: Mapping[str, Any]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n")


def _keep_until(path: Path, step: int) -> list[int]:
    """Drop a JSONL log's lines after ``step``, and a last line that was not finished.

    Lines that are no records stay where they are; their numbers are returned.
    """
    if not path.exists():
        return []
    kept, broken = [], []
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, 1):
        record = record_of(line)
        if record is not None and record["step"] > step:
            continue
        if record is None:
            if number == len(lines):
                continue
            broken.append(number)
        kept.append(line + b"\n")
    write_bytes(path, b"".join(kept))
    return broken
