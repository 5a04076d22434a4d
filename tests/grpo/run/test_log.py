"""The two logs of a run: what a completion's record holds, and what is dropped when a run is resumed."""

from __future__ import annotations

import json
import math
from io import StringIO

from accelerate import Accelerator
from rich.console import Console

from edge_grpo.batching import Sample
from edge_grpo.run.history import read_run
from edge_grpo.run.log import RunLog, completion_record
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
