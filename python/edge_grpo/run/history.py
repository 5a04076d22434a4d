"""What a run has left in its folder, read for people: curves, held-out evaluations, completions, configuration.

However incomplete a folder is, what it holds is read, thinned to what a page can show, and what is missing is named.
Drawing it is ``edge_grpo.report``'s, writing it ``log``'s.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple, get_args

import yaml

from edge_grpo.run.files import record_of
from edge_grpo.run.health import non_finite_steps, signs_of_divergence
from edge_grpo.types import Correction, Outcome, Provenance

MAX_POINTS = 1000  # points of a run's curves, each of one step or several
_PAGE_POINTS = 4000  # of all runs on a page together,
_FEWEST_POINTS = 100  # but for these, however many there are
MAX_COMPLETIONS = 1000  # completions kept, fewer where they are long:
MAX_CHARACTERS = 2_000_000  # of all completions together
MAX_TEXT = 6000  # characters of one completion
_OUTCOMES = get_args(Outcome)
_CORRECTIONS = get_args(Correction)
_KINDS = tuple(mark.name.lower() for mark in Provenance)
_PHASES = ("rollout", "reward", "correction", "score", "update")


class Point(NamedTuple):
    """A held-out evaluation: after which step, minutes and millions of generated tokens, and what it found."""

    step: int
    minutes: float
    tokens: float
    accuracy: float
    stderr: float | None


@dataclass
class Run:
    """What a run folder holds. ``steps``, ``minutes``, ``tokens`` and every column have one entry per point.

    A point is a training step, or in a long run ``steps_per_point`` of them: then ``steps`` holds the last of each, the
    columns their means, and ``lows`` and ``highs`` the smallest and largest values of the columns that vary within a
    point, so that no spike is lost.
    """

    path: Path
    name: str
    config: dict[str, Any] | None
    steps: list[int] = field(default_factory=list)
    minutes: list[float] = field(default_factory=list)
    tokens: list[float] = field(default_factory=list)  # generated so far, in millions; empty where it is not logged
    columns: dict[str, list[float | None]] = field(default_factory=dict)
    lows: dict[str, list[float | None]] = field(default_factory=dict)
    highs: dict[str, list[float | None]] = field(default_factory=dict)
    steps_per_point: int = 1
    non_finite: list[int] = field(default_factory=list)  # steps whose loss or gradient norm was not
    evals: list[Point] = field(default_factory=list)
    unjudged: dict[str, int] = field(default_factory=dict)  # counts of failures in grading, over all steps
    completions: list[dict[str, Any]] = field(default_factory=list)
    prompt: str | None = None
    notes: list[str] = field(default_factory=list)  # what is missing or broken
    signs: list[str] = field(default_factory=list)  # that the run diverged
    thinned: list[str] = field(default_factory=list)  # what was left out to keep the page small
    total_steps: int = 0

    @property
    def method(self) -> str:
        """The method that the run trained with."""
        return str((self.config or {}).get("method", "unknown method"))

    @property
    def corrects(self) -> bool:
        """Whether responses were corrected, so that values before and after correction differ."""
        return any(any(self.columns.get(f"correction/{kind}", [])) for kind in _CORRECTIONS)


def read_run(path: Path, name: str | None = None, *, share: float = 1.0) -> Run:
    """Return what a run folder holds, thinned to ``share`` of what a page can show.

    Raises FileNotFoundError for a folder that is not a run's. Whatever else is missing or broken is in ``Run.notes``,
    and what was left out for its size in ``Run.thinned``.
    """
    if not path.is_dir():
        raise FileNotFoundError(f"no run folder {path}")
    if not any((path / file).exists() for file in ("config.yaml", "metrics.jsonl", "completions.jsonl")):
        raise FileNotFoundError(f"{path} is not a run folder: it holds neither config.yaml nor metrics.jsonl")
    notes: list[str] = []
    run = Run(path, name or path.resolve().name, _read_config(path / "config.yaml", notes), notes=notes)
    _read_metrics(run, min(MAX_POINTS, max(_FEWEST_POINTS, int(share * _PAGE_POINTS))))
    _read_completions(run, share)
    return run


def _read_config(path: Path, notes: list[str]) -> dict[str, Any] | None:
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        notes.append("config.yaml is missing")
        return None
    except (yaml.YAMLError, UnicodeDecodeError):
        tree = None
    if not isinstance(tree, dict):
        notes.append("config.yaml is not readable")
        return None
    return tree


def _read_jsonl(path: Path, notes: list[str]) -> list[dict[str, Any]]:
    """The objects of a JSONL file that have an integer step; ``notes`` says how many lines have none."""
    if not path.is_file():
        notes.append(f"{path.name} is missing")
        return []
    records, broken = [], 0
    with path.open("rb") as file:
        for line in file:
            if not line.strip():
                continue
            if (record := record_of(line)) is not None:
                records.append(record)
            else:
                broken += 1
    if broken:
        notes.append(f"{path.name}: {broken} unreadable {'line was' if broken == 1 else 'lines were'} skipped")
    return records


def _number(value: Any) -> float | None:
    """The value to five significant digits where it is a finite number, else None: what a curve is drawn from."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return float(f"{value:.5g}") if abs(value) < 1e15 else float(value)


def _read_metrics(run: Run, points: int) -> None:
    by_step: dict[int, dict[str, float | None]] = {}
    for record in _read_jsonl(run.path / "metrics.jsonl", run.notes):
        numbers = {key: _number(value) for key, value in record.items() if key != "step"}
        by_step.setdefault(record["step"], {}).update(numbers)  # repeated after a resume: the later line counts
    rows = [(step, _derive(by_step[step])) for step in sorted(by_step)]
    elapsed: dict[int, tuple[float, float]] = {}  # minutes, and millions of tokens
    seconds = tokens = 0.0
    for step, row in rows:
        seconds += row.get("time/total") or 0.0
        tokens += (row.get("throughput/tokens_per_s") or 0.0) * (row.get("time/total") or 0.0)
        elapsed[step] = float(f"{seconds / 60:.5g}"), float(f"{tokens / 1e6:.5g}")
        if (accuracy := row.get("eval/accuracy")) is not None:
            run.evals.append(Point(step, *elapsed[step], accuracy, row.get("eval/stderr")))
    trained = [(step, row) for step, row in rows if any(not key.startswith("eval/") for key in row)]
    run.total_steps = len(trained)
    counted = {key for _, row in trained for key in row if key.startswith("grading/")}
    run.unjudged = {key: round(sum(row.get(key) or 0.0 for _, row in trained)) for key in counted}
    run.signs, run.non_finite = signs_of_divergence(rows), non_finite_steps(trained)[:MAX_POINTS]
    while len(trained) > points * run.steps_per_point:
        run.steps_per_point *= 2
    size = run.steps_per_point
    parts = [trained[i : i + size] for i in range(0, len(trained), size)]
    if size > 1:
        run.thinned.append(f"the curves show means of {size} steps, and their smallest and largest values")
    run.steps = [part[-1][0] for part in parts]
    run.minutes = [elapsed[step][0] for step in run.steps]
    run.tokens = [elapsed[step][1] for step in run.steps] if tokens else []
    for key in sorted({key for _, row in trained for key, value in row.items() if value is not None}):
        held = [[value for _, row in part if (value := row.get(key)) is not None] for part in parts]
        run.columns[key] = [_number(fmean(values)) if values else None for values in held]
        if any(min(values) < max(values) for values in held if values):
            run.lows[key] = [min(values, default=None) for values in held]
            run.highs[key] = [max(values, default=None) for values in held]


def _derive(row: dict[str, float | None]) -> dict[str, float | None]:
    """The row with what the curves need and the trainer does not log: outcomes as shares, and the time of no phase."""
    outcomes = {name: row.get(f"outcome/{name}") for name in _OUTCOMES}
    total = sum(value or 0.0 for value in outcomes.values())
    shares = {f"outcome_share/{n}": _number((v or 0.0) / total) for n, v in outcomes.items()} if total else {}
    other: dict[str, float | None] = {}
    if (whole := row.get("time/total")) is not None:
        other["time/other"] = _number(max(0.0, whole - sum(row.get(f"time/{phase}") or 0.0 for phase in _PHASES)))
    return row | shares | other


def _spread(count: int, wanted: int) -> list[int]:
    """``wanted`` numbers below ``count``, evenly spaced, the first and the last included."""
    return sorted({round(i * (count - 1) / (wanted - 1)) for i in range(wanted)}) if wanted > 1 else [count - 1]


def _read_completions(run: Run, of_page: float) -> None:
    records = _read_jsonl(run.path / "completions.jsonl", run.notes)
    shown = [_completion(record) for record in records]
    size = sum(len(text) for completion in shown for _, text in completion["segments"])
    most = max(1, int(of_page * MAX_COMPLETIONS))
    share = min(most / max(1, len(records)), of_page * MAX_CHARACTERS / max(1, size))
    if share < 1:
        # Whole steps, evenly spaced over the run, so that a step's completions can be compared with each other.
        steps = sorted({record["step"] for record in records})
        chosen = {steps[i] for i in _spread(len(steps), max(1, int(share * len(steps))))}
        shown = [completion for completion in shown if completion["step"] in chosen][:most]
        run.thinned.append(f"{len(shown)} of {len(records)} completions are shown, from {len(chosen)} steps")
    run.prompt = next((r["prompt"][:MAX_TEXT] for r in reversed(records) if isinstance(r.get("prompt"), str)), None)
    run.completions = shown


def _completion(record: Mapping[str, Any]) -> dict[str, Any]:
    """What the page shows of a record of completions.jsonl, its text cut to ``MAX_TEXT`` characters."""
    segments: list[list[str]] = []
    room = MAX_TEXT
    cut = 0
    for segment in record.get("segments") or []:
        if not (isinstance(segment, list) and len(segment) == 2 and segment[0] in _KINDS):
            continue
        text = str(segment[1])
        if room > 0:
            segments.append([segment[0], text[:room]])
        cut += max(0, len(text) - max(0, room))
        room -= len(text)
    shown: dict[str, Any] = {key: record.get(key) for key in ("step", "index", "problem", "answer", "correction")}
    shown |= {key: record[key] for key in ("outcome_before", "outcome") if record.get(key) in _OUTCOMES}
    shown |= {key: _number(record.get(key)) for key in ("reward_before", "reward", "advantage", "weight")}
    return shown | {"segments": segments} | ({"cut": cut} if cut else {})
