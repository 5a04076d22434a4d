"""One self-contained HTML page about one or several runs: their curves, completions and configuration.

What the folders hold is read by ``edge_grpo.run.history``, cards are ``cards``'s. The folder ``page`` beside this file
holds what draws in the browser and fetches nothing; the placeholders in its page.html are filled in here.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from datetime import datetime
from html import escape
from pathlib import Path
from typing import Any

from edge_grpo.config import flatten
from edge_grpo.report.cards import card, comparison
from edge_grpo.report.groups import Group, curve_of_differences, find_baseline, make_groups
from edge_grpo.report.settings import configuration
from edge_grpo.run.files import write_text
from edge_grpo.run.history import Run, read_run
from edge_kernels.info import version_of

_PARTS = Path(__file__).with_name("page")
_SCRIPTS = ("series.js", "panels.js", "charts.js", "completions.js", "page.js")  # in this order, one script


def write_report(
    runs: Sequence[Path],
    output: Path | None = None,
    *,
    group: Sequence[str] | None = None,
    baseline: str | None = None,
) -> Path:
    """Write the page about the run folders ``runs`` and return its path.

    ``output`` defaults to report.html in the run's folder, or, for several runs, in the folder that holds them all. For
    ``group`` and ``baseline``, and what is raised, see ``read_groups``.
    """
    return write_page(*read_groups(runs, group=group, baseline=baseline), output)


def read_groups(
    runs: Sequence[Path], *, group: Sequence[str] | None = None, baseline: str | None = None
) -> tuple[list[Group], Group]:
    """Return the runs in these folders in groups, and the group that the others are compared with.

    ``group`` and ``baseline`` are those of ``groups.make_groups`` and ``groups.find_baseline``. Raises
    FileNotFoundError for a folder that is not a run's, and ValueError for a run given twice or for a key or a baseline
    that is none; the page names whatever else is missing or broken.
    """
    if not runs:
        raise ValueError("a report needs at least one run folder")
    paths = [Path(run) for run in runs]
    found = [read_run(path, name, share=1 / len(paths)) for path, name in zip(paths, _names(paths), strict=True)]
    groups = make_groups(found, group)
    standard = find_baseline(groups, baseline)
    if len(groups) < len(found):
        groups.sort(key=lambda group: group is not standard)  # the baseline comes first; a lone run keeps its place
    return groups, standard


def write_page(groups: Sequence[Group], baseline: Group, output: Path | None = None) -> Path:
    """Write the page about groups of runs and return its path."""
    runs = [run for group in groups for run in group.runs]
    if output is None:
        paths = [run.path for run in runs]
        output = (paths[0] if len(paths) == 1 else _common_parent(paths)) / "report.html"
    write_text(output, _page(runs, groups, baseline))
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


def _page(runs: Sequence[Run], groups: Sequence[Group], baseline: Group) -> str:
    payload = {
        "runs": [_run(run, index) for index, run in enumerate(runs)],
        "groups": [
            {
                "name": group.name,
                "runs": [runs.index(run) for run in group.runs],
                "differences": _differences(group, baseline),
            }
            for group in groups
        ],
        "baseline": groups.index(baseline),
    }
    data = json.dumps(payload, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    version = version_of("edge-grpo") or "(not installed)"
    fields = {
        "title": escape(_title(runs, groups)),
        "subtitle": escape(_subtitle(runs)),
        "style": (_PARTS / "style.css").read_text(encoding="utf-8"),
        "cards": "".join(card(group, index) for index, group in enumerate(groups)),
        "comparison": comparison(groups, baseline),
        "configuration": configuration(groups),
        "footer": f"Written by edge-grpo {escape(version)} on {datetime.now():%Y-%m-%d %H:%M}. "
        "Everything is in this file; nothing is fetched.",
        "data": data.replace("<", "\\u003c"),  # so that no text can close the script element that holds it
        "script": "\n".join((_PARTS / name).read_text(encoding="utf-8") for name in _SCRIPTS),
    }
    template = (_PARTS / "page.html").read_text(encoding="utf-8")
    return re.sub(r"\{\{(\w+)\}\}", lambda match: fields[match[1]], template)  # one pass: data is not searched again


def _run(run: Run, index: int) -> dict[str, Any]:
    seed = (run.config or {}).get("seed")
    return {
        "index": index,
        "name": run.name,
        "seed": seed if isinstance(seed, int) else None,
        "steps": run.steps,
        "minutes": run.minutes,
        "tokens": run.tokens,
        "stepsPerPoint": run.steps_per_point,
        "columns": run.columns,
        "lows": run.lows,
        "highs": run.highs,
        "nonFinite": run.non_finite,
        "evals": [evaluation._asdict() for evaluation in run.evals],
        "completions": run.completions,
        "prompt": run.prompt,
    }


def _differences(group: Group, baseline: Group) -> list[dict[str, Any]]:
    """The curve of differences in held-out accuracy; bounds that are unknown are null."""
    if group is baseline:
        return []
    points = []
    for step, difference in curve_of_differences(group, baseline):
        value, low, high = (None if edge != edge else round(edge, 5) for edge in difference.estimate)
        clear = difference.clear
        points.append({"step": step, "value": value, "low": low, "high": high, "clear": clear, "n": difference.count})
    return points


def _title(runs: Sequence[Run], groups: Sequence[Group]) -> str:
    if len(runs) == 1:
        return f"EDGE-GRPO: {runs[0].name}"
    in_groups = f" in {len(groups)} {'group' if len(groups) == 1 else 'groups'}" if len(groups) < len(runs) else ""
    return f"EDGE-GRPO: {len(runs)} runs{in_groups} compared"


def _subtitle(runs: Sequence[Run]) -> str:
    def same(key: str) -> str | None:
        values = {str(flatten(run.config).get(key)) if run.config else None for run in runs}
        return values.pop() if len(values) == 1 else None

    facts = [("model", same("model.path")), ("trained on", same("data.train")), ("held-out", same("eval.data"))]
    return " · ".join(f"{name} {value}" for name, value in facts if value not in (None, "None"))
