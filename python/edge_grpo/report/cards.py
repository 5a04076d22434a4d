"""The cards on the page: one a group of runs, and one a quantity in which groups are compared.

Markup only: figures are ``groups``'s, curves are drawn in the browser.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from html import escape
from statistics import fmean, median, stdev

from edge_grpo.report.groups import (
    BOOTSTRAPPED,
    Difference,
    Group,
    Quantity,
    Row,
    compare,
    difference_of,
    mean_interval,
    quantities,
)
from edge_grpo.run.history import Point, Run
from edge_grpo.text import clock, percent

_UNJUDGED = {
    "grading/answers_timed_out": "Answers timed out",
    "grading/functions_timed_out": "Reward calls timed out",
    "grading/functions_failed": "Reward calls failed",
    "grading/skipped": "Responses skipped",
}
_WARNINGS = 6  # of a group's runs together

# ---- Groups and runs -----------------------------------------------------------------------------------------------


def card(group: Group, index: int) -> str:
    """Return the card of a group, or of a run that is alone in its group."""
    several = len(group.runs) > 1
    warnings = [f"{run.name}: {text}" if several else text for run in group.runs for text in warnings_of(run)]
    if len(warnings) > _WARNINGS:
        warnings[_WARNINGS:] = [f"and {len(warnings) - _WARNINGS} more"]
    notes = [] if several else list(group.runs[0].thinned)
    if group.varies:
        notes.insert(0, f"not only the seed differs among these runs: {', '.join(group.varies)}")
    methods = sorted({run.method for run in group.runs})
    tags = [*(method for method in methods if method != group.name), *([f"{len(group.runs)} runs"] if several else [])]
    return "".join(
        [
            f'<article class="card run" style="--run: var(--c{index % 8})">',
            f'<div class="top"><h3>{escape(group.name)}</h3>',
            "".join(f'<span class="tag">{escape(tag)}</span>' for tag in tags),
            f'</div><div class="headline">{_headline(group)}</div>',
            '<dl class="facts">',
            *(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in _facts(group)),
            "</dl>",
            "".join(f'<p class="warn">{escape(text)}</p>' for text in warnings),
            f'<p class="note">{escape("; ".join(notes))}</p>' if notes else "",
            _runs_of(group) if several else "",
            "</article>",
        ]
    )


def warnings_of(run: Run) -> list[str]:
    """Return what a reader must know of a run before its curves: that it diverged, did not finish, lacks something."""
    planned, done = (run.config or {}).get("steps"), run.steps[-1] if run.steps else 0
    unfinished = [f"not finished: step {done} of {planned}"] if isinstance(planned, int) and done < planned else []
    return [*run.signs, *unfinished, *run.notes]


def _facts(group: Group) -> Iterable[tuple[str, str]]:
    runs = group.runs
    done = [run.steps[-1] if run.steps else 0 for run in runs]
    planned = {(run.config or {}).get("steps") for run in runs}
    steps = _range(done)
    yield "Steps", steps if planned == {None} or len(planned) > 1 else f"{steps} of {planned.pop()}"
    yield (
        ("Time in steps, mean" if len(runs) > 1 else "Time in steps"),
        clock(60 * fmean(run.minutes[-1] if run.minutes else 0.0 for run in runs)),
    )
    corrects = any(run.corrects for run in runs)
    yield from _first_to_last(runs, "Training accuracy", "accuracy/before", share=True)
    if corrects:
        yield from _first_to_last(runs, "Collapsed before correction", "collapsed/before", share=True)
        yield from _first_to_last(runs, "Collapsed after correction", "collapsed/after", share=True)
    else:
        yield from _first_to_last(runs, "Collapsed groups", "collapsed/before", share=True)
    yield from _first_to_last(runs, "Entropy", "entropy/token_mean", share=False)
    speeds = [value for run in runs for value in run.columns.get("throughput/tokens_per_s", []) if value is not None]
    if speeds:
        yield "Tokens per second", f"{median(speeds):,.0f}"
    rejected = [value or 0 for run in runs for value in run.columns.get("correction/rejected_solutions", [])]
    if most := max(rejected, default=0):
        yield "Solutions not injected", f"{most:,.0f}"
    for key, name in _UNJUDGED.items():
        if count := sum(run.unjudged.get(key, 0) for run in runs):
            yield name, f"{count:,}"


def _range(numbers: Sequence[int]) -> str:
    low, high = min(numbers), max(numbers)
    return str(low) if low == high else f"{low} to {high}"


def _first_to_last(runs: Sequence[Run], label: str, key: str, *, share: bool) -> Iterable[tuple[str, str]]:
    """A metric's means over the first and the last tenth of the runs; nothing without values."""
    ends = []
    for run in runs:
        if values := [value for value in run.columns.get(key, []) if value is not None]:
            tenth = max(1, len(values) // 10)
            ends.append((fmean(values[:tenth]), fmean(values[-tenth:])))
    if ends:
        first_and_last = fmean(first for first, _ in ends), fmean(last for _, last in ends)
        yield label, " → ".join(f"{100 * end:.0f}%" if share else f"{end:.2f}" for end in first_and_last)


def _headline(group: Group) -> str:
    ends = _ends(group)
    if ends is None:
        return '<span class="muted">no held-out evaluation</span>'
    (first, old), (last, new) = ends
    several = f", mean of {len(new)} runs" if len(group.runs) > 1 else ""
    several += " ± one standard error" if len(new) > 1 or new[0].stderr is not None else ""
    figures = [_figure(points) for points in (old, new)]
    if first == last:
        when = f"at step {last}" if last else "before training"
        return f'<span class="figure">{figures[0]}</span><span class="note">held-out accuracy {when}{several}</span>'
    gain = (
        difference_of({0: [(new[0].accuracy, new[0].stderr)]}, {0: [(old[0].accuracy, old[0].stderr)]})
        if len(new) == 1
        else Difference(mean_interval([b.accuracy - a.accuracy for a, b in zip(old, new, strict=True)]), "pairs", 2)
    )
    value = gain.estimate.value
    note = f"held-out accuracy, step {first} → {last}{several}"
    if not gain.clear and not math.isnan(gain.estimate.low):
        note += "; the difference is within its error"
    return (
        f'<span class="figure">{figures[0]}<span class="arrow"> → </span>{figures[1]}</span>'
        f'<span class="gain {tone(gain, 1)}">{_signed(100 * value)} points</span>'
        f'<span class="note">{note}</span>'
    )


def _ends(group: Group) -> tuple[tuple[int, list[Point]], tuple[int, list[Point]]] | None:
    """The first and the last step at which all runs that were evaluated have an evaluation, with these."""
    runs = [{point.step: point for point in run.evals} for run in group.runs if run.evals]
    shared = sorted(set.intersection(*map(set, runs))) if runs else []
    if not shared:
        return None
    first, last = shared[0], shared[-1]
    return (first, [points[first] for points in runs]), (last, [points[last] for points in runs])


def _figure(points: Sequence[Point]) -> str:
    """Accuracy and one standard error: of the evaluation for one run, over the runs for several."""
    error = points[0].stderr if len(points) == 1 else stdev(p.accuracy for p in points) / math.sqrt(len(points))
    shown = "" if error is None else f' <span class="error">± {100 * error:.1f}</span>'
    return percent(fmean(point.accuracy for point in points)) + shown


def _runs_of(group: Group) -> str:
    rows = []
    for run in group.runs:
        accuracy = f"{percent(run.evals[0].accuracy)} → {percent(run.evals[-1].accuracy)}" if run.evals else "–"
        seed, done = (run.config or {}).get("seed", "–"), run.steps[-1] if run.steps else 0
        state = "; ".join([*(warnings_of(run) or ["sound"]), *run.thinned])
        cells = "".join(f"<td>{escape(str(cell))}</td>" for cell in (seed, done, accuracy, state))
        rows.append(f'<tr><th scope="row">{escape(run.name)}</th>{cells}</tr>')
    head = "".join(f'<th scope="col">{name}</th>' for name in ("Run", "Seed", "Steps", "Held-out", "State"))
    return (
        f'<details><summary class="note">{len(group.runs)} runs</summary><div class="scroll"><table class="members">'
        f"<thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div></details>"
    )


# ---- Comparison ----------------------------------------------------------------------------------------------------


def tone(difference: Difference, better: int) -> str:
    """Return the class that colours a difference: within its error it is neither a gain nor a loss."""
    if not difference.clear:
        return "within"
    return {1: "up", -1: "down", 0: "clear"}[(1 if difference.estimate.value > 0 else -1) * better]


def comparison(groups: Sequence[Group], baseline: Group) -> str:
    """Return the section that compares groups with the baseline, a card a quantity; nothing for a single group."""
    if len(groups) < 2:
        return ""
    cards = [(quantity, compare(groups, baseline, quantity)) for quantity in quantities(groups)]
    cards = [(quantity, rows) for quantity, rows in cards if any(row.difference for row in rows)]
    if not cards:
        return ""
    return "".join(
        [
            f'<h2>Compared with {escape(baseline.name)}</h2><p class="note how">{escape(_how(cards))}</p>',
            '<div class="grid quantities" data-least="400">',
            *(_quantity(quantity, rows, groups) for quantity, rows in cards),
            "</div>",
        ]
    )


def _how(cards: Sequence[tuple[Quantity, Sequence[Row]]]) -> str:
    found = [row.difference for _, rows in cards for row in rows if row.difference]
    texts = ["Means and differences with 95 % intervals; grey: the interval holds 0, or there is none"]
    if any(difference.made_of == "pairs" for difference in found):
        texts.append("runs of the same seed are paired")
    counts = [difference.count for difference in found if difference.made_of in ("pairs", "runs")]
    if any(1 < count < BOOTSTRAPPED for count in counts):
        texts.append(f"Student's t interval below {BOOTSTRAPPED} seeds, a bootstrap over seeds from there on")
    elif counts and max(counts) > 1:
        texts.append("a bootstrap over seeds")
    if any(difference.made_of == "problems" for difference in found):
        texts.append("with one run each, an interval covers the held-out problems alone and not the seed")
    return "; ".join(texts) + "."


def _quantity(quantity: Quantity, rows: Sequence[Row], groups: Sequence[Group]) -> str:
    edges = [edge for row in rows if row.difference for edge in row.difference.estimate if not math.isnan(edge)]
    reach = max((abs(edge) for edge in edges), default=0.0) or 1.0
    write, unit = _format_of(quantity, rows), "%" if quantity.is_share else ""
    lines = []
    for row in rows:
        index = groups.index(row.group)
        mean, *_ = row.estimate
        width = (row.estimate.high - row.estimate.low) / 2
        error = "" if math.isnan(width) else f' <span class="error">± {write(width)}</span>'
        name = f'<span class="swatch" style="--run: var(--c{index % 8})"></span> {escape(row.group.name)}'
        several = f' <span class="muted">({row.count})</span>' if row.count > 1 else ""
        lines.append(
            f'<tr><th scope="row">{name}{several}</th><td>{write(mean)}{unit}{error}</td>'
            f"{_difference(quantity, row.difference, reach, write)}</tr>"
        )
    note = f'<p class="note">{escape(quantity.note)}</p>' if quantity.note else ""
    return (
        f'<article class="card quantity"><h3>{escape(quantity.title)}</h3>{note}'
        f'<table><thead class="hidden"><tr><th>Group</th><th>Mean</th><th>Difference</th></tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></article>"
    )


def _difference(quantity: Quantity, difference: Difference | None, reach: float, write: Callable[..., str]) -> str:
    if difference is None:
        return '<td class="muted">baseline</td>'
    value, low, high = difference.estimate
    shade = tone(difference, quantity.better)
    shown = [write(edge, "+") for edge in (value, low, high)]
    left, middle, right = (50 + 48 * edge / reach for edge in (low, value, high))
    text, bar = f'<span class="gain {shade}">{shown[0]}</span>', ""
    if not math.isnan(low):
        text += f' <span class="error">{shown[1]} to {shown[2]}</span>'
        bar = f'<i class="span" style="left:{left:.1f}%;width:{right - left:.1f}%"></i>'
    made_of = {"pairs": f"{difference.count} pairs", "runs": "unpaired runs", "problems": "one run each"}
    dot = f'<i class="dot" style="left:{middle:.1f}%"></i>'
    return (
        f'<td title="{made_of[difference.made_of]}">{text}'
        f'<div class="whisker {shade}"><i class="zero"></i>{bar}{dot}</div></td>'
    )


def _format_of(quantity: Quantity, rows: Sequence[Row]) -> Callable[..., str]:
    """How a table writes its numbers: shares in percent, others with three digits of the largest mean."""
    largest = max(abs(row.estimate.value) for row in rows)
    digits = 1 if quantity.is_share else max(0, 2 - math.floor(math.log10(largest))) if largest > 0 else 2

    def write(value: float, sign: str = "") -> str:
        return f"{100 * value if quantity.is_share else value:{sign}.{digits}f}".replace("-", "−")

    return write


def _signed(points: float) -> str:
    return f"{points:+.1f}".replace("-", "−")
