"""The training loop on the shipped model: the ablations, the record, and what a kill leaves behind."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
import yaml
from training import records, rollout

from edge_grpo.config import AdvantageConfig, DataConfig, EvalConfig, ModelConfig, RewardConfig, to_dict
from edge_grpo.report.page import write_report
from edge_grpo.trainer import Trainer, train
from edge_kernels import GRPOLossConfig

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore:.*use_reentrant.*")]


@pytest.mark.parametrize(
    ("method", "corrects", "weighs"),
    [
        ("edge", True, True),
        ("gec", True, False),
        ("eda", False, True),
        ("grpo", False, False),
        ("grpo+reflection", True, False),
    ],
)
def test_methods(config, method, corrects, weighs):
    trainer = Trainer(replace(config, method=method))
    samples = rollout(trainer)
    trainer.close()
    kinds = {sample.response.correction for sample in samples} - {None}
    assert bool(kinds) == corrects
    if method == "grpo+reflection":
        assert kinds == {"reflect"}
    assert any(sample.weight != 1 for sample in samples) == weighs
    for sample in samples:
        if sample.first_reward.correct:
            assert sample.response is sample.first


def test_advantages_are_the_papers(config):
    """EDA by hand: A_i / (mean entropy of i over the group's mean of those)."""
    trainer = Trainer(replace(config, eda=AdvantageConfig(clip=math.inf)))
    samples = rollout(trainer)
    trainer.close()
    for group in {sample.group for sample in samples}:
        members = [sample for sample in samples if sample.group == group]
        rewards = torch.tensor([sample.reward.total for sample in members])
        entropy = torch.stack([sample.entropy.mean() for sample in members])
        advantages = (rewards - rewards.mean()) / (rewards.std() + 1e-4)
        expected = advantages / (entropy / entropy.mean())
        got = torch.tensor([sample.advantage for sample in members])
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_a_run_leaves_its_whole_record(config, tmp_path):
    summary = train(
        replace(
            config,
            eval=EvalConfig(data="arithmetic:1@test", size=8),
            optim=replace(config.optim, epochs=2, minibatches=2),
            loss=GRPOLossConfig(beta=0.05),
            steps=3,
            save_every=1,
        )
    )
    output = tmp_path / "run"
    assert sorted(path.name for path in output.iterdir()) == [
        "checkpoints",
        "completions.jsonl",
        "config.yaml",
        "final",
        "identity.json",
        "metrics.jsonl",
    ]
    assert sorted(path.name for path in (output / "checkpoints").iterdir()) == ["step-000002", "step-000003"]
    start, *steps = records(output)
    assert start.keys() == {"step", "eval/accuracy", "eval/stderr"}
    assert [record["step"] for record in steps] == [1, 2, 3]
    for record in steps:
        for key in (
            *("loss", "reward/mean", "reward/std", "accuracy/before", "accuracy/after", "collapsed/before"),
            *("collapsed/after", "advantage/var", "entropy/token_mean", "entropy/response_mean"),
            *("eda/weight_min", "eda/weight_mean", "eda/weight_max", "tokens/injected_share"),
            *("length/mean", "length/min", "length/max", "length/truncated", "kl/mean", "clip/low", "clip/high"),
            *("clip/region", "ratio/mean", "ratio/max", "grad/norm", "optim/lr", "drift/logprob_max"),
            *("drift/entropy_max", "throughput/tokens_per_s", "time/rollout", "time/reward", "time/correction"),
            *("time/score", "time/update", "time/total", "memory/peak_bytes"),
        ):
            assert isinstance(record[key], float), key
        assert record["ratio/max"] > 1.0  # the second pass is off-policy
        assert record["drift/logprob_max"] < 1e-3
        assert record["accuracy/after"] >= record["accuracy/before"]
    assert steps[1]["kl/mean"] > 0
    assert summary.before is not None
    assert summary.before.accuracy == start["eval/accuracy"]
    assert summary.after is not None
    assert summary.after.accuracy == steps[-1]["eval/accuracy"]
    reloaded = Trainer(replace(config, model=ModelConfig(path=str(output / "final"))))
    reloaded.close()


@pytest.mark.parametrize(
    "model",
    [ModelConfig(gradient_checkpointing=True), ModelConfig(precision="mixed"), ModelConfig(precision="bfloat16")],
    ids=["checkpointing", "mixed", "bfloat16"],
)
def test_memory_and_precision_options_train(config, model, tmp_path):
    # Uncorrected, a third of the answers are right: 8 of them leave no group with equal rewards.
    rollout = replace(config.rollout, num_generations=8)
    train(replace(config, method="grpo", data=DataConfig(train="arithmetic:2"), rollout=rollout, model=model, steps=1))
    (record,) = records(tmp_path / "run")
    assert math.isfinite(record["loss"])
    assert record["grad/norm"] > 0
    assert record["drift/logprob_mean"] < (0.1 if model.precision != "float32" else 1e-4)


@pytest.mark.slow
def test_killed_and_resumed_equals_uninterrupted(config, tmp_path):
    """SIGKILL after the second checkpoint; --resume makes the same next steps, to the last bit of the loss."""
    config = replace(config, steps=6, save_every=2, loss=GRPOLossConfig(beta=0.01))
    whole = replace(config, output=str(tmp_path / "whole"))
    train(whole)

    broken = replace(config, output=str(tmp_path / "broken"))
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(to_dict(broken)))
    command = [sys.executable, "-m", "edge_grpo", "train", "--config", str(file)]
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE)
    third_step = tmp_path / "broken" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (third_step.exists() and len(third_step.read_text().splitlines()) >= 3):
        assert process.poll() is None, process.stderr.read().decode()
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert len(records(tmp_path / "broken")) < 6, "the run ended before the kill; make it longer"

    subprocess.run([*command, "--resume"], env=environment, check=True, capture_output=True)
    timing = ("time/", "throughput/", "memory/")
    for expected, got in zip(records(tmp_path / "whole"), records(tmp_path / "broken"), strict=True):
        for key, value in expected.items():
            if not key.startswith(timing):
                assert got[key] == value, (expected["step"], key)


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.slow
def test_an_old_run_outlives_a_new_one_that_cannot_start(config, tmp_path):
    """Whatever is missing: data, held-out data, model, reward function, engine. Then the new one replaces it."""
    train(replace(config, steps=1, save_every=1))
    run = tmp_path / "run"
    before = contents(run)
    (tmp_path / "empty").mkdir()
    for broken in (
        replace(config, data=DataConfig(train=str(tmp_path / "absent.jsonl"))),
        replace(config, eval=EvalConfig(data=str(tmp_path / "absent.jsonl"))),
        replace(config, model=ModelConfig(path=str(tmp_path / "empty"))),
        replace(config, reward=RewardConfig(weights={"accuracy": 1.0, "absent:function": 1.0})),
        replace(config, rollout=replace(config.rollout, engine="vllm", vllm={"dtype": "absent"})),
    ):
        with pytest.raises((ValueError, FileNotFoundError, ImportError, RuntimeError)):
            train(broken, overwrite=True)
        assert contents(run) == before
    with pytest.raises(FileExistsError, match="already holds a run"):
        train(config)
    assert contents(run) == before
    train(replace(config, steps=2), overwrite=True)
    assert [record["step"] for record in records(run)] == [1, 2]
    assert not (run / "checkpoints").exists()
    train(
        replace(config, steps=1, model=ModelConfig(path=str(run / "final"))), overwrite=True
    )  # the run that it replaces
    assert len(records(run)) == 1


def test_resume_refuses_another_configuration(config, tmp_path):
    train(replace(config, save_every=1, steps=1))
    with pytest.raises(ValueError, match=r"optim\.learning_rate was 0\.001, is 0\.5"):
        train(replace(config, optim=replace(config.optim, learning_rate=0.5)), resume=True)


def test_resume_refuses_fewer_steps_than_were_made(config, tmp_path):
    train(replace(config, save_every=1))
    before = records(tmp_path / "run")
    with pytest.raises(ValueError, match="2 steps were made, and steps is 1; set steps to at least 2"):
        train(replace(config, steps=1), resume=True)
    assert records(tmp_path / "run") == before


def test_resume_without_a_checkpoint_is_an_error(config):
    with pytest.raises(FileNotFoundError, match="nothing to resume"):
        train(config, resume=True)


def test_groups_must_divide_over_minibatches(config):
    with pytest.raises(ValueError, match="minibatches"):
        Trainer(replace(config, optim=replace(config.optim, minibatches=3)))


# ---- Rewards that fail -----------------------------------------------------------------------------------------------


UNRELIABLE = """
import time
from pathlib import Path

def by_turns(completions):
    if len(completions) > 1:
        raise ValueError("one at a time")
    with Path(__file__).with_suffix(".calls").open("ab") as file:  # a killed process remembers nothing
        file.write(b".")
        call = file.tell()
    if call % 4 == 1:
        time.sleep(3600)
    if call % 4 == 2:
        raise LookupError(completions[0])
    return [0.5]
"""


@pytest.mark.parametrize("on_error", ["zero", "skip"])
def test_a_run_outlives_functions_that_hang_and_raise(config, tmp_path, monkeypatch, on_error):
    (tmp_path / "unreliable.py").write_text(UNRELIABLE)
    monkeypatch.syspath_prepend(tmp_path)
    weights = {"accuracy": 1.0, "unreliable:by_turns": 1.0}
    reward = RewardConfig(weights=weights, function_timeout=0.5, on_error=on_error)
    train(replace(config, reward=reward))
    steps = records(tmp_path / "run")
    assert len(steps) == config.steps
    timed_out = sum(record["grading/functions_timed_out"] for record in steps)
    failed = sum(record["grading/functions_failed"] for record in steps)
    assert timed_out > 0
    assert failed > 0
    completions = [json.loads(line) for line in (tmp_path / "run" / "completions.jsonl").read_text().splitlines()]
    assert len(completions) == 8 * config.steps
    hurt = [record for record in completions if record["failures"]]
    assert {kind for record in hurt for kind in record["failures"].values()} == {"timed_out", "raised"}
    assert all(record["skipped"] == (on_error == "skip") for record in hurt)
    if on_error == "skip":
        assert sum(record["grading/skipped"] for record in steps) == len(hurt)
    assert f"Reward calls timed out {timed_out:.0f}" in " ".join(
        re.sub(r"<[^>]+>", " ", write_report([tmp_path / "run"]).read_text()).split()
    )


def test_a_function_that_raises_ends_the_run_by_default(config, tmp_path, monkeypatch):
    (tmp_path / "unreliable.py").write_text(UNRELIABLE.replace("% 4 == 1", "== 0").replace("% 4 == 2", "> 0"))
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(RuntimeError, match=r"(?s)'unreliable:by_turns' failed on sample 0 \(row \d+\).*LookupError"):
        train(replace(config, reward=RewardConfig(weights={"accuracy": 1.0, "unreliable:by_turns": 1.0})))
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
