"""The two logs of a run: what a completion's record holds, and what is dropped when a run is resumed."""

from __future__ import annotations

import json
import math
import re
from io import StringIO
from types import SimpleNamespace

import pytest
from accelerate import Accelerator
from rich.console import Console

from edge_grpo.batching import Sample
from edge_grpo.run.history import read_run
from edge_grpo.run.log import RunLog, completion_record, figures_of
from edge_grpo.types import Example, Prompt, Provenance, Response, Reward

SAMPLED, INJECTED, CONTINUED = Provenance.SAMPLED, Provenance.INJECTED, Provenance.CONTINUED
RIGHT, WRONG = Reward(1.0, {"accuracy": 1.0}, "correct"), Reward(0.0, {"accuracy": 0.0}, "wrong")
RECORDS = (-0.5, math.nan, -0.5, -0.5)
FIRST = Response((0, 1), RECORDS[:1] * 2, RECORDS[:1] * 2, (SAMPLED, SAMPLED), "length")
CORRECTED = Response((0, 1, 2, 3), RECORDS, RECORDS, (SAMPLED, INJECTED, CONTINUED, CONTINUED), "stop", "reflect")
SAMPLE = Sample(Prompt(Example(4, "1 + 1 = ?", "2"), "<user>1 + 1 = ?", (1, 2)), 0, FIRST, WRONG, CORRECTED, RIGHT)


def test_completion_record_cuts_where_provenance_changes():
    record = completion_record(7, SAMPLE, lambda ids: "".join(map(str, ids)))
    assert record["segments"] == [["sampled", "0"], ["injected", "1"], ["continued", "23"]]
    assert (record["step"], record["index"], record["reward_before"], record["reward"]) == (7, 4, 0.0, 1.0)
    assert (record["parts_before"], record["parts"]) == ({"accuracy": 0.0}, {"accuracy": 1.0})
    assert (record["failures"], record["skipped"]) == ({}, False)


METRICS = {
    "eval/accuracy": 0.681,
    "accuracy/before": 0.25,
    "accuracy/after": 0.8125,
    "collapsed/before": 0.5,
    "collapsed/after": 0.125,
    "correction/fallbacks": 0.0,
    "reward/mean": 0.8125,
    "loss": -0.01234,
    "grad/norm": 0.5678,
    "entropy/token_mean": 0.0912,
    "length/mean": 48.25,
    "throughput/tokens_per_s": 12345.6,
}


def test_figures_name_what_is_before_and_what_after_correction():
    assert figures_of(METRICS) == (
        "held-out 0.681  accuracy 0.25 before correction, 0.812 after  "
        "collapsed groups 0.5 before correction, 0.125 after  reward 0.812  loss -0.0123  gradient norm 0.568  "
        "entropy 0.0912  length 48.2  tok/s 12,346"
    )
    without = {key: value for key, value in METRICS.items() if key != "correction/fallbacks"}
    assert "accuracy 0.25  collapsed groups 0.5  reward 0.812" in figures_of(without)


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still until it is moved."""
    now = SimpleNamespace(seconds=100.0)
    monkeypatch.setattr("edge_grpo.run.log.time.monotonic", lambda: now.seconds)
    return now


def step_twice(log, clock):
    """An evaluation of 1,000 s, which is no step, then two steps of 40 s: both too slow for rich's own estimate."""
    clock.seconds += 1000
    log.step(0, {"eval/accuracy": 0.2})
    for step in (1, 2):
        clock.seconds += 40
        log.step(step, METRICS)


def test_a_log_file_has_step_total_elapsed_and_remaining_time(tmp_path, clock):
    console = Console(file=StringIO())
    with RunLog(Accelerator(cpu=True), tmp_path, steps=60, resume_step=0, console=console) as log:
        step_twice(log, clock)
    lines = console.file.getvalue().splitlines()
    assert lines[0] == "step 0/60  elapsed 16 min 40 s  left -  held-out 0.2"
    assert lines[2] == f"step 2/60  elapsed 18 min 0 s  left 38 min 40 s  {figures_of(METRICS)}"


# 80 columns are a terminal's default, 60 leave no room for the bar, 200 hold everything in two lines.
@pytest.mark.parametrize("width", [60, 80, 200])
def test_a_terminal_keeps_step_total_and_remaining_time(tmp_path, clock, width):
    console = Console(file=StringIO(), force_terminal=True, width=width, color_system=None)
    with RunLog(Accelerator(cpu=True), tmp_path, steps=60, resume_step=0, console=console) as log:
        step_twice(log, clock)
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", console.file.getvalue()).replace("\r", "\n").split("\n")
    assert max(map(len, shown)) <= width
    last = max(number for number, line in enumerate(shown) if line.startswith("step 2/60"))
    assert shown[last].endswith("elapsed 18 min 0 s  left 38 min 40 s")
    assert ("╸" in shown[last]) == (width > 60)
    figures = [line.strip() for line in shown[last + 1 :]]
    assert "  ".join(filter(None, figures)) == figures_of(METRICS)  # whole, and cut between figures only


def log_to(folder, resume_step) -> RunLog:
    return RunLog(Accelerator(cpu=True), folder, steps=9, resume_step=resume_step, console=Console(file=StringIO()))


def test_log_drops_what_lies_beyond_the_checkpoint(tmp_path):
    with log_to(tmp_path, 0) as log:
        for step in (0, 1, 2, 3):
            log.step(step, {"loss": math.inf if step == 1 else 0.5})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')  # killed while writing
    with log_to(tmp_path, 2) as log:
        log.step(3, {"loss": 0.25})
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert records == [
        {"step": 0, "loss": 0.5},
        {"step": 1, "loss": None},
        {"step": 2, "loss": 0.5},
        {"step": 3, "loss": 0.25},
    ]


def test_log_keeps_completions_with_line_separators(tmp_path):
    """U+2028 ends a line for str.splitlines but not in JSONL, where it may stand inside a string."""
    with log_to(tmp_path, 0) as log:
        log.completions(1, [SAMPLE], lambda ids: "a\u2028b")
    before = (tmp_path / "completions.jsonl").read_text()
    with log_to(tmp_path, 1):
        pass
    assert (tmp_path / "completions.jsonl").read_text() == before
    assert json.loads(before)["segments"] == [
        ["sampled", "a\u2028b"],
        ["injected", "a\u2028b"],
        ["continued", "a\u2028b"],
    ]


def test_rows_that_cannot_be_read_are_named_and_stay(tmp_path):
    rows = [
        b'{"step": 1}',
        b"garbage",
        b'{"loss": 1.0}',
        b'{"step": 2, "note": "\xff"}',
        b"[" * 100_000,
        b'{"step": 3}',
    ]
    (tmp_path / "metrics.jsonl").write_bytes(b"\n".join(rows) + b'\n{"step": 3, "un')
    console = Console(file=StringIO())
    with RunLog(Accelerator(cpu=True), tmp_path, steps=9, resume_step=2, console=console):
        pass
    assert console.file.getvalue().endswith("metrics.jsonl: no record in lines 2, 3, 4, 5; left as it was\n")
    assert (tmp_path / "metrics.jsonl").read_bytes() == b"\n".join(rows[:-1]) + b"\n"
    (tmp_path / "config.yaml").write_text("steps: 9")
    notes = read_run(tmp_path).notes
    assert "metrics.jsonl: 4 unreadable lines were skipped" in notes
