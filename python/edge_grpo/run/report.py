"""One self-contained HTML page about one or several runs: their curves, completions and configuration.

What the folders hold is read by ``history``. ``report_page.html`` beside this file is the page, which draws in the
browser and fetches nothing; its placeholders are filled in here.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from html import escape
from pathlib import Path
from statistics import fmean, median
from typing import Any

from edge_grpo.config import TrainConfig, flatten, to_dict
from edge_grpo.run.files import write_text
from edge_grpo.run.history import Run, read_run
from edge_grpo.text import clock, percent
from edge_kernels.info import version_of

_UNJUDGED = {
    "grading/answers_timed_out": "Answers timed out",
    "grading/functions_timed_out": "Reward calls timed out",
    "grading/functions_failed": "Reward calls failed",
    "grading/skipped": "Responses skipped",
}


def write_report(runs: Sequence[Path], output: Path | None = None) -> Path:
    """Write the page about the run folders ``runs`` and return its path.

    ``output`` defaults to report.html in the run's folder, or, for several runs, in the folder that holds them all.
    Raises FileNotFoundError for a folder that is not a run's; the page names whatever else is missing or broken.
    """
    if not runs:
        raise ValueError("a report needs at least one run folder")
    paths = [Path(run) for run in runs]
    if output is None:
        output = (paths[0] if len(paths) == 1 else _common_parent(paths)) / "report.html"
    page = _page([read_run(path, name) for path, name in zip(paths, _names(paths), strict=True)])
    write_text(output, page)
    return output


def _names(paths: Sequence[Path]) -> list[str]:
    """Names for the runs: of each path the shortest tail that tells it from the others."""
    parts = [path.resolve().parts for path in paths]
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-depth:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    raise ValueError(f"each run can be given once; got {', '.join(map(str, paths))}")


def _common_parent(paths: Sequence[Path]) -> Path:
    return Path(os.path.commonpath([path.resolve().parent for path in paths]))


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
    version = version_of("edge-grpo") or "(not installed)"
    data = json.dumps({"runs": payload}, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    fields = {
        "title": escape(title),
        "subtitle": escape(_subtitle(runs)),
        "cards": "".join(_card(run, index) for index, run in enumerate(runs)),
        "configuration": _configuration(runs),
        "footer": f"Written by edge-grpo {escape(version)} on {datetime.now():%Y-%m-%d %H:%M}. "
        "Everything is in this file; nothing is fetched.",
        "data": data.replace("<", "\\u003c"),  # so that no text can close the script element that holds it
    }
    template = Path(__file__).with_name("report_page.html").read_text(encoding="utf-8")
    return re.sub(r"\{\{(\w+)\}\}", lambda match: fields[match[1]], template)  # one pass: data is not searched again


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
        ("Time in steps", clock(60 * run.minutes[-1] if run.minutes else 0.0)),
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
        figures.append(percent(evaluation.accuracy) + error)
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
    """A metric's means over the first and the last tenth of the run; nothing without values."""
    values = [value for value in run.columns.get(key, []) if value is not None]
    if values:
        tenth = max(1, len(values) // 10)
        ends = fmean(values[:tenth]), fmean(values[-tenth:])
        yield label, " → ".join(f"{100 * end:.0f}%" if share else f"{end:.2f}" for end in ends)


def _configuration(runs: Sequence[Run]) -> str:
    """The table of settings; those in which the runs differ, or a single run from the defaults, are marked."""
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
