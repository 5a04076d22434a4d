"""The study: what runs come to, by hand; which runs are missing; a real run of each kind; the page holds its tables."""

from __future__ import annotations

import json
import math

import pytest

from benchmarks.study import draw, outcomes, plots, schedule
from benchmarks.study.design import HARD, SEEDS, SHOWN, Cell, cells
from benchmarks.study.results import FILE, Made, Results
from benchmarks.study.sampler import SmallLlamaEngine
from benchmarks.study.work import CURVES, make_run
from edge_grpo.config import ModelConfig, load_config, recipe_path
from edge_grpo.policy.loading import eos_token_ids, load_model
from edge_grpo.rollout.transformers import TransformersEngine
from edge_grpo.types import Sampling

RISE = {"steps": [0, 10, 20], "tokens": [0.0, 1.0, 3.0], "accuracy": [0.0, 0.2, 0.6]}
FALL = {"steps": [0, 10, 20], "tokens": [0.0, 1.0, 3.0], "accuracy": [0.1, 0.5, 0.2]}


def record(cell: Cell, rate: float, seed: int, accuracy: float) -> dict[str, object]:
    return RISE | {"cell": cell.key, "rate": rate, "seed": seed, "accuracy": [0.0, accuracy, accuracy], "weight": [2.0]}


def test_outcomes_by_hand():
    assert outcomes.area(RISE) == pytest.approx((10 * 0.1 + 10 * 0.4) / 20)
    assert outcomes.at_step(RISE, 10) == 0.2
    assert outcomes.at_step(RISE, 30) == 0.0  # a run that diverged before
    assert outcomes.at_tokens(RISE, 2.0) == pytest.approx(0.4)
    assert outcomes.at_tokens(RISE, 9.0) == 0.6
    assert outcomes.reaches(RISE, "steps", 0.4) == pytest.approx(15)
    assert outcomes.reaches(RISE, "tokens", 0.4) == pytest.approx(2.0)
    assert outcomes.reaches(RISE, "steps", 0.7) is None
    assert not outcomes.collapses(RISE)
    assert outcomes.collapses(FALL)


DIVERGED = {"diverged": "the loss was not finite", "of_steps": 80}


def test_a_run_that_diverged_counts_nothing_afterwards():
    run = {"steps": [0, 10], "tokens": [0.0, 2.0], "accuracy": [0.2, 0.2]} | DIVERGED
    assert outcomes.area(run) == pytest.approx(0.2 * 10 / 80)
    assert outcomes.collapses(run)
    assert outcomes.at_tokens(run, 1.0) == pytest.approx(0.2)
    assert outcomes.at_tokens(run, 3.0) == 0.0


def test_a_run_that_starts_above_the_threshold_has_reached_it_there():
    assert outcomes.reaches(RISE | {"accuracy": [0.5, 0.2, 0.9]}, "steps", 0.4) == 0.0


def full(cell: Cell, seed: int, end: float) -> dict[str, object]:
    """A record of all of the cell's steps at 2e-4, with every curve."""
    steps = list(range(0, cell.setting.steps + 1, 10))
    found = record(cell, 2e-4, seed, 0.0) | {
        "steps": steps,
        "tokens": [float(step) for step in steps],
        "accuracy": [end * step / steps[-1] for step in steps],
    }
    return found | {name: [0.5] * (len(steps) - 1) for name in CURVES}


def tuned(path, names) -> Results:
    """Results that choose 2e-4 for the cells of these names, and hold no others."""
    results = Results(path)
    for cell in (cell for cell in cells() if cell.setting == HARD and cell.name in names):
        for rate in cell.setting.rates:
            for seed in cell.tuning_seeds:
                results.add(full(cell, seed, 0.9 if rate == 2e-4 else 0.1) | {"rate": rate})
    return results


@pytest.mark.parametrize("which", [0, 1])
def test_tables_and_plots_count_a_run_that_diverged(tmp_path, which):
    """Whichever run of a row it is: at the end it counts 0."""
    results = tuned(tmp_path / "results.json", ("GRPO", "EDA"))
    base, own = (next(cell for cell in cells() if cell.key == f"{HARD.name}: {name}") for name in ("GRPO", "EDA"))
    for seed in (0, 1):
        results.add(full(base, seed, 0.4))
        results.add(full(own, seed, 0.5))
    short = {name: values[:2] for name, values in full(own, which, 0.5).items() if isinstance(values, list)}
    results.add(full(own, which, 0.5) | short | DIVERGED)
    made = Made(results)
    row = next(line for line in draw.tables(made)["methods"] if line.startswith("| EDA"))
    assert "-15.0 (" in row  # the mean of +10 and of -40 points
    assert all(path.stat().st_size for path in plots.draw(made, tmp_path))


def test_the_quick_study_takes_the_rates_of_the_whole_one(tmp_path):
    whole, quick = tuned(tmp_path / "whole.json", SHOWN), Results(tmp_path / "quick.json")
    wanted = next(schedule.quick_runs(quick, whole))
    assert {cell.name for cell, _, _ in wanted} == set(SHOWN)
    assert [(rate, seed) for cell, rate, seed in wanted if cell.name == "EDA"] == [(2e-4, s) for s in SEEDS[:6]]
    for cell, _, seed in wanted:
        quick.add(full(cell, seed, 0.6 if cell.name == "EDA" else 0.4 + 0.01 * seed))
        whole.add(full(cell, seed, 0.2))
    assert list(schedule.quick_runs(quick, whole)) == []
    table = draw.quick_table(quick, whole)
    assert len(table) == 1 + len(SHOWN)
    row = next(line for line in table if line.startswith("| EDA |"))
    assert row.startswith("| EDA | 6 | 30 | **+8.7 (")  # areas of 30 % here against 10 % in the whole study
    assert row.endswith("| 10 |")


def test_the_quick_study_without_rates_says_what_makes_them(tmp_path):
    with pytest.raises(SystemExit, match=r"lacks runs that decide the learning rate of .*: make study"):
        next(schedule.quick_runs(Results(tmp_path / "quick.json"), Results(tmp_path / "none.json")))


def test_the_median_counts_runs_that_never_reach_the_threshold():
    assert outcomes.median_reach([RISE, FALL, RISE], "steps") == pytest.approx(12.5)
    low = RISE | {"accuracy": [0.0, 0.1, 0.1]}
    assert outcomes.median_reach([RISE, low, low], "steps") is None
    assert outcomes.median_reach([RISE, low], "steps") is None  # the middle of 12.5 and never


def test_differences_are_within_seeds():
    own = [RISE | {"seed": seed, "accuracy": [0, 0, seed + 0.1]} for seed in range(3)]
    base = [RISE | {"seed": seed, "accuracy": [0, 0, float(seed)]} for seed in range(2)]
    difference = outcomes.paired(own, base, lambda run: run["accuracy"][-1])
    assert difference is not None
    assert difference.value == pytest.approx(0.1)


def test_each_cell_is_a_configuration():
    found = cells()
    assert len({cell.key for cell in found}) == len(found)
    for cell in found:
        last = {text.partition("=")[0]: text for text in (*cell.setting.overrides, *cell.overrides)}
        assert load_config(recipe_path(cell.setting.recipe), list(last.values())).steps == cell.setting.steps


def test_the_rate_is_the_best_on_tuning_seeds_and_the_grid_grows_at_its_ends(tmp_path):
    cell = cells()[0]
    results = Results(tmp_path / "results.json")
    rates = cell.setting.rates
    assert [run[1:] for run in results.missing_tuning(cell)] == [(r, s) for r in rates for s in cell.tuning_seeds]
    for rate in rates:
        for seed in cell.tuning_seeds:
            results.add(record(cell, rate, seed, 0.5 - rate))  # the first one is best
        results.add(record(cell, rate, 0, 0.9))  # results do not decide
    assert results.best_rate(cell) is None
    assert [run[1] for run in results.missing_tuning(cell)] == [rates[0] / 2] * len(cell.tuning_seeds)
    for seed in cell.tuning_seeds:
        results.add(record(cell, rates[0] / 2, seed, 0.9))
    assert results.missing_tuning(cell) == []  # one step beyond is enough
    assert results.best_rate(cell) == rates[0] / 2


def test_the_control_of_the_rate_takes_the_mean_weight(tmp_path):
    by_key = {cell.key: cell for cell in cells()}
    control = next(cell for cell in cells() if cell.factor_of)
    base, weighted = (by_key[f"{HARD.name}: {name}"] for name in (control.rate_of, control.factor_of))
    results = Results(tmp_path / "results.json")
    for cell in (base, weighted):
        for rate in cell.setting.rates:
            for seed in cell.tuning_seeds:
                results.add(record(cell, rate, seed, 0.9 if rate == 2e-4 else 0.1))
    assert results.rate_of(control, by_key) is None
    for seed in SEEDS:
        results.add(record(weighted, 2e-4, seed, 0.5))
    assert results.rate_of(control, by_key) == pytest.approx(4e-4)


def test_what_is_finished_is_not_made_again(tmp_path):
    path = tmp_path / "results.json"
    results = Results(path)
    cell = cells()[0]
    everything = next(schedule.full_runs(results))
    assert (cell, cell.setting.rates[0], cell.tuning_seeds[0]) in everything
    results.add(record(cell, cell.setting.rates[0], cell.tuning_seeds[0], 0.1))
    again = next(schedule.full_runs(Results(path)))
    assert len(again) == len(everything) - 1
    assert [run["cell"] for run in json.loads(path.read_text())["runs"]] == [cell.key]


SHORT = ("steps=2", "eval.every=1", "eval.size=2", "eval.generations=1")


def test_a_run_leaves_its_record_and_no_folder(tmp_path):
    cell = next(cell for cell in cells() if cell.name == "EDGE, collapsed")
    made = make_run(cell, 1e-4, 0, tmp_path, SHORT)
    assert made["steps"] == [0, 1, 2]
    assert made["revision"]
    assert made["instructions"]
    assert made["tokens"][2] > made["tokens"][1] > 0
    assert all(len(made[name]) == 2 for name in ("entropy", "advantage_var", "collapsed_before", "weight"))
    assert not list(tmp_path.iterdir())


def test_supervised_fine_tuning_trains_on_solutions_alone(tmp_path):
    cell = next(cell for cell in cells() if cell.supervised)
    made = make_run(cell, 1e-3, 0, tmp_path, ("steps=4", "eval.every=2", "eval.size=2", "eval.generations=1"))
    assert made["injected"] == [1.0, 1.0]
    assert made["advantage_var"] == [0.0, 0.0]
    assert made["tokens"] == [0.0, 0.0, 0.0]
    assert made["entropy"][1] != made["entropy"][0]  # of the same kind of text: the policy moved


def test_the_fast_sampler_gives_the_responses_of_generate():
    model, tokenizer = load_model(ModelConfig())
    options = {"eos_token_ids": eos_token_ids(model, tokenizer), "pad_token_id": tokenizer.pad_token_id}
    usual = TransformersEngine(model, batch_size=16, **options)
    fast = SmallLlamaEngine.like(usual)
    # Prompts of different lengths are padded; three responses each end at different tokens, so that rows leave.
    prompts = [tokenizer(text).input_ids for text in ("What is 87 - 3 * (14 + 9)?\n", "Calculate 45 - 78.\n") * 3]
    for temperature in (0.6, 0.0):
        sampling = Sampling(max_tokens=40, temperature=temperature)
        for a, b in zip(
            usual.generate(prompts, sampling, seed=1), fast.generate(prompts, sampling, seed=1), strict=True
        ):
            assert (a.token_ids, a.finish_reason) == (b.token_ids, b.finish_reason)
            assert a.logprobs == pytest.approx(b.logprobs, abs=1e-4)
            assert a.entropy == pytest.approx(b.entropy, abs=1e-4)


def test_the_page_holds_the_tables_of_the_results():
    page = draw.PAGE.read_text(encoding="utf-8")
    assert draw.filled(page, Made(Results())) == page, "run: python -m benchmarks.study --draw"
    assert all(math.isfinite(value) for run in json.loads(FILE.read_text())["runs"] for value in run["accuracy"])
