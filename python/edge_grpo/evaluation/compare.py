"""Whether one evaluation is better than another on the same problems: paired differences and an exact test.

Only results that asked the same problems with the same prompts are compared; other differences become notes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from edge_grpo.config.seeds import derive_seed
from edge_grpo.evaluation.estimators import Estimate, averages, sign_flip_p_value
from edge_grpo.evaluation.result import Result
from edge_grpo.run.files import finite


@dataclass(frozen=True)
class Row:
    """One set, or all problems: the accuracies of both, the difference second minus first with its interval.

    ``better`` and ``worse`` count the problems on which the second has the higher or the lower accuracy. ``p_value`` is
    that of the exact sign-flip test over problems, McNemar's for one response each; NaN where there is no such test.
    """

    problems: int
    first: float
    second: float
    difference: Estimate
    better: int
    worse: int
    p_value: float


@dataclass(frozen=True)
class Comparison:
    """``sets`` by name, ``micro`` over all problems, ``macro`` over the sets (no test), and ``others``: the micro
    difference of every other quantity that both have. ``notes`` say what else differs between the two."""

    sets: dict[str, Row]
    micro: Row
    macro: Row
    others: dict[str, Estimate]
    notes: list[str]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, NaN as null."""

        def plain(value: Any) -> Any:
            if isinstance(value, Row):
                return {key: plain(item) for key, item in vars(value).items()}
            if isinstance(value, Estimate):
                return {key: plain(item) for key, item in value._asdict().items()}
            if isinstance(value, dict):
                return {key: plain(item) for key, item in value.items()}
            return finite(value) if isinstance(value, float) else value

        return {key: plain(value) for key, value in vars(self).items()}


def compare(first: Result, second: Result) -> Comparison:
    """Return the differences of ``second`` from ``first``, problem by problem.

    Raises ValueError for an unfinished result, and where sets, problems, accepted answers or prompts differ: there
    would be no pairs, or the prompts would be compared and not the models.
    """
    _check(first, second)
    before = {name: part.evaluation.quantities() for name, part in first.sets.items()}
    after = {name: part.evaluation.quantities() for name, part in second.sets.items()}
    shared = [key for key in next(iter(before.values())) if key in next(iter(after.values()))]
    gains = {name: {key: after[name][key] - before[name][key] for key in shared} for name in before}
    per_set, micro, macro = averages(
        gains, lambda name: derive_seed(first.protocol.seed, "bootstrap", name), (-1.0, 1.0)
    )
    whole = {name: _differences(first, second, name) for name in gains}
    sizes = {name: len(values) for name, values in whole.items()}
    means = {name: (before[name]["accuracy"].mean(), after[name]["accuracy"].mean()) for name in gains if sizes[name]}

    def row(names: list[str], accuracies: tuple[float, float], difference: Estimate, *, tested: bool = True) -> Row:
        values = [value for name in names for value in whole[name]]
        return Row(
            problems=len(values),
            first=float(accuracies[0]),
            second=float(accuracies[1]),
            difference=difference,
            better=sum(value > 0 for value in values),
            worse=sum(value < 0 for value in values),
            p_value=sign_flip_p_value(values) if tested else math.nan,
        )

    def over(weights: dict[str, float]) -> tuple[float, float]:
        total = sum(weights.values())
        return (
            sum(weights[name] * means[name][0] for name in means) / total,
            sum(weights[name] * means[name][1] for name in means) / total,
        )

    names = list(means)
    return Comparison(
        sets={name: row([name], means[name], per_set[name]["accuracy"]) for name in names},
        micro=row(names, over({name: sizes[name] for name in names}), micro["accuracy"]),
        macro=row(names, over(dict.fromkeys(names, 1.0)), macro["accuracy"], tested=False),
        others={key: micro[key] for key in shared if key != "accuracy"},
        notes=_notes(first, second),
    )


def _check(first: Result, second: Result) -> None:
    for which, result in (("first", first), ("second", second)):
        if not result.is_complete:
            raise ValueError(f"the {which} result is not finished; finish it with edge-grpo eval ... --resume")
        if not any(part.problems for part in result.sets.values()):
            raise ValueError(f"the {which} result holds no problems")
    if first.sets.keys() != second.sets.keys():
        raise ValueError(
            f"results must be over the same sets; got {', '.join(first.sets)} and {', '.join(second.sets)}; evaluate "
            "with the same --suite and --sets"
        )
    different = [name for name, part in first.sets.items() if part.fingerprint != second.sets[name].fingerprint]
    if different:
        listed = "; ".join(
            f"{name}: {first.sets[name].problems} problems of {first.sets[name].data} and "
            f"{second.sets[name].problems} of {second.sets[name].data}"
            for name in different
        )
        raise ValueError(f"results must be over the same problems and answers; they differ in {listed}")
    templates = first.protocol.template, second.protocol.template
    if templates[0] != templates[1]:
        how = " and ".join(f"{template['name']} ({template['text']!r})" for template in templates)
        raise ValueError(f"results must use the same template; got {how}; evaluate both with one --template")


def _differences(first: Result, second: Result, name: str) -> list[int]:
    """Each problem's difference of accuracies, in the unit that makes them all whole."""
    sizes = first.protocol.generations, second.protocol.generations
    common = math.lcm(*sizes)
    return [
        new.num_correct * (common // sizes[1]) - old.num_correct * (common // sizes[0])
        for old, new in zip(first.sets[name].evaluation.results, second.sets[name].evaluation.results, strict=True)
    ]


def _notes(first: Result, second: Result) -> list[str]:
    notes = []
    if first.model["weights"] == second.model["weights"]:
        notes.append("both results are from the same weights")
    for key in ("generations", "temperature", "max_tokens", "window", "engine", "answer", "reasoning", "tolerance"):
        pair = getattr(first.protocol, key), getattr(second.protocol, key)
        if pair[0] != pair[1]:
            notes.append(f"{key} differs: {pair[0]} and {pair[1]}")
    if first.model["precision"] != second.model["precision"]:
        notes.append(f"precision differs: {first.model['precision']} and {second.model['precision']}")
    for package in sorted(first.versions.keys() & second.versions.keys()):
        if first.versions[package] != second.versions[package]:
            notes.append(f"{package} differs: {first.versions[package]} and {second.versions[package]}")
    if first.grader != second.grader:
        notes.append("graded by different versions; grade one again: edge-grpo eval RESULT.json --json NEW.json")
    return notes
