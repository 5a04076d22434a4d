"""Groups of runs: which runs are one, what differences are made of, and when one is clear."""

from __future__ import annotations

import math
import random
import re
from pathlib import Path

import pytest
import yaml
from report_page import Page
from run_folder import make_run

from edge_grpo.commands.tables import print_groups
from edge_grpo.config import TrainConfig
from edge_grpo.report.cards import tone
from edge_grpo.report.groups import (
    BOOTSTRAPPED,
    Group,
    compare,
    curve_of_differences,
    difference_of,
    find_baseline,
    make_groups,
    mean_interval,
    quantities,
)
from edge_grpo.report.page import write_report
from edge_grpo.run.history import Point, Run


def run_of(method: str, seed: int, *accuracies: float, **settings: object) -> Run:
    """A run with held-out evaluations at steps 0, 10, 20, ..."""
    run = Run(Path(), f"{method}-{seed}", {"method": method, "seed": seed, "output": f"o{seed}", **settings})
    run.evals = [Point(10 * i, 0.0, 0.0, value, 0.03) for i, value in enumerate(accuracies)]
    return run


def names(groups: list[Group]) -> dict[str, list[str]]:
    return {group.name: [run.name for run in group.runs] for group in groups}


# ---- Which runs are one group


def test_runs_that_differ_in_the_seed_alone_are_one_group() -> None:
    runs = [run_of(method, seed) for seed in (0, 1) for method in ("grpo", "edge")]
    assert names(make_groups(runs)) == {"grpo": ["grpo-0", "grpo-1"], "edge": ["edge-0", "edge-1"]}
    runs = [run_of("edge", seed, optim={"learning_rate": rate}) for rate in (1e-4, 3e-4) for seed in (0, 1)]
    assert list(names(make_groups(runs))) == ["learning_rate 0.0001", "learning_rate 0.0003"]
    assert names(make_groups(runs[:2])) == {"all runs": ["edge-0", "edge-1"]}


def test_runs_of_which_no_two_are_alike_stay_alone() -> None:
    runs = [run_of("grpo", 0), run_of("edge", 1)]
    assert names(make_groups(runs)) == {"grpo-0": ["grpo-0"], "edge-1": ["edge-1"]}
    alike = [run_of("grpo", 0), run_of("grpo", 1)]
    assert names(make_groups(alike, [])) == {"grpo-0": ["grpo-0"], "grpo-1": ["grpo-1"]}
    older = run_of("grpo", 2, steps=TrainConfig().steps)  # which is what the others mean
    assert list(names(make_groups([*alike, older, run_of("edge", 0)]))) == ["grpo", "edge"]
    lost = Run(Path(), "lost", None)
    assert names(make_groups([*alike, lost])) == {"all runs": ["grpo-0", "grpo-1"], "no configuration": ["lost"]}


def test_names_take_the_keys_that_tell_groups_apart() -> None:
    """Three keys differ; method and learning rate are enough, because the number of steps goes with the rate."""
    runs = [
        run_of(method, seed, steps=steps, optim={"learning_rate": rate})
        for method in ("grpo", "edge")
        for steps, rate in ((10, 1e-4), (20, 3e-4))
        for seed in (0, 1)
    ]
    assert len(make_groups(runs)) == 4
    named = [group.name for group in make_groups(runs)]
    assert named[:2] == ["grpo, learning_rate 0.0001", "grpo, learning_rate 0.0003"]
    assert named[2:] == ["edge, learning_rate 0.0001", "edge, learning_rate 0.0003"]
    assert [group.name for group in make_groups(runs[:4])] == ["learning_rate 0.0001", "learning_rate 0.0003"]


def test_keys_make_the_groups_and_what_else_varies_is_said() -> None:
    runs = [run_of(method, 0, steps=steps) for method in ("grpo", "edge") for steps in (10, 20)]
    groups = make_groups(runs, ["method"])
    assert [(group.name, len(group.runs), group.varies) for group in groups] == [
        ("grpo", 2, ["steps"]),
        ("edge", 2, ["steps"]),
    ]
    assert [group.name for group in make_groups(runs, ["method", "steps"])][:2] == ["grpo, steps 10", "grpo, steps 20"]
    with pytest.raises(ValueError, match=r"--group names keys .*; got metod; the runs differ in: method, steps"):
        make_groups(runs, ["metod"])


def test_the_baseline() -> None:
    groups = make_groups([run_of("edge", 0), run_of("grpo", 0), run_of("gec", 0)])
    assert find_baseline(groups).name == "grpo-0"  # plain GRPO
    assert find_baseline(groups[::2]).name == "edge-0"  # without it, the first
    plain = [Group("b", [run_of("grpo", 0)]), Group("c", [run_of("grpo", i) for i in (1, 2)])]
    assert find_baseline([*groups[::2], *plain]).name == "c"  # of two, the one with more runs
    assert find_baseline(groups, "gec").name == "gec-0"
    with pytest.raises(ValueError, match=r"--baseline must name one group; got 'g', which fits 3; .*: edge-0, grpo-0"):
        find_baseline(groups, "g")


# ---- What a difference is


def test_an_interval_of_few_seeds_is_students() -> None:
    """Of 0.1, 0.2 and 0.6 by hand: mean 0.3, standard deviation 0.2646, and t of two degrees of freedom is 4.303."""
    assert mean_interval([0.1, 0.2, 0.6]) == pytest.approx((0.3, 0.3 - 0.6573, 0.3 + 0.6573), abs=1e-4)
    assert math.isnan(mean_interval([0.5]).low)
    assert math.isnan(mean_interval([0.5, 0.5]).low)  # two equal values do not make one certain


def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    """At 2 (one degree of freedom) and 5 seeds by Student's t, at 8 by the bootstrap."""
    rng = random.Random(0)
    for count, least in ((2, 0.9), (5, 0.9), (8, 0.9)):
        trials = 200 if count < BOOTSTRAPPED else 100
        found = [mean_interval([rng.gauss(1, 1) for _ in range(count)]) for _ in range(trials)]
        assert sum(low <= 1 <= high for _, low, high in found) / trials >= least, count


def test_seeds_are_paired() -> None:
    """Seeds that are far apart, and a gain of 2 points in each: clear only because the seeds are paired."""
    base = {seed: [(level, None)] for seed, level in enumerate((0.1, 0.5, 0.9, 0.3))}
    gains = {0: 0.02, 1: 0.021, 2: 0.019, 3: 0.02}
    own = {seed: [(base[seed][0][0] + gain, None)] for seed, gain in gains.items()}
    paired = difference_of(own, base)
    assert (paired.made_of, paired.count, paired.clear) == ("pairs", 4, True)
    assert paired.estimate.value == pytest.approx(0.02)
    unpaired = difference_of({seed + 10: values for seed, values in own.items()}, base)
    assert (unpaired.made_of, unpaired.clear) == ("runs", False)
    partly = difference_of({**own, 99: [(0.0, None)]}, base)  # a seed that the baseline lacks does not count
    assert partly.estimate == paired.estimate


def test_one_run_each_has_the_evaluations_error() -> None:
    first, second = {0: [(0.55, 0.03)]}, {0: [(0.50, 0.04)]}
    found = difference_of(first, second)
    assert (found.made_of, found.clear) == ("problems", False)
    assert found.estimate == pytest.approx((0.05, 0.05 - 1.96 * 0.05, 0.05 + 1.96 * 0.05))
    assert not difference_of({0: [(0.55, None)]}, second).clear  # nothing is known of its error
    assert math.isnan(difference_of({0: [(0.9, 0.03)], 1: [(0.1, 0.03)]}, second).estimate.low)


@pytest.mark.parametrize(("gain", "better", "shade"), [(0.2, 1, "up"), (-0.2, 1, "down"), (0.2, -1, "down")])
def test_only_a_clear_difference_is_coloured(gain: float, better: int, shade: str) -> None:
    base = {0: [(0.5, 0.03)]}
    assert tone(difference_of({0: [(0.5 + gain, 0.03)]}, base), better) == shade
    assert tone(difference_of({0: [(0.5 + gain / 4, 0.03)]}, base), better) == "within"
    assert tone(difference_of({0: [(0.5 + gain, 0.03)]}, base), 0) == "clear"


# ---- What is compared


def test_accuracy_is_compared_at_the_last_step_that_all_groups_have() -> None:
    """The second run of edge stopped at step 10: it is left out at step 20, and its seed has no pair there."""
    runs = [run_of("grpo", 0, 0.2, 0.4, 0.6), run_of("grpo", 1, 0.2, 0.2, 0.4, 0.9)]
    runs += [run_of("edge", 0, 0.2, 0.6, 0.7), run_of("edge", 1, 0.2, 0.5), run_of("edge", 2, 0.2, 0.7, 0.9)]
    groups = make_groups(runs)
    end, area = quantities(groups)[:2]
    assert end.title == "Held-out accuracy at step 20"
    base, own = compare(groups, groups[0], end)
    assert (base.count, own.count, base.difference) == (2, 2, None)
    assert (base.estimate.value, own.estimate.value) == pytest.approx((0.5, 0.8))
    assert own.difference is not None
    assert (own.difference.made_of, own.difference.estimate.value) == ("runs", pytest.approx(0.3))
    assert area.value(runs[0]) == (pytest.approx(0.4), None)  # (0.3 + 0.5) / 2: two trapezoids of ten steps
    curve = curve_of_differences(groups[1], groups[0])
    assert [step for step, _ in curve] == [0, 10, 20]
    assert (curve[1][1].made_of, curve[1][1].estimate.value) == ("pairs", pytest.approx(0.25))


def test_the_terminal_compares_groups(capsys: pytest.CaptureFixture[str]) -> None:
    groups = make_groups([run_of("grpo", s, 0.1, 0.4 + s / 10) for s in range(3)] + [run_of("edge", 0, 0.1, 0.9)])
    print_groups(groups, find_baseline(groups))
    header, grpo, edge, note = capsys.readouterr().out.splitlines()
    assert "Held-out accuracy at step 10, %" in header
    assert "against grpo" in header
    assert grpo.split() == ["grpo", "3", "50.0", "30.0"]  # at the end, and the mean of the run by trapezoids
    assert edge.split() == ["edge", "1", "90.0", "+40.0", "50.0", "+20.0"]  # one run has no interval
    assert "95 %" in note
    print_groups(groups[:1], groups[0])
    assert capsys.readouterr().out == ""


def test_the_page_compares_groups(tmp_path: Path) -> None:
    runs = [
        make_run(tmp_path / f"{method}-{seed}", method=method, steps=12, seed=seed, final_accuracy=final)
        for method, final in (("grpo", 0.5), ("edge", 0.9))
        for seed in range(3)
    ]
    for run in runs:  # as the trainer writes it
        tree = yaml.safe_load((run / "config.yaml").read_text()) | {"seed": int(run.name[-1])}
        (run / "config.yaml").write_text(yaml.safe_dump(tree))
    page = Page(write_report(runs))
    assert "EDGE-GRPO: 6 runs in 2 groups compared" in page.words
    assert "Compared with grpo" in page.words
    assert "runs of the same seed are paired" in page.words
    assert [(group["name"], group["runs"]) for group in page.data["groups"]] == [
        ("grpo", [0, 1, 2]),
        ("edge", [3, 4, 5]),
    ]
    assert page.data["groups"][1]["differences"][0] == {  # every run began with the same evaluation
        "step": 0,
        "value": 0,
        "low": None,
        "high": None,
        "clear": False,
        "n": 3,
    }
    differing = re.findall(r'<tr class="differs"><th scope="row">([^<]*)</th>', page.source)
    assert differing == ["method"]
    assert '<td title="3 pairs"><span class="gain up">' in page.source
    apart = Page(write_report(runs[:2], group=[]))
    assert [group["name"] for group in apart.data["groups"]] == ["grpo-0", "grpo-1"]
    assert 'class="gain within"' in apart.source
    assert "with one run each, an interval covers the held-out problems alone" in apart.words
