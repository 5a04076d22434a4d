"""What a run has left in its folder, read for people: curves, held-out evaluations, completions, configuration.

However incomplete a folder is, what it holds is read, thinned to what a page can show, and what is missing is named.
Drawing it is ``report``'s, writing it ``log``'s.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, get_args

import yaml

from edge_grpo.run.files import record_of
from edge_grpo.types import Outcome, Provenance

MAX_POINTS = 1500  # steps drawn per run
MAX_COMPLETIONS = 1000  # completions kept per run, fewer where they are long:
MAX_CHARACTERS = 2_000_000  # of all of a run's completions together
MAX_TEXT = 6000  # characters of one completion
_OUTCOMES = get_args(Outcome)
_KINDS = tuple(mark.name.lower() for mark in Provenance)
_PHASES = ("rollout", "reward", "correction", "score", "update")


class Point(NamedTuple):
    """A held-out evaluation: after which step, after how long, and what it found."""

    step: int
    minutes: float
    accuracy: float
    stderr: float | None


@dataclass
class Run:
    """What a run folder holds. ``steps``, ``minutes`` and every column have one entry per training step."""

    path: Path
    name: str
    config: dict[str, Any] | None
    steps: list[int] = field(default_factory=list)
    minutes: list[float] = field(default_factory=list)
    columns: dict[str, list[float | None]] = field(default_factory=dict)
    evals: list[Point] = field(default_factory=list)
    unjudged: dict[str, int] = field(default_factory=dict)  # counts of failures in grading, over all steps
    completions: list[dict[str, Any]] = field(default_factory=list)
    prompt: str | None = None
    notes: list[str] = field(default_factory=list)  # what is missing or broken
    thinned: list[str] = field(default_factory=list)  # what was left out to keep the page small
    total_steps: int = 0

    @property
    def method(self) -> str:
        """The method that the run trained with."""
        return str((self.config or {}).get("method", "unknown method"))


def read_run(path: Path, name: str | None = None) -> Run:
    """Return what a run folder holds, thinned to what a page can show.

    Raises FileNotFoundError for a folder that is not a run's. Whatever else is missing or broken is in ``Run.notes``,
    and what was left out for its size in ``Run.thinned``.
    """
    if not path.is_dir():
        raise FileNotFoundError(f"no run folder {path}")
    if not any((path / file).exists() for file in ("config.yaml", "metrics.jsonl", "completions.jsonl")):
        raise FileNotFoundError(f"{path} is not a run folder: it holds neither config.yaml nor metrics.jsonl")
    notes: list[str] = []
    run = Run(path, name or path.resolve().name, _read_config(path / "config.yaml", notes), notes=notes)
    _read_metrics(run)
    _read_completions(run)
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


def _read_metrics(run: Run) -> None:
    by_step: dict[int, dict[str, float | None]] = {}
    for record in _read_jsonl(run.path / "metrics.jsonl", run.notes):
        numbers = {key: _number(value) for key, value in record.items() if key != "step"}
        by_step.setdefault(record["step"], {}).update(numbers)  # repeated after a resume: the later line counts
    rows = [(step, _derive(by_step[step])) for step in sorted(by_step)]
    elapsed: dict[int, float] = {}
    seconds = 0.0
    for step, row in rows:
        seconds += row.get("time/total") or 0.0
        elapsed[step] = seconds / 60
        if (accuracy := row.get("eval/accuracy")) is not None:
            stderr, minutes = row.get("eval/stderr"), float(f"{elapsed[step]:.5g}")
            run.evals.append(Point(step, minutes, accuracy, stderr))
    trained = [(step, row) for step, row in rows if any(not key.startswith("eval/") for key in row)]
    run.total_steps = len(trained)
    counted = {key for _, row in trained for key in row if key.startswith("grading/")}
    run.unjudged = {key: round(sum(row.get(key) or 0.0 for _, row in trained)) for key in counted}
    if len(trained) > MAX_POINTS:
        trained = [trained[i] for i in _spread(len(trained), MAX_POINTS)]
        run.thinned.append(f"the curves show {MAX_POINTS} of {run.total_steps} steps, evenly spaced")
    run.steps = [step for step, _ in trained]
    run.minutes = [float(f"{elapsed[step]:.5g}") for step in run.steps]
    keys = sorted({key for _, row in trained for key, value in row.items() if value is not None})
    run.columns = {key: [row.get(key) for _, row in trained] for key in keys}


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


def _read_completions(run: Run) -> None:
    records = _read_jsonl(run.path / "completions.jsonl", run.notes)
    shown = [_completion(record) for record in records]
    size = sum(len(text) for completion in shown for _, text in completion["segments"])
    share = min(MAX_COMPLETIONS / max(1, len(records)), MAX_CHARACTERS / max(1, size))
    if share < 1:
        # Whole steps, evenly spaced over the run, so that a step's completions can be compared with each other.
        steps = sorted({record["step"] for record in records})
        chosen = {steps[i] for i in _spread(len(steps), max(1, int(share * len(steps))))}
        shown = [completion for completion in shown if completion["step"] in chosen][:MAX_COMPLETIONS]
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
