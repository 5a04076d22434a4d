"""The tables of docs/study.md, between its markers, and its plots; all of it follows from ``results.json`` alone."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path

from benchmarks.study import plots
from benchmarks.study.design import HARD, IN_FLOAT32, SEEDS, SHOWN, Cell, cells
from benchmarks.study.outcomes import (
    THRESHOLD,
    Record,
    area,
    at_step,
    at_tokens,
    collapses,
    mean_curve,
    mean_of,
    median_reach,
    paired,
    reaches,
)
from benchmarks.study.results import Made, Results
from edge_grpo.evaluation.estimators import Estimate
from edge_grpo.report.groups import mean_interval

DOCS = Path(__file__).resolve().parents[2] / "docs"
PAGE = DOCS / "study.md"
STEPS = (20, 40, 80)


def draw(results: Results) -> list[Path]:
    """Rewrite the tables of the page and the plots; return the files."""
    made = Made(results)
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8"), made), encoding="utf-8")
    return [PAGE, *plots.draw(made, DOCS)]


def filled(text: str, made: Made) -> str:
    """The page with every table between its markers replaced."""
    for name, lines in tables(made).items():
        parts = re.split(rf"(<!-- (?:begin|end) {name} -->\n)", text)
        if len(parts) != 5:
            raise ValueError(
                f"{PAGE.name} must have one pair of markers for the table {name!r}; it has {len(parts) // 2} markers"
            )
        parts[2] = "\n".join(lines) + "\n"
        text = "".join(parts)
    return text


def tables(made: Made) -> dict[str, list[str]]:
    """The lines of each table by the name of its markers."""
    return {
        "methods": list(_outcomes(made, made.cells("methods"), "GRPO")),
        "parts": list(_parts(made)),
        "controls": list(_outcomes(made, made.cells("controls"), "GRPO")),
        "kinds": list(_outcomes(made, made.cells("kinds"), "EDGE, collapsed")),
        "injected": list(_outcomes(made, made.cells("injected"), "EDGE, collapsed")),
        "published": list(_outcomes(made, made.cells("published"), "EDGE, all")),
        "settings": list(_settings(made)),
        "curves": list(_curves(made)),
        "rates": list(_rates(made)),
        "smollm2": list(_smollm2(made)),
    }


_HEADER = (
    "rate",
    *(f"avg@4 at step {step}" for step in STEPS),
    "at {tokens:g} k tokens",
    "difference there",
    "mean of the run",
    "difference of the mean",
    "difference at the end",
    f"steps to {100 * THRESHOLD:.0f} %",
    "k tokens to it",
    "never reach it",
    "collapse",
)


def _outcomes(made: Made, chosen: Sequence[Cell], baseline: str) -> Iterator[str]:
    if not chosen:
        yield "(no results yet)"
        return
    tokens = chosen[0].setting.tokens
    yield _row("", (title.format(tokens=tokens) for title in _HEADER))
    yield _row("---", ("---" for _ in _HEADER))
    base = next(cell for cell in cells() if cell.key == f"{chosen[0].setting.name}: {baseline}")
    if base.key in made.runs and base not in chosen:
        yield _outcome_row(made, base, [], tokens)
    for cell in chosen:
        yield _outcome_row(made, cell, [] if cell == base else made.runs.get(base.key, []), tokens)


def _outcome_row(made: Made, cell: Cell, base: Sequence[Record], tokens: float) -> str:
    runs = made.runs[cell.key]
    return _row(
        _name(cell, runs),
        (
            _rate(made.rates[cell.key]),
            *(_share(mean_of(runs, partial(at_step, step=step)).value) for step in STEPS),
            "-" if cell.supervised else _share(mean_of(runs, partial(at_tokens, tokens=tokens)).value),
            "-" if cell.supervised else _gap(paired(runs, base, partial(at_tokens, tokens=tokens))),
            _share(mean_of(runs, area).value),
            _gap(paired(runs, base, area)),
            _gap(paired(runs, base, partial(at_step, step=cell.setting.steps))),
            _number(median_reach(runs, "steps")),
            "-" if cell.supervised else _number(median_reach(runs, "tokens")),
            f"{sum(reaches(run, 'steps') is None for run in runs)} of {len(runs)}",
            f"{sum(map(collapses, runs))} of {len(runs)}",
        ),
    )


def _name(cell: Cell, runs: Sequence[Record]) -> str:
    return cell.name if len(runs) == len(cell.setting.seeds) else f"{cell.name} ({len(runs)} seeds)"


def _parts(made: Made) -> Iterator[str]:
    """What each part adds to the mean of the run, alone and to the other, and what they add together beyond that."""
    yield _row("scope of GEC", ("EDA alone", "GEC alone", "EDA, given GEC", "GEC, given EDA", "interaction"))
    yield _row("---", ("---",) * 5)
    for scope in ("all", "collapsed", "one"):
        four = [made.of(name) for name in ("GRPO", "EDA", f"GEC, {scope}", f"EDGE, {scope}")]
        if not all(four):
            continue
        by_seed = [{run["seed"]: area(run) for run in runs} for runs in four]
        seeds = sorted(set.intersection(*map(set, by_seed)))
        neither, eda, gec, both = ([found[seed] for seed in seeds] for found in by_seed)
        pairs = [(eda, neither), (gec, neither), (both, gec), (both, eda)]
        gaps = [mean_interval([a - b for a, b in zip(own, base, strict=True)]) for own, base in pairs]
        excess = mean_interval([b - g - e + n for n, e, g, b in zip(neither, eda, gec, both, strict=True)])
        yield _row(scope, map(_gap, [*gaps, excess]))


def _settings(made: Made) -> Iterator[str]:
    yield _row("", ("method", "rate", *(f"at step {s}" for s in STEPS), "mean of the run", "difference of the mean"))
    yield _row("---", ("---",) * (4 + len(STEPS)))
    names = list(dict.fromkeys(cell.name for cell in made.cells("settings")))
    at_home = [cell for cell in (*made.cells("methods"), *made.cells("controls")) if cell.name in names]
    for cell in [*at_home, *made.cells("settings")]:
        runs, base = made.runs[cell.key], made.runs.get(f"{cell.setting.name}: GRPO", [])
        shares = (_share(mean_of(runs, partial(at_step, step=step)).value) for step in STEPS)
        gap = "" if cell.name == "GRPO" else _gap(paired(runs, base, area))
        rate = _rate(made.rates[cell.key])
        yield _row(cell.setting.name, (_name(cell, runs), rate, *shares, _share(mean_of(runs, area).value), gap))


_CURVES = {
    "entropy": "entropy, nats",
    "advantage_var": "variance of the advantages",
    "collapsed_before": "collapsed groups before correction",
    "collapsed_after": "after correction",
    "weight": "mean entropy weight",
    "injected": "injected tokens",
    "length": "tokens of a response",
}


def _curves(made: Made) -> Iterator[str]:
    yield _row("mean of the run", _CURVES.values())
    yield _row("---", ("---" for _ in _CURVES))
    for cell in [*made.cells("methods"), *made.cells("controls")]:
        means = {name: mean_of(made.runs[cell.key], partial(mean_curve, name=name)).value for name in _CURVES}
        shares = ("collapsed_before", "collapsed_after", "injected")
        yield _row(cell.name, (_share(v) if name in shares else f"{v:.2g}" for name, v in means.items()))


def _rates(made: Made) -> Iterator[str]:
    """The mean of the run at each rate that was tried, over the tuning seeds."""
    rates = sorted({rate for cell in cells() for rate in made.results.tuning(cell)})
    yield _row("", ("seeds", *map(_rate, rates)))
    yield _row("---", ("---",) * (1 + len(rates)))
    for cell in cells():
        tuned = made.results.tuning(cell)
        if cell.rate_of is None and tuned:
            best = made.results.best_rate(cell)
            shares = {rate: _share(mean_of(runs, area).value) for rate, runs in tuned.items()}
            texts = (f"**{shares[rate]}**" if rate == best else shares.get(rate, "") for rate in rates)
            yield _row(cell.key, (str(len(cell.tuning_seeds)), *texts))


def _smollm2(made: Made) -> Iterator[str]:
    chosen = made.cells("smollm2")
    if not chosen:
        yield "(no results yet)"
        return
    steps = max((run["steps"] for cell in chosen for run in made.runs[cell.key]), key=len)  # one may have diverged
    yield _row("", ("rate", *(f"at step {step}" for step in steps), "each seed", "difference at the end", "k tokens"))
    yield _row("---", ("---",) * (4 + len(steps)))
    for cell in chosen:
        baseline = f"GRPO, {IN_FLOAT32}" if cell.name.endswith(IN_FLOAT32) else "GRPO at that rate"
        runs, base = made.runs[cell.key], made.runs.get(f"{cell.setting.name}: {baseline}", [])
        shares = [_share(mean_of(runs, partial(at_step, step=step)).value) for step in steps]
        ends = ", ".join(_share(run["accuracy"][-1]) for run in runs)
        gap = "" if cell.name == baseline else _gap(paired(runs, base, partial(at_step, step=steps[-1])))
        tokens = f"{mean_of(runs, lambda run: run['tokens'][-1]).value:.1f}"
        yield _row(_name(cell, runs), (_rate(made.rates[cell.key]), *shares, ends, gap, tokens))


def quick_table(results: Results, tuned: Results) -> list[str]:
    """The lines of a table of the quick study: its own results beside those that are kept."""
    lines = [_row("mean held-out accuracy of the run", ("seeds", "here", "difference from GRPO", "in the study"))]
    chosen = [cell for cell in cells() if cell.setting == HARD and cell.name in SHOWN]
    runs = {cell.name: results.of(cell, tuned.best_rate(cell) or 0.0, SEEDS) for cell in chosen}
    for cell in chosen:
        known = tuned.of(cell, tuned.best_rate(cell) or 0.0, SEEDS)
        gap = "" if cell.name == "GRPO" else _gap(paired(runs[cell.name], runs["GRPO"], area))
        shares = [_share(mean_of(found, area).value) if found else "-" for found in (runs[cell.name], known)]
        lines.append(_row(cell.name, (str(len(runs[cell.name])), shares[0], gap, shares[1])))
    return lines


def _row(first: str, rest: Iterable[str]) -> str:
    return "| " + " | ".join([first, *rest]) + " |"


def _rate(value: float) -> str:
    return f"{value:.2g}".replace("e-0", "e-") if value < 1e-4 else f"{1e4 * value:.3g}e-4"


def _share(value: float) -> str:
    return f"{100 * value:.0f}"


def _gap(estimate: Estimate | None) -> str:
    """A difference in points with its interval, in bold where that leaves 0 out."""
    if estimate is None:
        return ""
    value, low, high = (100 * bound for bound in estimate)
    text = f"{value:+.1f} ({low:+.1f} to {high:+.1f})"
    return f"**{text}**" if low > 0 or high < 0 else text


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f}"
