"""Groups of runs that differ in their seed alone, and how groups differ from a baseline, with intervals.

Reading runs is ``edge_grpo.run.history``'s, drawing what is found here ``page``'s and ``cards``'s.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean, stdev
from typing import Any

import numpy as np

from edge_grpo.config import TrainConfig, flatten, to_dict
from edge_grpo.evaluation.estimators import Estimate, bootstrap_means, interval, student_t
from edge_grpo.run.history import Run

BOOTSTRAPPED = 8  # runs or pairs; a bootstrap over fewer sees too little, and Student's t takes its place
_NORMAL = 1.96
_NO_DIFFERENCE = ("seed", "output", "trackers", "save_every")  # keys that do not make runs different experiments

BySeed = Mapping[Any, Sequence[float]]  # a quantity's values, by the seed of the run


@dataclass
class Group:
    """Runs that count as one experiment. ``varies`` names other keys than the seed that differ among them."""

    name: str
    runs: list[Run]
    varies: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Difference:
    """A mean difference with its 95 % interval, and what that is made of: "pairs" (of ``count`` seeds that both groups
    have), "runs" (means of unpaired runs), or "problems" (one run each: of the evaluation alone)."""

    estimate: Estimate
    made_of: str
    count: int

    @property
    def clear(self) -> bool:
        """Whether the interval leaves 0 out; NaN bounds do not."""
        return self.estimate.low > 0 or self.estimate.high < 0


@dataclass(frozen=True)
class Quantity:
    """A number that a run ends with. ``better`` is 1 or -1 where more or less of it is better, else 0."""

    title: str
    note: str
    value: Callable[[Run], tuple[float, float | None] | None]  # with its standard error, where one run has one
    is_share: bool
    better: int


@dataclass(frozen=True)
class Row:
    """A group's mean over its runs, and its difference from the baseline (None for the baseline, and without data)."""

    group: Group
    estimate: Estimate
    count: int
    difference: Difference | None


def make_groups(runs: Sequence[Run], keys: Sequence[str] | None = None) -> list[Group]:
    """Return the runs in groups of equal values of the configuration's ``keys``, in the order in which they appear.

    By default the keys are all in which the runs differ, but for the seed and where or how often a run writes; if then
    no two runs are alike, or ``keys`` is empty, each run is a group of its own name. Raises ValueError for a key that
    no configuration has.
    """
    defaults = flatten(to_dict(TrainConfig()))  # an older run's configuration lacks the keys of today
    settings = [defaults | flatten(run.config) if run.config else {} for run in runs]
    present = [each for each in settings if each]
    different = [key for key in _in_order(present) if len({repr(each.get(key)) for each in present}) > 1]
    if keys is None:
        chosen = [key for key in different if key not in _NO_DIFFERENCE]
    else:
        chosen = list(keys)
        known = {key for each in settings for key in each}
        if unknown := [key for key in chosen if key not in known]:
            raise ValueError(
                f"--group names keys of the runs' configuration; got {', '.join(unknown)}; the runs differ in: "
                f"{', '.join(different) or 'nothing'}"
            )
    found: dict[tuple[str, ...] | None, list[int]] = {}
    for index, each in enumerate(settings):
        found.setdefault(tuple(repr(each.get(key)) for key in chosen) if each else None, []).append(index)
    if (keys is None and len(found) == len(runs)) or (keys is not None and not chosen) or len(runs) == 1:
        return [Group(run.name, [run]) for run in runs]
    named = _telling(chosen, [values for values in found if values is not None]) if keys is None else chosen
    groups = []
    for members in found.values():
        each = settings[members[0]]
        label = ", ".join(_label(key, each.get(key), named) for key in named) if each else "no configuration"
        inside = [settings[index] for index in members]
        varies = [key for key in different if key not in _NO_DIFFERENCE and len({repr(e.get(key)) for e in inside}) > 1]
        groups.append(Group(label or "all runs", [runs[index] for index in members], varies))
    return groups


def _telling(keys: Sequence[str], groups: Sequence[tuple[str, ...]]) -> list[str]:
    """Return a few of the keys, the most telling first, that tell the groups of values apart: what their names need."""
    order = sorted(range(len(keys)), key=lambda i: (keys[i] != "method", keys[i] == "steps"))
    taken: list[int] = []

    def kinds(of: Sequence[int]) -> int:
        return len({tuple(values[i] for i in of) for values in groups})

    while kinds(taken) < len(groups):
        taken.append(max((i for i in order if i not in taken), key=lambda i: (keys[i] == "method", kinds([*taken, i]))))
    return [keys[i] for i in order if i in taken]


def _in_order(settings: Sequence[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(key for each in settings for key in each))


def _label(key: str, value: Any, keys: Sequence[str]) -> str:
    """A method by its name alone; any other value after its key, of which the last part will do where it is unique."""
    text = f"{value:g}" if isinstance(value, float) else str(value)
    if key == "method":
        return text
    short = key.rpartition(".")[2]
    alike = sum(other.rpartition(".")[2] == short for other in keys)
    return f"{short if alike == 1 else key} {text}"


def find_baseline(groups: Sequence[Group], name: str | None = None) -> Group:
    """Return the group of that name; by default that of plain GRPO with the most runs, or else the first.

    Part of a name will do where it fits one group alone. Raises ValueError where none or several fit.
    """
    if name is not None:
        found = [group for group in groups if group.name == name] or [group for group in groups if name in group.name]
        if len(found) == 1:
            return found[0]
        raise ValueError(
            f"--baseline must name one group; got {name!r}, which fits {len(found)}; the groups are: "
            f"{', '.join(group.name for group in groups)}"
        )
    plain = [group for group in groups if all(run.method == "grpo" for run in group.runs)]
    return max(plain or groups[:1], key=lambda group: len(group.runs))


# ---- Quantities ----------------------------------------------------------------------------------------------------


def quantities(groups: Sequence[Group]) -> list[Quantity]:
    """Return what groups are compared in: held-out accuracy in the end and on the way, and the curves of the paper."""

    def mean_of(key: str) -> Callable[[Run], tuple[float, float | None] | None]:
        def value(run: Run) -> tuple[float, float | None] | None:
            values = [value for value in run.columns.get(key, []) if value is not None]
            return (fmean(values), None) if values else None

        return value

    found = []
    if (step := last_common_step(groups)) is not None:

        def at_step(run: Run) -> tuple[float, float | None] | None:
            return next(((point.accuracy, point.stderr) for point in run.evals if point.step == step), None)

        found.append(Quantity(f"Held-out accuracy at step {step}", "", at_step, True, 1))
        if any(len(run.evals) > 1 for group in groups for run in group.runs):
            note = "Area under the held-out curve over the steps: who learns earlier has more."
            found.append(Quantity("Held-out accuracy, mean of the run", note, lambda run: _area(run, step), True, 1))
    return [
        *found,
        Quantity("Collapsed groups before correction", "Mean of the run.", mean_of("collapsed/before"), True, -1),
        Quantity("Collapsed groups after correction", "Mean of the run.", mean_of("collapsed/after"), True, -1),
        Quantity("Advantage variance", "Mean of the run.", mean_of("advantage/var"), False, 0),
        Quantity("Entropy", "Mean of the run, in nats.", mean_of("entropy/token_mean"), False, 0),
    ]


def last_common_step(groups: Sequence[Group]) -> int | None:
    """The last step at which every group has a held-out evaluation."""
    steps = [{point.step for run in group.runs for point in run.evals} for group in groups]
    return max(set.intersection(*steps), default=None) if steps else None


def _area(run: Run, last: int) -> tuple[float, float | None] | None:
    points = [point for point in run.evals if point.step <= last]
    if len(points) < 2 or points[-1].step != last:
        return None
    parts = [(b.step - a.step) * (a.accuracy + b.accuracy) / 2 for a, b in itertools.pairwise(points)]
    return sum(parts) / (points[-1].step - points[0].step), None


# ---- Estimates -----------------------------------------------------------------------------------------------------


def compare(groups: Sequence[Group], baseline: Group, quantity: Quantity) -> list[Row]:
    """Return a row for each group that has the quantity; the differences are the group's minus the baseline's."""
    base = _by_seed(baseline, quantity.value)
    rows = []
    for group in groups:
        own = _by_seed(group, quantity.value)
        values = [value for several in own.values() for value, _ in several]
        if values:
            estimate = mean_interval(values)
            if len(values) == 1 and (error := next(iter(own.values()))[0][1]) is not None:
                estimate = _around(values[0], _NORMAL * error)
            difference = None if group is baseline or not base else difference_of(own, base)
            rows.append(Row(group, estimate, len(values), difference))
    return rows


def curve_of_differences(group: Group, baseline: Group) -> list[tuple[int, Difference]]:
    """Return the differences in held-out accuracy at each step at which both groups have an evaluation."""
    if last_common_step([group, baseline]) is None:
        return []
    steps = sorted({p.step for run in group.runs for p in run.evals} & {p.step for r in baseline.runs for p in r.evals})
    found = []
    for step in steps:

        def at_step(run: Run, step: int = step) -> tuple[float, float | None] | None:
            return next(((point.accuracy, point.stderr) for point in run.evals if point.step == step), None)

        own, base = _by_seed(group, at_step), _by_seed(baseline, at_step)
        found.append((step, difference_of(own, base)))
    return found


Valued = dict[Any, list[tuple[float, float | None]]]


def _by_seed(group: Group, value: Callable[[Run], tuple[float, float | None] | None]) -> Valued:
    found: Valued = {}
    for run in group.runs:
        if (own := value(run)) is not None:
            found.setdefault((run.config or {}).get("seed"), []).append(own)
    return found


def difference_of(own: Valued, base: Valued) -> Difference:
    """Return the mean of ``own`` minus that of ``base``, whose values, with standard errors, are given by seed.

    Of two or more seeds that both have, the differences within each seed count, and the runs of other seeds do not;
    runs of one seed are averaged first. Without such pairs the means of all runs are compared.
    """
    shared = [seed for seed in own if seed in base and seed is not None]
    if len(shared) > 1:
        pairs = [fmean(v for v, _ in own[seed]) - fmean(v for v, _ in base[seed]) for seed in shared]
        return Difference(mean_interval(pairs), "pairs", len(pairs))
    first = [value for several in own.values() for value in several]
    second = [value for several in base.values() for value in several]
    a, b = [value for value, _ in first], [value for value, _ in second]
    gap = fmean(a) - fmean(b)
    if len(a) == len(b) == 1:
        errors = first[0][1], second[0][1]
        width = math.nan if None in errors else _NORMAL * math.hypot(*(error or 0.0 for error in errors))
        return Difference(_around(gap, width), "problems", 1)
    if min(len(a), len(b)) == 1:
        return Difference(_around(gap, math.nan), "runs", 1)
    count = min(len(a), len(b))
    if count >= BOOTSTRAPPED:
        draws = bootstrap_means(_column(a), 0) - bootstrap_means(_column(b), 1)
        return Difference(Estimate(gap, *interval(draws, count)), "runs", count)
    error = math.hypot(stdev(a) / math.sqrt(len(a)), stdev(b) / math.sqrt(len(b)))
    # Of the two groups' degrees of freedom the fewer: conservative.
    return Difference(_around(gap, student_t(count - 1) * error), "runs", count)


def mean_interval(values: Sequence[float]) -> Estimate:
    """Return the mean of one value a seed with its 95 % interval, NaN for one value or values that are all the same.

    The expanded percentile bootstrap over ``BOOTSTRAPPED`` or more values; of fewer resampling sees too little (of two
    it would leave 0 out whenever they share a sign), and the interval is Student's t.
    """
    mean = fmean(values)
    if min(values) == max(values):
        return _around(mean, math.nan)
    if len(values) >= BOOTSTRAPPED:
        return Estimate(mean, *interval(bootstrap_means(_column(values), 0), len(values)))
    return _around(mean, student_t(len(values) - 1) * stdev(values) / math.sqrt(len(values)))


def _column(values: Sequence[float]) -> np.ndarray[Any, np.dtype[np.float64]]:
    return np.array(values, dtype=np.float64)[:, None]


def _around(value: float, width: float) -> Estimate:
    return Estimate(value, value - width, value + width)
