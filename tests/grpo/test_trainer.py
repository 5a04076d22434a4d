"""The training loop on the shipped model: the gradient, the ablations, the record, and what a kill leaves behind."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

from edge_grpo.config import (
    CorrectionConfig,
    DataConfig,
    ModelConfig,
    OptimConfig,
    RewardConfig,
    RolloutConfig,
    TrainConfig,
    to_dict,
)
from edge_grpo.metrics import step_metrics
from edge_grpo.run.report import write_report
from edge_grpo.trainer import Trainer, _LossTotals, train
from edge_grpo.types import Provenance
from edge_kernels import EDAConfig, GRPOLossConfig

pytestmark = pytest.mark.filterwarnings("ignore:.*use_reentrant.*")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """The tensors are small: waking a second thread costs more than it does, and more yet on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def config(tmp_path) -> TrainConfig:
    """Two groups of four short responses: small, yet with right and wrong answers and several micro-batches."""
    return TrainConfig(
        output=str(tmp_path / "run"),
        steps=2,
        save_every=0,
        data=DataConfig(train="arithmetic:1,2"),
        rollout=RolloutConfig(num_prompts=2, num_generations=4, max_completion_length=24),
        optim=OptimConfig(learning_rate=1e-3, micro_batch_size=3),
    )


def rollout(trainer: Trainer):
    samples = trainer.sample(1)
    trainer.score(samples)
    trainer.assign_advantages(samples)
    return samples


def gradient(trainer: Trainer, samples) -> torch.Tensor:
    trainer.policy.zero_grad()
    trainer.model.train()
    trainer.accumulate_gradient(samples, _LossTotals())
    return torch.cat([p.grad.flatten() for p in trainer.policy.parameters() if p.grad is not None])


def records(output) -> list[dict]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


LOSSES = {
    "dapo": GRPOLossConfig(),
    "grpo": GRPOLossConfig(loss_type="grpo"),
    "bnpo": GRPOLossConfig(loss_type="bnpo", injected="mask"),
    "dr_grpo": GRPOLossConfig(loss_type="dr_grpo", max_completion_length=24),
    "cispo": GRPOLossConfig(loss_type="cispo", epsilon_high=5.0, injected="shaped"),
    "gspo": GRPOLossConfig(loss_type="grpo", importance_sampling_level="sequence", injected="sft"),
    "entropy bonus": GRPOLossConfig(entropy_coef=0.1),
    "entropy quantile": GRPOLossConfig(top_entropy_quantile=0.5),
    "kl": GRPOLossConfig(beta=0.1),
}


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_micro_batches_give_the_big_batch_gradient(config, loss):
    """Every variant, because each has a normalizer of its own; 8 sequences cut by 1, 3 (uneven) and 8."""
    trainer = Trainer(replace(config, loss=loss))
    samples = rollout(trainer)
    # Give every response an advantage, so that no variant is tested on zeros, and the reference model a difference.
    for number, sample in enumerate(samples):
        sample.advantage = (-1.0) ** number * (1 + number / 4)
        if sample.ref_logprobs is not None:
            sample.ref_logprobs = sample.ref_logprobs - 0.3
    gradients = []
    for size in (8, 3, 1):
        trainer.config = replace(trainer.config, optim=replace(config.optim, micro_batch_size=size))
        gradients.append(gradient(trainer, samples))
    trainer.close()
    scale = gradients[0].abs().max()
    assert scale > 0
    for cut in gradients[1:]:
        torch.testing.assert_close(cut, gradients[0], rtol=0, atol=float(2e-5 * scale))


def test_gradient_is_the_plain_policy_gradient(config):
    """One step on-policy under dapo is -sum(A * d logprob) / tokens: checked without any of our fused code."""
    trainer = Trainer(replace(config, method="grpo"))
    samples = rollout(trainer)
    for number, sample in enumerate(samples):
        sample.advantage = float(number) - 3
    ours = gradient(trainer, samples)
    trainer.policy.zero_grad()
    tokens = sum(len(sample.response.token_ids) for sample in samples)
    loss = torch.zeros(())
    for sample in samples:
        ids = torch.tensor([sample.prompt.token_ids + sample.response.token_ids])
        logprobs = trainer.model(input_ids=ids).logits[0, :-1].log_softmax(-1)
        taken = logprobs.gather(1, ids[0, 1:, None])[len(sample.prompt.token_ids) - 1 :]
        loss = loss - sample.advantage * taken.sum() / tokens
    loss.backward()
    plain = torch.cat([p.grad.flatten() for p in trainer.policy.parameters() if p.grad is not None])
    trainer.close()
    torch.testing.assert_close(ours, plain, rtol=0, atol=float(2e-5 * plain.abs().max()))


@pytest.mark.parametrize(
    ("mode", "factor_of"),
    [
        ("token_truncate", lambda ratios: [min(ratio, 1.5) for ratio in ratios]),
        ("token_mask", lambda ratios: [ratio if ratio <= 1.5 else 0.0 for ratio in ratios]),
        ("sequence_truncate", lambda ratios: [min(math.prod(ratios), 1.5)] * len(ratios)),
        ("sequence_mask", lambda ratios: [math.prod(ratios) * (math.prod(ratios) <= 1.5)] * len(ratios)),
    ],
)
def test_the_samplers_other_probabilities_are_corrected_for(config, mode, factor_of):
    """The plain policy gradient with each token's factor worked out here; an injected token has the ratio 1."""
    loss = GRPOLossConfig(sampler_ratio_cap=1.5, sampler_ratio_mode=mode)
    trainer = Trainer(replace(config, loss=loss))
    samples = trainer.sample(1)
    trainer.score(samples)
    factors = []
    for number, sample in enumerate(samples):
        marks = sample.response.provenance
        # The first token is far more likely to the trainer; later ones are near, so that products lie on both sides.
        ratios = [3.0 if place == 0 and number % 2 else 1.01 for place in range(len(marks))]
        ratios = [1.0 if mark == Provenance.INJECTED else ratio for ratio, mark in zip(ratios, marks, strict=True)]
        recorded = tuple(
            math.nan if mark == Provenance.INJECTED else float(own) - math.log(ratio)
            for own, ratio, mark in zip(sample.logprobs, ratios, marks, strict=True)
        )
        sample.response = replace(sample.response, logprobs=recorded)
        sample.advantage = float(number) - 3.5
        factors.append(factor_of(ratios))
    assert any(Provenance.INJECTED in sample.response.provenance for sample in samples)
    ours = gradient(trainer, samples)
    trainer.policy.zero_grad()
    tokens = sum(len(sample.response.token_ids) for sample in samples)
    total = torch.zeros(())
    for sample, factor in zip(samples, factors, strict=True):
        ids = torch.tensor([sample.prompt.token_ids + sample.response.token_ids])
        logprobs = trainer.model(input_ids=ids).logits[0, :-1].log_softmax(-1)
        taken = logprobs.gather(1, ids[0, 1:, None])[len(sample.prompt.token_ids) - 1 :, 0]
        total = total - sample.advantage * (taken * torch.tensor(factor)).sum() / tokens
    total.backward()
    plain = torch.cat([p.grad.flatten() for p in trainer.policy.parameters() if p.grad is not None])
    trainer.close()
    torch.testing.assert_close(ours, plain, rtol=0, atol=float(5e-5 * plain.abs().max()))


def test_collapsed_groups_are_left_out_and_change_nothing(config, monkeypatch):
    trainer = Trainer(config)
    samples = rollout(trainer)
    for number, sample in enumerate(samples):
        sample.advantage = float(number - 2) if sample.group == 0 else 0.0
    assert len(trainer._teaching(samples)) == 3  # advantages -2, -1, 0, 1 and a group of zeros
    ours = gradient(trainer, samples)
    monkeypatch.setattr(trainer, "_teaching", lambda part: part)
    everything = gradient(trainer, samples)
    trainer.close()
    torch.testing.assert_close(ours, everything, rtol=0, atol=float(2e-5 * everything.abs().max()))


def test_scoring_covers_only_what_sampling_left_without_a_record(config, monkeypatch):
    trainer = Trainer(config)
    samples = trainer.sample(1)
    scored = []
    forward = trainer._token_stats

    def spy(model, chunk):
        scored.extend(chunk)
        return forward(model, chunk)

    monkeypatch.setattr(trainer, "_token_stats", spy)
    trainer.score(samples)
    trainer.close()
    corrected = [sample for sample in samples if sample.response.correction is not None]
    assert corrected, "the model solved everything; choose a harder level"
    assert {id(s) for s in scored} == {id(s) for s in corrected}
    for sample in samples:
        assert len(sample.entropy) == len(sample.logprobs) == len(sample.response.token_ids)
        assert not sample.entropy.isnan().any()


def test_recorded_values_are_those_of_a_scoring_pass(config):
    trainer = Trainer(replace(config, method="grpo"))
    samples = trainer.sample(1)
    assert all(sample.response.is_recorded for sample in samples)
    logprobs, entropy = trainer._token_stats(trainer.unwrapped, samples)
    trainer.close()
    for sample, scored_logprobs, scored_entropy in zip(samples, logprobs, entropy, strict=True):
        torch.testing.assert_close(torch.tensor(sample.response.logprobs), scored_logprobs, rtol=0, atol=1e-4)
        torch.testing.assert_close(torch.tensor(sample.response.entropy), scored_entropy, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("method", "eda", "gec", "corrects", "weighs"),
    [
        ("edge", None, None, True, True),
        ("edge", False, None, True, False),
        ("edge", None, False, False, True),
        ("grpo", None, None, False, False),
        ("grpo+reflection", None, None, True, False),
    ],
)
def test_methods_and_switches(config, method, eda, gec, corrects, weighs):
    trainer = Trainer(replace(config, method=method, eda=eda, gec=gec))
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
    trainer = Trainer(replace(config, loss=GRPOLossConfig(eda=EDAConfig(min_ratio=0.0, max_ratio=math.inf))))
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
            data=replace(config.data, eval="arithmetic:1@test", eval_size=8),
            optim=replace(config.optim, epochs=2, minibatches=2),
            loss=GRPOLossConfig(beta=0.05),
            save_every=1,
            keep_checkpoints=1,
        )
    )
    output = tmp_path / "run"
    assert sorted(path.name for path in output.iterdir()) == [
        "checkpoints",
        "completions.jsonl",
        "config.yaml",
        "final",
        "metrics.jsonl",
    ]
    assert [path.name for path in (output / "checkpoints").iterdir()] == ["step-000002"]
    start, *steps = records(output)
    assert start.keys() == {"step", "eval/accuracy", "eval/stderr"}
    assert [record["step"] for record in steps] == [1, 2]
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


def test_checkpointed_activations_give_the_same_gradient(config):
    gradients = []
    for model in (ModelConfig(), ModelConfig(gradient_checkpointing=True)):
        trainer = Trainer(replace(config, model=model))
        gradients.append(gradient(trainer, rollout(trainer)))
        trainer.close()
    torch.testing.assert_close(*gradients)


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


def test_resume_refuses_another_configuration(config, tmp_path):
    train(replace(config, save_every=1, steps=1))
    with pytest.raises(ValueError, match=r"optim\.learning_rate was 0\.001, is 0\.5"):
        train(replace(config, optim=replace(config.optim, learning_rate=0.5)), resume=True)


def test_resume_without_a_checkpoint_is_an_error(config):
    with pytest.raises(FileNotFoundError, match="nothing to resume"):
        train(config, resume=True)


def test_groups_must_divide_over_minibatches(config):
    with pytest.raises(ValueError, match="minibatches"):
        Trainer(replace(config, optim=replace(config.optim, minibatches=3)))


TWO_PROCESSES = """
import sys, torch
from dataclasses import replace
from pathlib import Path
sys.path.insert(0, str(Path(sys.argv[1])))
from test_trainer import gradient
from edge_grpo.config import load_config
from edge_grpo.metrics import step_metrics
from edge_grpo.run.report import write_report
from edge_grpo.trainer import Trainer

trainer = Trainer(load_config(Path(sys.argv[2])))
everyone = torch.load(sys.argv[3], weights_only=False)
rank, size = trainer.accelerator.process_index, len(everyone) // trainer.accelerator.num_processes
assert trainer.rewarder.grader([(("1/2",), "0.5")]) == ["correct"]  # workers, on every process
torch.save(gradient(trainer, everyone[rank * size : (rank + 1) * size]), f"{sys.argv[3]}.{rank}")
trainer.close()
"""


@pytest.mark.slow
def test_two_processes_give_one_process_gradient(config, tmp_path):
    """Real DistributedDataParallel over gloo: each process holds one of two groups, of different token counts."""
    trainer = Trainer(config)
    samples = rollout(trainer)
    for number, sample in enumerate(samples):
        sample.advantage = float(number) - 3
    expected = gradient(trainer, samples)
    trainer.close()
    data, file, script = tmp_path / "samples.pt", tmp_path / "config.yaml", tmp_path / "two.py"
    torch.save(samples, data)
    file.write_text(yaml.safe_dump(to_dict(config)))
    script.write_text(TWO_PROCESSES)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    here = str(Path(__file__).parent)
    result = subprocess.run(
        [*launch, str(script), here, str(file), str(data)],
        env=os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    for rank in (0, 1):
        got = torch.load(f"{data}.{rank}")
        torch.testing.assert_close(got, expected, rtol=0, atol=float(2e-5 * expected.abs().max()))


# ---- Injected tokens -----------------------------------------------------------------------------------------------


def plain_gradient(trainer: Trainer, samples, term, counts) -> torch.Tensor:
    """The gradient of -sum(term(logprob, advantage, is_injected)) / number of tokens that count, by plain PyTorch."""
    trainer.policy.zero_grad()
    loss, tokens = torch.zeros(()), 0
    for sample in samples:
        ids = torch.tensor([sample.prompt.token_ids + sample.response.token_ids])
        logprobs = trainer.model(input_ids=ids).logits[0, :-1].log_softmax(-1)
        taken = logprobs.gather(1, ids[0, 1:, None])[len(sample.prompt.token_ids) - 1 :, 0]
        injected = torch.tensor([mark == Provenance.INJECTED for mark in sample.response.provenance])
        loss = loss - torch.where(injected, term(taken, sample.advantage), sample.advantage * taken).sum()
        tokens += int(counts(injected).sum())
    (loss / tokens).backward()
    return torch.cat([p.grad.flatten() for p in trainer.policy.parameters() if p.grad is not None])


@pytest.mark.parametrize(
    ("treatment", "term"),
    [
        ("credit", lambda logprob, advantage: advantage * logprob),
        ("mask", lambda logprob, advantage: 0 * logprob),
        ("sft", lambda logprob, advantage: 0.7 * logprob),
        ("shaped", lambda logprob, advantage: advantage * logprob.exp() / (logprob.exp() + 0.2)),
    ],
    ids=["credit", "mask", "sft", "shaped"],
)
def test_what_injected_tokens_do_is_in_the_gradient(config, treatment, term):
    """Corrected responses as the trainer batches them, of all three kinds, against the four definitions."""
    loss = GRPOLossConfig(injected=treatment, sft_weight=0.7, shaped_gamma=0.2)
    rollout_config = replace(config.rollout, num_generations=8)
    trainer = Trainer(replace(config, loss=loss, data=DataConfig(train="arithmetic:3"), rollout=rollout_config))
    samples = rollout(trainer)
    assert {sample.response.correction for sample in samples} >= {"reflect", "answer", "solution"}
    for number, sample in enumerate(samples):
        sample.advantage = (-1.0) ** number * (1 + number / 4)
    ours = gradient(trainer, samples)
    counts = torch.logical_not if treatment == "mask" else torch.ones_like
    plain = plain_gradient(trainer, samples, term, counts)
    trainer.close()
    torch.testing.assert_close(ours, plain, rtol=0, atol=float(2e-5 * plain.abs().max()))


# ---- Rewards that fail ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", ["dapo", "kl", "entropy quantile", "gspo"])
def test_a_skipped_response_is_as_if_it_had_not_been_sampled(config, loss):
    """Same advantages of its group's others, same gradient, same normalizers; it is neither corrected nor counted."""
    trainer = Trainer(replace(config, loss=LOSSES[loss]))
    samples = rollout(trainer)
    gone = samples[1]
    for number, sample in enumerate(samples):  # groups that are not collapsed, whatever was sampled
        sample.reward = replace(sample.reward, total=float(number))
    gone.reward = replace(gone.reward, skipped=True)
    gone.advantage, gone.weight = 0.0, 1.0
    trainer.assign_advantages(samples)
    with_it = gradient(trainer, samples), [sample.advantage for sample in samples if sample is not gone]
    metrics = step_metrics(samples)
    without = [sample for sample in samples if sample is not gone]
    trainer.assign_advantages(without)
    without_it = gradient(trainer, without), [sample.advantage for sample in without]
    trainer.close()
    assert gone.advantage == 0.0
    assert with_it[1] == without_it[1]
    torch.testing.assert_close(with_it[0], without_it[0], rtol=0, atol=0)
    assert metrics["grading/skipped"] == 1
    others = step_metrics(without)
    grading = ("grading/", "outcome/")
    assert {k: v for k, v in metrics.items() if not k.startswith(grading)} == {
        k: v for k, v in others.items() if not k.startswith(grading)
    }


@pytest.mark.parametrize("loss", ["dapo", "kl", "entropy quantile"])
def test_a_step_without_any_reward_changes_nothing(config, loss):
    trainer = Trainer(replace(config, loss=LOSSES[loss]))
    samples = rollout(trainer)
    for sample in samples:
        sample.reward = replace(sample.reward, skipped=True)
        sample.advantage = 0.0
    trainer.assign_advantages(samples)
    before = {name: parameter.clone() for name, parameter in trainer.model.named_parameters()}
    metrics = step_metrics(samples) | trainer.update(samples, 1)
    for name, parameter in trainer.model.named_parameters():
        torch.testing.assert_close(parameter, before[name], rtol=0, atol=0)
    trainer.close()
    assert metrics["grading/skipped"] == len(samples)
    assert math.isnan(metrics["reward/mean"])


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
    reward = RewardConfig(functions={"unreliable:by_turns": 1.0}, function_timeout=0.5, on_error=on_error)
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
        train(replace(config, reward=RewardConfig(functions={"unreliable:by_turns": 1.0})))
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


# ---- Reference solutions -------------------------------------------------------------------------------------------


def test_solutions_that_their_own_grader_rejects_are_not_injected(config, tmp_path):
    rows = [
        {"problem": f"What is {n} + 1?", "answer": str(n + 1), "solution": f"It is \\boxed{{{n + 1 + n % 2}}}."}
        for n in range(8)
    ]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    only = CorrectionConfig(reflect=0.0, answer=1e-9, solution=1 - 1e-9)
    trainer = Trainer(replace(config, data=DataConfig(train=str(tmp_path / "rows.json")), correction=only))
    samples = [sample for step in (1, 2, 3, 4) for sample in trainer.sample(step)]
    trainer.close()
    assert trainer.rejected_solutions == {1, 3, 5, 7}
    assert all(sample.prompt.example.solution for sample in samples)  # reward functions still see them
    kinds = [
        {sample.response.correction for sample in samples if sample.prompt.example.index % 2 == odd} for odd in (0, 1)
    ]
    assert kinds[0] - {None} == {"solution"}
    assert kinds[1] - {None} == {"answer"}
