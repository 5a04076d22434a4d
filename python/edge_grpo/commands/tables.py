"""Tables on a terminal: an evaluation, a comparison of two, answer sheets, groups of runs.

The figures come from ``edge_grpo.evaluation`` and ``edge_grpo.report``. Everything goes to standard output.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from edge_grpo.evaluation.compare import Comparison, Row
from edge_grpo.evaluation.estimators import Estimate
from edge_grpo.evaluation.result import Result
from edge_grpo.evaluation.sheets import SheetCheck
from edge_grpo.report.groups import Group, compare, quantities
from edge_grpo.text import percent

_ROWS_SHOWN = 12


def print_result(result: Result) -> None:
    """Print a complete result: how the model was asked, a row for each set, and what was left out."""
    protocol = result.protocol
    k = protocol.generations
    how = "greedy" if protocol.temperature == 0 else f"temperature {protocol.temperature:g}"
    each = "1 response" if k == 1 else f"{k} responses"
    per_set, micro, macro = result.estimates()
    print(
        f"{result.model['name']}: template {protocol.template['name']}, {each} each, {how}, at most "
        f"{protocol.max_tokens} tokens, {protocol.engine}"
    )
    quantities = list(micro)
    shown = [quantities[0], *(name for name in (f"pass@{k}", f"maj@{k}") if name in quantities)]
    names = [f"avg@{k}" if name == "accuracy" and k > 1 else name for name in shown]
    table = _table("set", "problems", *names, "wrong", "unparseable", "timed out", "tokens", "cut off")
    for name, part in result.sets.items():
        found, lengths = part.evaluation.outcomes, part.evaluation.lengths()
        _row(
            table,
            name,
            str(part.problems),
            *(_interval(per_set[name][quantity]) for quantity in shown),
            *(_share(found[outcome], part.problems * k) for outcome in ("wrong", "unparseable", "timed_out")),
            _whole(lengths["mean"]),
            percent(lengths["truncated"]),
        )
    if len(result.sets) > 1:
        table.add_section()
        total = sum(part.problems for part in result.sets.values())
        _row(table, "all problems (micro)", str(total), *(_interval(micro[quantity]) for quantity in shown))
        _row(table, "mean of sets (macro)", "", *(_interval(macro[quantity]) for quantity in shown))
    _console().print(table)
    others = [name for name in quantities if name not in shown]
    if others:
        print("  ".join(f"{name} {percent(micro[name].value)}" for name in others) + "  over all problems")
    print("In parentheses: 95 % bootstrap intervals over problems; tokens are means per response.")
    for name, part in result.sets.items():
        if part.left_out:
            print(f"{name}: {len(part.left_out)} prompts were too long and are not counted: {_rows(part.left_out)}")


def print_comparison(found: Comparison, first: Result, second: Result) -> None:
    """Print the differences of two results, with their tests and notes."""
    print(f"A  {first.model['name']}\nB  {second.model['name']}")
    k = first.protocol.generations, second.protocol.generations
    names = [f"avg@{size}" if size > 1 else "accuracy" for size in k]
    table = _table("set", "problems", f"A {names[0]}", f"B {names[1]}", "B - A", "B better", "B worse", "p")

    def add(name: str, row: Row) -> None:
        counts = [str(row.problems), percent(row.first), percent(row.second), _interval(row.difference, signed=True)]
        tested = not math.isnan(row.p_value)
        changed = [str(row.better), str(row.worse), _p_value(row.p_value)] if tested else ["", "", ""]
        _row(table, name, *counts, *changed)

    for name, row in found.sets.items():
        add(name, row)
    if len(found.sets) > 1:
        table.add_section()
        add("all problems (micro)", found.micro)
        add("mean of sets (macro)", found.macro)
    _console().print(table)
    for quantity, difference in found.others.items():
        print(f"{quantity}, all problems: {_interval(difference, signed=True)} points")
    print(
        "B - A in points with paired 95 % bootstrap intervals; p from the exact sign-flip test over problems"
        + (" (McNemar's)" if k == (1, 1) else "")
        + (", not adjusted for testing several sets." if len(found.sets) > 1 else ".")
    )
    for note in found.notes:
        print(f"note: {note}")


def print_checks(checks: Mapping[str, SheetCheck]) -> None:
    """Print how the grader judged the answer sheets of each set, and the rows to look at."""
    sheets = ("perfect", "wrong", "all 0", "all 1", "x 1.001")
    table = _table("set", "problems", *sheets, "misjudged", "text only", "no answer")
    for name, check in checks.items():
        total = sum(check.gold.values())
        _row(
            table,
            name,
            str(total + len(check.unanswered)),
            *(_share(sheet["correct"], total) for sheet in check.sheets),
            str(len(check.rejected) + len(check.accepted)),
            str(len(check.text_only)),
            str(len(check.unanswered)),
        )
    _console().print(table)
    for name, check in checks.items():
        for rows, what in (
            (check.rejected, "the grader rejects the data's own answer"),
            (check.accepted, "the grader accepts a wrong answer"),
            (check.text_only, "not read as mathematics, so only equal text is accepted"),
            (check.unanswered, "no answer"),
        ):
            if rows:
                print(f"{name}: {what}: {_rows(rows)}")


def print_groups(groups: Sequence[Group], baseline: Group) -> None:
    """Print the held-out accuracy of groups of runs, and how each differs from the baseline; nothing for one group."""
    shown = [quantity for quantity in quantities(groups) if quantity.better > 0]
    compared = [compare(groups, baseline, quantity) for quantity in shown]
    if len(groups) < 2 or not any(compared):
        return
    titles = [f"{quantity.title}, %" for quantity in shown]
    table = _table("", "runs", *(name for title in titles for name in (title, f"against {baseline.name}")))
    for group in groups:
        cells = []
        for rows in compared:
            row = next((row for row in rows if row.group is group), None)
            cells.append(f"{100 * row.estimate.value:.1f}" if row else "-")
            cells.append(_interval(row.difference.estimate, signed=True) if row and row.difference else "")
        _row(table, group.name, str(len(group.runs)), *cells)
    _console().print(table)
    print("In parentheses: 95 % intervals, over seeds where a group has several runs.")


def _table(first: str, *others: str) -> Table:
    table = Table(box=None, padding=(0, 1), pad_edge=False)
    table.add_column(first, no_wrap=True)
    for name in others:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _row(table: Table, *cells: str) -> None:
    table.add_row(*map(Text, cells))  # Text: a name in square brackets is no markup


def _console() -> Console:
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=160)


def _interval(estimate: Estimate, *, signed: bool = False) -> str:
    if math.isnan(estimate.value):
        return "-"
    value, low, high = (f"{100 * number:{'+' if signed else ''}.1f}" for number in estimate)
    if math.isnan(estimate.low):
        return value if signed else f"{value}%"
    return f"{value} ({low} to {high})" if signed else f"{value}% ({low}-{high})"


def _share(count: int, total: int) -> str:
    return percent(count / total if total else math.nan)


def _whole(number: float) -> str:
    return "-" if math.isnan(number) else f"{number:,.0f}"


def _p_value(value: float) -> str:
    return f"{value:.3f}" if value >= 0.001 else f"{value:.0e}"


def _rows(rows: Sequence[int]) -> str:
    more = f", and {len(rows) - _ROWS_SHOWN} more" if len(rows) > _ROWS_SHOWN else ""
    return f"row{'s' if len(rows) > 1 else ''} {', '.join(map(str, rows[:_ROWS_SHOWN]))}{more}"
