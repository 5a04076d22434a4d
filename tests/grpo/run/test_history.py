"""Reading a run's folder: columns, evaluations, and what is missing or broken in it."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from run_folder import append, make_run

from edge_grpo.run.history import Point, read_run


def test_a_whole_run(tmp_path: Path) -> None:
    run = read_run(make_run(tmp_path / "edge", steps=20))
    assert (run.name, run.method, run.total_steps) == ("edge", "edge", 20)
    assert run.steps == list(range(1, 21))  # step 0 has an evaluation only
    assert run.evals[0] == Point(0, 0.0, 0.0, 0.22, 0.029)
    assert [point.step for point in run.evals] == [0, 10, 20]
    assert {len(column) for column in run.columns.values()} == {20}
    assert len(run.completions) == 20 * 4
    assert (run.notes, run.thinned) == ([], [])


def test_columns_are_derived_from_what_is_logged(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(
        json.dumps(
            {
                "step": 1,
                "outcome/correct": 5,
                "outcome/wrong": 2,
                "outcome/unparseable": 1,
                "outcome/timed_out": 0,
                "time/total": 3.0,
                "time/rollout": 1.25,
                "time/update": 1.0,
            }
        )
    )
    columns = read_run(tmp_path).columns
    assert columns["outcome_share/unparseable"] == [0.125]
    assert columns["outcome_share/timed_out"] == [0.0]
    assert columns["time/other"] == [0.75]


def test_broken_and_repeated_lines(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", steps=4)
    append(
        run / "metrics.jsonl", '{"step": 4, "loss": 0.5}\n[1]\n{"loss": 1}\n{"step": 5, "loss": NaN, "grad/norm": Inf'
    )
    append(run / "completions.jsonl", '{"step": 4, "segments": [["samp')
    found = read_run(run)
    assert found.steps == [1, 2, 3, 4]
    assert found.columns["loss"][-1] == 0.5  # a step logged again after a resume: the later line counts
    assert found.notes == [
        "metrics.jsonl: 3 unreadable lines were skipped",
        "completions.jsonl: 1 unreadable line was skipped",
    ]


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no run folder"):
        read_run(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="is not a run folder: it holds neither config"):
        read_run(tmp_path)


def test_a_long_run_keeps_every_extreme(tmp_path: Path) -> None:
    """5,000 steps are drawn from fewer points; a spike in one step is its point's largest or smallest value."""
    rows = [{"step": i, "grad/norm": 1.0 + i % 2, "loss": 0.0} for i in range(1, 5001)]
    rows[3111]["grad/norm"], rows[40]["grad/norm"], rows[50]["loss"] = 9e4, -7.0, math.nan
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = read_run(tmp_path)
    assert (run.total_steps, run.steps_per_point, len(run.steps)) == (5000, 8, 625)
    assert (max(run.highs["grad/norm"]), min(run.lows["grad/norm"])) == (9e4, -7.0)
    assert run.steps[run.highs["grad/norm"].index(9e4)] == 3112  # the last of its eight steps
    assert run.columns["grad/norm"][0] == 1.5
    assert run.non_finite == [51]
    assert run.signs == [
        "diverged: loss or gradient norm not finite in step 51",
        "gradient norm 90,000 in step 3112, 45,000 times the median",
    ]
    assert len(read_run(tmp_path, share=0.1).steps) == 313  # a page of ten runs
