"""What a run writes while it trains: metrics.jsonl, completions.jsonl, trackers, and the lines on the terminal.

Only the main process writes. Each line is written and flushed whole, so that a killed run leaves a readable log.
Reading a log again is ``history``'s.
"""

from __future__ import annotations

import json
import textwrap
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from accelerate import Accelerator
from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from edge_grpo.batching import Sample
from edge_grpo.run.files import finite, record_of, write_bytes
from edge_grpo.text import clock

_SHOWN = {  # of what has values before and after correction, the part of the key that both share
    "eval/accuracy": "held-out",
    "accuracy": "accuracy",
    "collapsed": "collapsed groups",
    "reward/mean": "reward",
    "loss": "loss",
    "grad/norm": "gradient norm",
    "entropy/token_mean": "entropy",
    "length/mean": "length",
    "throughput/tokens_per_s": "tok/s",
}
_STEPS_OF_ESTIMATE = 20  # the latest steps, whose mean time the remaining time is estimated from
_BAR_WIDTH = 20  # columns; no bar where the terminal has fewer than _BAR_NEEDS
_BAR_NEEDS = 72


class RunLog:
    """Writes one run's records. What a killed run logged after ``resume_step``, its last checkpoint, is dropped."""

    def __init__(
        self, accelerator: Accelerator, output: Path, *, steps: int, resume_step: int, console: Console | None = None
    ) -> None:
        self._accelerator = accelerator
        self._metrics = output / "metrics.jsonl"
        self._completions = output / "completions.jsonl"
        self._console = console or Console(stderr=True)
        self._steps, self._done = steps, resume_step
        self._figures = ""
        self._started = time.monotonic()
        self._times = deque([(resume_step, self._started)], maxlen=_STEPS_OF_ESTIMATE + 1)
        self._live: Live | None = None
        if accelerator.is_main_process and self._console.is_terminal:
            self._live = Live(get_renderable=self._display, console=self._console, refresh_per_second=2)
        if accelerator.is_main_process:
            for path in (self._metrics, self._completions):
                if broken := _keep_until(path, resume_step if resume_step else -1):
                    lines = f"line{'s' * (len(broken) > 1)} {', '.join(map(str, broken[:5]))}"
                    more = f" and {len(broken) - 5} more" if broken[5:] else ""
                    self._console.print(f"{path}: no record in {lines}{more}; left as it was", soft_wrap=True)

    def __enter__(self) -> RunLog:
        if self._live:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live:
            self._live.stop()

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record one step's metrics everywhere."""
        if self._accelerator.is_main_process:
            _append(self._metrics, {"step": step} | {key: finite(value) for key, value in metrics.items()})
            self._advance(step)
            self._figures = figures_of(metrics)
            if self._live:
                self._live.refresh()
            else:
                times = f"elapsed {self._elapsed()}  left {self._left()}"
                line = f"step {step}/{self._steps}  {times}  {self._figures}"
                self._console.print(line, highlight=False, markup=False, soft_wrap=True)
            if skipped := metrics.get("optim/skipped"):
                self._console.print(
                    f"step {step}: optimizer steps skipped, because loss or gradient norm was not finite: {skipped:g}",
                    highlight=False,
                    soft_wrap=True,
                )
        self._accelerator.log(dict(metrics), step=step)

    def _advance(self, step: int) -> None:
        if self._times[-1][0] == step:  # an evaluation before the first step: no step took that time
            self._times.pop()
        self._times.append((step, time.monotonic()))
        self._done = step

    def _elapsed(self) -> str:
        return clock(time.monotonic() - self._started)

    def _left(self) -> str:
        """The remaining time at the pace of the latest steps; rich's own estimate needs several steps in 30 seconds."""
        (first, then), (last, now) = self._times[0], self._times[-1]
        return clock((now - then) / (last - first) * (self._steps - last)) if last > first else "-"

    def _display(self) -> Group:
        """What the terminal shows: a line with step and times at any width, and the figures below it."""
        line = Table.grid(padding=(0, 1))
        times = f"elapsed {self._elapsed()}  left {self._left()}"
        cells: list[Text | ProgressBar] = [Text(f"step {self._done}/{self._steps}", no_wrap=True)]
        if self._console.width >= _BAR_NEEDS:
            cells.append(ProgressBar(total=self._steps, completed=self._done, width=_BAR_WIDTH))
        line.add_row(*cells, Text(times, no_wrap=True))
        whole = self._figures.replace("  ", "\n").replace(" ", "\u00a0").replace("\n", "  ")  # figures are not cut
        wrapped = textwrap.wrap(whole, self._console.width, break_on_hyphens=False)
        return Group(line, *(Text(text.replace("\u00a0", " "), no_wrap=True) for text in wrapped))

    def completions(self, step: int, samples: Sequence[Sample], decode: Callable[[Sequence[int]], str]) -> None:
        """Record whole completions with the provenance of their parts."""
        if self._accelerator.is_main_process:
            for sample in samples:
                _append(self._completions, completion_record(step, sample, decode))


def figures_of(metrics: Mapping[str, float]) -> str:
    """Return a step's most telling metrics as text, parted by two spaces: those before and after correction by name."""
    corrects = "correction/fallbacks" in metrics
    texts = []
    for key, name in _SHOWN.items():
        before, after = metrics.get(f"{key}/before"), metrics.get(f"{key}/after")
        if key in metrics:
            texts.append(f"{name} {metrics[key]:{',.0f' if name == 'tok/s' else '.3g'}}")
        elif before is not None and after is not None and corrects:
            texts.append(f"{name} {before:.3g} before correction, {after:.3g} after")
        elif before is not None:
            texts.append(f"{name} {before:.3g}")
    return "  ".join(texts)


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
        "logged": dict(sample.reward.logged),
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
