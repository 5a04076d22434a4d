"""A dry run loads everything, makes a step, says what the run would take, and leaves nothing behind."""

from __future__ import annotations

import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from edge_grpo.commands import main as cli
from edge_grpo.run import plan

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore:.*use_reentrant.*")]

KEYS = ["steps=30", "data.train=arithmetic:1", "eval.data=arithmetic:1@test", "eval.size=5", "optim.epochs=2"]
SIZE = [
    "rollout.num_prompts=2",
    "rollout.num_generations=4",
    "rollout.max_completion_length=8",
    "correction.max_length=16",
]


def test_a_dry_run_prints_the_plan_and_writes_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("edge_grpo.trainer.peak_bytes", lambda: 1_234_000_000)  # this process's depends on other tests
    assert cli.main(["train", "--dry-run", "output=runs/new", *KEYS, *SIZE]) == 0
    rows = dict(re.split(r"  +", line, maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert list(rows) == ["steps", "data", "tokens", "model", "memory", "disk", "time", "output"]
    assert rows["steps"] == "30 of 2 prompts x 4 responses, with 2 optimizer steps each"
    assert rows["data"] == "2,000 prompts, of which the run draws 60 (0.03 epochs); 5 held out"
    assert re.fullmatch(
        r"prompts \d+ on average, \d+ at most; responses 24 at most, corrections included; a step 192 at most; the one "
        r"measured generated \d+, and cut off \d+\.\d% of its responses",
        rows["tokens"],
    )
    assert rows["model"] == "685,184 parameters, float32"
    assert rows["memory"] == "1.23 GB at the peak of a step on the CPU; of it 11 MB for weights, gradients and AdamW"
    assert rows["disk"].startswith("checkpoints: 2 checkpoints of 8.22 MB; final model 2.74 MB; ")
    assert re.fullmatch(r"\d\S* s a step on 1 process: .+ for all of them, evaluations not counted", rows["time"])
    assert rows["output"] == "runs/new"
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_refuses_what_a_run_refuses(capsys):
    assert cli.main(["train", "--dry-run", "model.path=./nothing"]) == 2
    assert "./nothing' is not a folder" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        cli.main(["train", "--dry-run", "--resume"])


def test_a_disk_that_is_too_small_and_a_folder_in_use_are_said(config, tmp_path, monkeypatch):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("")
    made = plan.Plan(
        replace(config, save_every=5), [4, 6], 0, 10**9, 4 * 10**9, 4 * 10**9, 99, 0.5, 10**10, "the CPU", 2, 3.0
    )
    usage = shutil.disk_usage(Path("/"))
    monkeypatch.setattr(plan.shutil, "disk_usage", lambda _: usage._replace(free=31 * 10**9))
    lines = made.lines()
    assert lines[-2].strip() == "the disk is too small: the run writes 32 GB"
    assert lines[-1].strip() == "it holds a run: --overwrite replaces it, --resume continues it"
    assert "time    3 s a step on 2 processes: 6 s for all" in "\n".join(lines)
    monkeypatch.setattr(plan.shutil, "disk_usage", lambda _: usage._replace(free=33 * 10**9))
    assert "too small" not in "".join(made.lines())
    assert "checkpoints of 4.2 GB" in "".join(replace(made, trained_bytes=10**8).lines())  # adapters
    assert "too small" not in "".join(replace(made, config=config).lines())  # without checkpoints
