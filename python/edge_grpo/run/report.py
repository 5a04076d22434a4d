"""One self-contained HTML page about one or several runs: curves, completions, configuration.

This file reads what runs left behind, however incomplete, and thins it; ``report_page.html`` beside it holds the page,
which draws in the reader's browser and fetches nothing.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from html import escape
from importlib import metadata
from pathlib import Path
from statistics import fmean, median
from typing import Any, NamedTuple

import yaml

from edge_grpo.config import TrainConfig, flatten, to_dict

MAX_POINTS = 1500  # steps drawn per run
MAX_COMPLETIONS = 1000  # completions kept per run, fewer where they are long:
MAX_CHARACTERS = 2_000_000  # of all of a run's completions together
MAX_TEXT = 6000  # characters of one completion
_OUTCOMES = ("correct", "wrong", "unparseable", "timed_out")
_PHASES = ("rollout", "reward", "correction", "score", "update")
_UNJUDGED = {
    "grading/answers_timed_out": "Answers timed out",
    "grading/functions_timed_out": "Reward calls timed out",
    "grading/functions_failed": "Reward calls failed",
    "grading/skipped": "Responses skipped",
}
_KINDS = ("sampled", "injected", "continued")


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
    unjudged: dict[str, int] = field(default_factory=dict)  # what went wrong in grading, over all steps
    completions: list[dict[str, Any]] = field(default_factory=list)
    prompt: str | None = None
    notes: list[str] = field(default_factory=list)  # what is missing or broken
    thinned: list[str] = field(default_factory=list)  # what was left out to keep the page small
    total_steps: int = 0

    @property
    def method(self) -> str:
        """The method that the run trained with."""
        return str((self.config or {}).get("method", "unknown method"))


def write_report(runs: Sequence[Path], output: Path | None = None) -> Path:
    """Write the page about the run folders ``runs`` and return its path.

    ``output`` defaults to report.html in the run's folder, or, for several runs, in the folder that holds them all.
    Raises FileNotFoundError for a folder that is not a run's; whatever else is missing or broken is said on the page.
    """
    if not runs:
        raise ValueError("a report needs at least one run folder")
    paths = [Path(run) for run in runs]
    if output is None:
        output = (paths[0] if len(paths) == 1 else _common_parent(paths)) / "report.html"
    page = _page([read_run(path, name) for path, name in zip(paths, _names(paths), strict=True)])
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = output.with_name(f".partial-{output.name}")
    partial.write_text(page, encoding="utf-8")
    partial.replace(output)
    return output


# ---- Reading -------------------------------------------------------------------------------------------------------


def read_run(path: Path, name: str | None = None) -> Run:
    """What is left in a run folder, thinned to what a page can show; ``notes`` and ``thinned`` say what is absent."""
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
    """The objects in a JSONL file that have a whole step number; anything else is counted in ``notes``."""
    if not path.is_file():
        notes.append(f"{path.name} is missing")
        return []
    records, broken = [], 0
    with path.open(encoding="utf-8", errors="replace", newline="\n") as file:
        for line in file:
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except ValueError:
                record = None
            if isinstance(record, dict) and type(record.get("step")) is int:
                records.append(record)
            else:
                broken += 1
    if broken:
        notes.append(f"{path.name}: {broken} unreadable {'line was' if broken == 1 else 'lines were'} skipped")
    return records


def _number(value: Any) -> float | None:
    """A finite number with five significant digits, or None: what a curve can be drawn from."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return float(f"{value:.5g}") if abs(value) < 1e15 else float(value)


def _read_metrics(run: Run) -> None:
    by_step: dict[int, dict[str, float | None]] = {}
    for record in _read_jsonl(run.path / "metrics.jsonl", run.notes):
        numbers = {key: _number(value) for key, value in record.items() if key != "step"}
        by_step.setdefault(record["step"], {}).update(numbers)  # a step repeated after a resume: the last word counts
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
    run.unjudged = {key: round(sum(row.get(key) or 0.0 for _, row in trained)) for key in _UNJUDGED}
    if len(trained) > MAX_POINTS:
        trained = [trained[i] for i in _spread(len(trained), MAX_POINTS)]
        run.thinned.append(f"the curves show {MAX_POINTS} of {run.total_steps} steps, evenly spaced")
    run.steps = [step for step, _ in trained]
    run.minutes = [float(f"{elapsed[step]:.5g}") for step in run.steps]
    keys = sorted({key for _, row in trained for key, value in row.items() if value is not None})
    run.columns = {key: [row.get(key) for _, row in trained] for key in keys}


def _derive(row: dict[str, float | None]) -> dict[str, float | None]:
    """Add what the curves need and the trainer need not store: outcomes as shares, and the unaccounted time."""
    outcomes = {name: row.get(f"outcome/{name}") for name in _OUTCOMES}
    total = sum(value or 0.0 for value in outcomes.values())
    shares = {f"outcome_share/{n}": _number((v or 0.0) / total) for n, v in outcomes.items()} if total else {}
    other: dict[str, float | None] = {}
    if (whole := row.get("time/total")) is not None:
        other["time/other"] = _number(max(0.0, whole - sum(row.get(f"time/{phase}") or 0.0 for phase in _PHASES)))
    return row | shares | other


def _spread(count: int, wanted: int) -> list[int]:
    """``wanted`` of ``range(count)``, evenly spaced, first and last among them."""
    return sorted({round(i * (count - 1) / (wanted - 1)) for i in range(wanted)}) if wanted > 1 else [count - 1]


def _read_completions(run: Run) -> None:
    records = _read_jsonl(run.path / "completions.jsonl", run.notes)
    shown = [_completion(record) for record in records]
    size = sum(len(text) for completion in shown for _, text in completion["segments"])
    share = min(MAX_COMPLETIONS / max(1, len(records)), MAX_CHARACTERS / max(1, size))
    if share < 1:
        # Whole steps, evenly spaced over the run: a step's completions are worth comparing with each other.
        steps = sorted({record["step"] for record in records})
        chosen = {steps[i] for i in _spread(len(steps), max(1, int(share * len(steps))))}
        shown = [completion for completion in shown if completion["step"] in chosen][:MAX_COMPLETIONS]
        run.thinned.append(f"{len(shown)} of {len(records)} completions are shown, from {len(chosen)} steps")
    run.prompt = next((r["prompt"][:MAX_TEXT] for r in reversed(records) if isinstance(r.get("prompt"), str)), None)
    run.completions = shown


def _completion(record: Mapping[str, Any]) -> dict[str, Any]:
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


def _names(paths: Sequence[Path]) -> list[str]:
    """The shortest tails of the paths that tell them apart."""
    parts = [path.resolve().parts for path in paths]
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-depth:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    raise ValueError(f"each run can be given once; got {', '.join(map(str, paths))}")


def _common_parent(paths: Sequence[Path]) -> Path:
    return Path(os.path.commonpath([path.resolve().parent for path in paths]))


# ---- The page ------------------------------------------------------------------------------------------------------


def _page(runs: Sequence[Run]) -> str:
    title = f"EDGE-GRPO: {runs[0].name}" if len(runs) == 1 else f"EDGE-GRPO: {len(runs)} runs compared"
    payload = [
        {
            "index": index,
            "name": run.name,
            "steps": run.steps,
            "minutes": run.minutes,
            "columns": run.columns,
            "evals": [evaluation._asdict() for evaluation in run.evals],
            "completions": run.completions,
            "prompt": run.prompt,
        }
        for index, run in enumerate(runs)
    ]
    data = json.dumps({"runs": payload}, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    fields = {
        "title": escape(title),
        "subtitle": escape(_subtitle(runs)),
        "cards": "".join(_card(run, index) for index, run in enumerate(runs)),
        "configuration": _configuration(runs),
        "footer": f"Written by edge-grpo {escape(_version())} on {datetime.now():%Y-%m-%d %H:%M}. "
        "Everything is in this file; nothing is fetched.",
        "data": data.replace("<", "\\u003c"),  # so that no text can close the script element that holds it
    }
    template = Path(__file__).with_name("report_page.html").read_text(encoding="utf-8")
    return re.sub(r"\{\{(\w+)\}\}", lambda match: fields[match[1]], template)  # one pass: data is not searched again


def _version() -> str:
    try:
        return metadata.version("edge-grpo")
    except metadata.PackageNotFoundError:
        return "(not installed)"


def _subtitle(runs: Sequence[Run]) -> str:
    def same(key: str) -> str | None:
        values = {str(flatten(run.config).get(key)) if run.config else None for run in runs}
        return values.pop() if len(values) == 1 else None

    facts = [("model", same("model.path")), ("trained on", same("data.train")), ("held-out", same("eval.data"))]
    return " · ".join(f"{name} {value}" for name, value in facts if value not in (None, "None"))


def _card(run: Run, index: int) -> str:
    planned = (run.config or {}).get("steps")
    done = run.steps[-1] if run.steps else 0
    facts = [
        ("Steps", str(done) if planned is None else f"{done} of {planned}"),
        ("Time in steps", _clock(60 * run.minutes[-1] if run.minutes else 0.0)),
        *_first_to_last(run, "Training accuracy", "accuracy/before", share=True),
        *_first_to_last(run, "Collapsed groups", "collapsed/after", share=True),
        *_first_to_last(run, "Entropy", "entropy/token_mean", share=False),
    ]
    if speeds := [value for value in run.columns.get("throughput/tokens_per_s", []) if value is not None]:
        facts.append(("Tokens per second", f"{median(speeds):,.0f}"))
    if rejected := max((value or 0 for value in run.columns.get("correction/rejected_solutions", [])), default=0):
        facts.append(("Solutions not injected", f"{rejected:,.0f}"))
    facts += [(name, f"{run.unjudged[key]:,}") for key, name in _UNJUDGED.items() if run.unjudged.get(key)]
    warnings = list(run.notes)
    if isinstance(planned, int) and done < planned:
        warnings.insert(0, f"not finished: step {done} of {planned}")
    return "".join(
        [
            f'<article class="card run" style="--run: var(--c{index % 8})">',
            f'<div class="top"><h3>{escape(run.name)}</h3><span class="tag">{escape(run.method)}</span></div>',
            f'<div class="headline">{_headline(run)}</div>',
            '<dl class="facts">',
            *(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in facts),
            "</dl>",
            f'<p class="warn">{escape("; ".join(warnings))}</p>' if warnings else "",
            f'<p class="note">{escape("; ".join(run.thinned))}</p>' if run.thinned else "",
            "</article>",
        ]
    )


def _headline(run: Run) -> str:
    if not run.evals:
        return '<span class="muted">no held-out evaluation</span>'
    figures = []
    for evaluation in (run.evals[0], run.evals[-1]):
        error = f' <span class="error">± {100 * evaluation.stderr:.1f}</span>' if evaluation.stderr is not None else ""
        figures.append(f"{100 * evaluation.accuracy:.1f}%{error}")
    first, last = run.evals[0].step, run.evals[-1].step
    if first == last:
        when = f"at step {last}" if last else "before training"
        return f'<span class="figure">{figures[0]}</span><span class="note">held-out accuracy {when}</span>'
    gain = 100 * (run.evals[-1].accuracy - run.evals[0].accuracy)
    tone = "up" if gain > 0 else "down" if gain < 0 else ""
    return (
        f'<span class="figure">{figures[0]}<span class="arrow"> → </span>{figures[1]}</span>'
        f'<span class="gain {tone}">{gain:+.1f} points</span>'
        f'<span class="note">held-out accuracy, step {first} → {last}</span>'
    )


def _first_to_last(run: Run, label: str, key: str, *, share: bool) -> Iterable[tuple[str, str]]:
    """A metric's mean over the first and the last tenth of the run."""
    values = [value for value in run.columns.get(key, []) if value is not None]
    if values:
        tenth = max(1, len(values) // 10)
        ends = fmean(values[:tenth]), fmean(values[-tenth:])
        yield label, " → ".join(f"{100 * end:.0f}%" if share else f"{end:.2f}" for end in ends)


def _clock(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def _configuration(runs: Sequence[Run]) -> str:
    """The table of settings, with the differences between the runs, or of the one run from the defaults, marked."""
    columns = [flatten(run.config) if run.config else {} for run in runs]
    if not any(columns):
        return ""
    defaults = flatten(to_dict(TrainConfig()))
    keys = sorted({key for column in columns for key in column}, key=lambda key: _order(key, defaults))
    rows = []
    for key in keys:
        values = [column.get(key, "–") for column in columns]
        differs = any(value != values[0] for value in values) if len(runs) > 1 else values[0] != defaults.get(key)
        differs = differs and key != "output"  # every run has its own
        cells = "".join(f"<td>{escape(_setting(value))}</td>" for value in values)
        rows.append(f'<tr class="{"differs" if differs else "same"}"><th scope="row">{escape(key)}</th>{cells}</tr>')
    against = "differences between the runs" if len(runs) > 1 else "differences from the defaults"
    names = "".join(
        f'<th scope="col"><span class="swatch" style="--run: var(--c{index % 8})"></span> {escape(run.name)}</th>'
        for index, run in enumerate(runs)
    )
    return "".join(
        [
            '<h2>Configuration</h2><div class="card"><p class="filters"><label>',
            f'<input type="checkbox" id="only-differences" checked> Only {against}, marked</label></p>',
            '<div class="scroll"><table class="config">',
            f'<thead><tr><th scope="col">Key</th>{names}</tr></thead><tbody>{"".join(rows)}</tbody>',
            "</table></div></div>",
        ]
    )


def _order(key: str, defaults: Mapping[str, Any]) -> tuple[int, str]:
    known = list(defaults)
    return (known.index(key), key) if key in defaults else (len(known), key)


def _setting(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
