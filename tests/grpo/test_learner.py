"""Learning on the shipped model: each loss's gradient, scoring, injected tokens, skipped responses, the schedule."""

from __future__ import annotations

import math
import weakref
from contextlib import closing
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from training import LOSSES, assign, collect, flat_gradient, gradient, rollout

from edge_grpo.config import AdvantageConfig, DataConfig, ModelConfig, OptimConfig
from edge_grpo.learning.schedule import learning_rate_factor
from edge_grpo.learning.totals import LossTotals, Normalizers
from edge_grpo.metrics import step_metrics
from edge_grpo.trainer import Trainer
from edge_grpo.types import Provenance
from edge_kernels import GRPOLossConfig

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore:.*use_reentrant.*")]


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
        trainer.learner.optim = replace(config.optim, micro_batch_size=size)
        gradients.append(gradient(trainer.learner, samples))
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
    ours = gradient(trainer.learner, samples)
    trainer.learner.policy.zero_grad()
    tokens = sum(len(sample.response.token_ids) for sample in samples)
    loss = torch.zeros(())
    for sample in samples:
        ids = torch.tensor([sample.prompt.token_ids + sample.response.token_ids])
        logprobs = trainer.learner.model(input_ids=ids).logits[0, :-1].log_softmax(-1)
        taken = logprobs.gather(1, ids[0, 1:, None])[len(sample.prompt.token_ids) - 1 :]
        loss = loss - sample.advantage * taken.sum() / tokens
    loss.backward()
    plain = flat_gradient(trainer.learner)
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
    samples = collect(trainer)
    trainer.learner.score(samples)
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
    ours = gradient(trainer.learner, samples)
    trainer.learner.policy.zero_grad()
    tokens = sum(len(sample.response.token_ids) for sample in samples)
    total = torch.zeros(())
    for sample, factor in zip(samples, factors, strict=True):
        ids = torch.tensor([sample.prompt.token_ids + sample.response.token_ids])
        logprobs = trainer.learner.model(input_ids=ids).logits[0, :-1].log_softmax(-1)
        taken = logprobs.gather(1, ids[0, 1:, None])[len(sample.prompt.token_ids) - 1 :, 0]
        total = total - sample.advantage * (taken * torch.tensor(factor)).sum() / tokens
    total.backward()
    plain = flat_gradient(trainer.learner)
    trainer.close()
    torch.testing.assert_close(ours, plain, rtol=0, atol=float(5e-5 * plain.abs().max()))


def test_collapsed_groups_are_left_out_and_change_nothing(config, monkeypatch):
    trainer = Trainer(config)
    samples = rollout(trainer)
    for number, sample in enumerate(samples):
        sample.advantage = float(number - 2) if sample.group == 0 else 0.0
    assert len(trainer.learner._contributing(samples)) == 3  # advantages -2, -1, 0, 1 and a group of zeros
    ours = gradient(trainer.learner, samples)
    monkeypatch.setattr(trainer.learner, "_contributing", lambda part: part)
    everything = gradient(trainer.learner, samples)
    trainer.close()
    torch.testing.assert_close(ours, everything, rtol=0, atol=float(2e-5 * everything.abs().max()))


def test_truncated_responses_leave_the_loss(config):
    """Its gradient and its totals are those of the others alone, for a loss that is normalized by tokens."""
    loss = GRPOLossConfig(mask_truncated_completions=True)
    trainer = Trainer(replace(config, loss=loss, method="grpo"))
    samples = rollout(trainer)
    for number, sample in enumerate(samples):
        sample.response = replace(sample.response, finish_reason="length" if number % 3 else "stop")
        sample.advantage = float(number) - 3.5
    ours = gradient(trainer.learner, samples)
    others = gradient(trainer.learner, [sample for sample in samples if not sample.is_truncated])
    torch.testing.assert_close(ours, others, rtol=0, atol=float(2e-5 * others.abs().max()))
    assert (gradient(trainer.learner, [sample for sample in samples if sample.is_truncated]) == 0).all()
    trainer.close()


def test_responses_off_the_samplers_policy_lose_a_negative_advantage(config):
    loss = GRPOLossConfig(off_policy_mask_threshold=0.5)
    trainer = Trainer(replace(config, loss=loss, method="grpo"))
    samples = rollout(trainer)
    for number, sample in enumerate(samples):
        sample.advantage = float(number) - 3.5
        if number % 2:  # the sampler was surer of each token than the trainer is
            response = sample.response
            sample.response = replace(response, logprobs=tuple(value + 0.6 for value in response.logprobs))
    totals = LossTotals()
    trainer.learner.accumulate_gradient(samples, totals)
    dropped = sum(len(sample.response.token_ids) for sample in samples[1:4:2])
    assert totals.metrics(1)["masked/off_policy"] == pytest.approx(dropped / sum(len(s.logprobs) for s in samples))
    ours = flat_gradient(trainer.learner)
    samples[1].advantage = samples[3].advantage = 0.0
    expected = gradient(trainer.learner, samples)
    trainer.close()
    torch.testing.assert_close(ours, expected, rtol=0, atol=float(2e-5 * expected.abs().max()))


def test_a_step_with_every_mask_and_penalty_outside_the_loss(config):
    """On the first step the policy is the reference: the KL divergence is that of a rounding error."""
    config = replace(
        config,
        loss=GRPOLossConfig(loss_type="sapo", mask_truncated_completions=True, off_policy_mask_threshold=0.5),
        reward=replace(config.reward, kl_coef=0.1, kl_penalty="k2"),
        eda=AdvantageConfig(scale_rewards="batch"),
    )
    trainer = Trainer(config)
    samples, metrics = trainer.step(1)
    trainer.close()
    assert 0 <= metrics["reward/kl"] < 1e-6
    truncated = [sample.response.finish_reason == "length" for sample in samples]
    assert metrics["masked/truncated"] == sum(truncated) / len(samples)
    assert metrics["masked/off_policy"] == 0
    assert math.isfinite(metrics["grad/norm"])


def test_scoring_covers_only_what_sampling_left_without_a_record(config, monkeypatch):
    trainer = Trainer(config)
    samples = collect(trainer)
    scored = []
    forward = trainer.learner.token_stats

    def spy(model, chunk):
        scored.extend(chunk)
        return forward(model, chunk)

    monkeypatch.setattr(trainer.learner, "token_stats", spy)
    trainer.learner.score(samples)
    trainer.close()
    corrected = [sample for sample in samples if sample.response.correction is not None]
    assert corrected, "the model solved everything; choose a harder level"
    assert {id(s) for s in scored} == {id(s) for s in corrected}
    for sample in samples:
        assert len(sample.entropy) == len(sample.logprobs) == len(sample.response.token_ids)
        assert not sample.entropy.isnan().any()


def test_recorded_values_are_those_of_a_scoring_pass(config):
    trainer = Trainer(replace(config, method="grpo"))
    samples = collect(trainer)
    assert all(sample.response.is_recorded for sample in samples)
    logprobs, entropy = trainer.learner.token_stats(trainer.learner.unwrapped, samples)
    trainer.close()
    for sample, scored_logprobs, scored_entropy in zip(samples, logprobs, entropy, strict=True):
        torch.testing.assert_close(torch.tensor(sample.response.logprobs), scored_logprobs, rtol=0, atol=1e-4)
        torch.testing.assert_close(torch.tensor(sample.response.entropy), scored_entropy, rtol=0, atol=1e-4)


def test_checkpointed_activations_give_the_same_gradient(config):
    gradients = []
    for model in (ModelConfig(), ModelConfig(gradient_checkpointing=True)):
        trainer = Trainer(replace(config, model=model))
        gradients.append(gradient(trainer.learner, rollout(trainer)))
        trainer.close()
    torch.testing.assert_close(*gradients)


# ---- Injected tokens -------------------------------------------------------------------------------------------------


def plain_gradient(trainer: Trainer, samples, term, counts) -> torch.Tensor:
    """The gradient of -sum(term(logprob, advantage, is_injected)) / number of tokens that count, by plain PyTorch."""
    trainer.learner.policy.zero_grad()
    loss, tokens = torch.zeros(()), 0
    for sample in samples:
        ids = torch.tensor([sample.prompt.token_ids + sample.response.token_ids])
        logprobs = trainer.learner.model(input_ids=ids).logits[0, :-1].log_softmax(-1)
        taken = logprobs.gather(1, ids[0, 1:, None])[len(sample.prompt.token_ids) - 1 :, 0]
        injected = torch.tensor([mark == Provenance.INJECTED for mark in sample.response.provenance])
        loss = loss - torch.where(injected, term(taken, sample.advantage), sample.advantage * taken).sum()
        tokens += int(counts(injected).sum())
    (loss / tokens).backward()
    return flat_gradient(trainer.learner)


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
    ours = gradient(trainer.learner, samples)
    counts = torch.logical_not if treatment == "mask" else torch.ones_like
    plain = plain_gradient(trainer, samples, term, counts)
    trainer.close()
    torch.testing.assert_close(ours, plain, rtol=0, atol=float(2e-5 * plain.abs().max()))


# ---- Rewards that fail -----------------------------------------------------------------------------------------------


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
    assign(trainer, samples)
    with_it = gradient(trainer.learner, samples), [sample.advantage for sample in samples if sample is not gone]
    metrics = step_metrics(samples)
    without = [sample for sample in samples if sample is not gone]
    assign(trainer, without)
    without_it = gradient(trainer.learner, without), [sample.advantage for sample in without]
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
    assign(trainer, samples)
    before = {name: parameter.clone() for name, parameter in trainer.learner.model.named_parameters()}
    metrics = step_metrics(samples) | trainer.learner.update(samples, 1)
    for name, parameter in trainer.learner.model.named_parameters():
        torch.testing.assert_close(parameter, before[name], rtol=0, atol=0)
    trainer.close()
    assert metrics["grading/skipped"] == len(samples)
    assert math.isnan(metrics["reward/mean"])


# ---- The schedule ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.5, 1, 1, 1, 1, 1, 1]),
        ("linear", [0.5, 1, 1, 0.75, 0.5, 0.25, 0]),
        ("cosine", [0.5, 1, 1, (2 + 2**0.5) / 4, 0.5, (2 - 2**0.5) / 4, 0]),
    ],
)
def test_the_learning_rate_rises_and_falls(schedule, expected):
    """Two steps of warm-up, then four down to zero."""
    optim = OptimConfig(schedule=schedule, warmup_steps=2)
    assert [learning_rate_factor(update, optim, 6) for update in range(7)] == pytest.approx(expected, abs=1e-6)


def test_autocasts_copies_of_weights_end_with_their_use(config):
    """With checkpointed activations a layer's are needed no longer; together they would be a second model."""
    mixed = replace(config, model=ModelConfig(precision="mixed", gradient_checkpointing=True))
    with closing(Trainer(mixed)) as trainer:
        samples = rollout(trainer)
        learner, copies = trainer.learner, Copies()
        learner.model.train()
        with copies:
            learner._loss_of(learner._batch(samples[:2]), Normalizers(1, 1, None))
        assert len(copies.made) > 20
        assert copies.most < sum(nbytes for _, nbytes in copies.made) / 3


class Copies(TorchDispatchMode):
    """Remembers copies of float32 matrices in bfloat16, and the bytes of most of them at one time."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[tuple[weakref.ref, int]] = []
        self.most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default and out.dtype == torch.bfloat16 and out.dim() == 2:
            self.made.append((weakref.ref(out), out.nbytes))
            self.most = max(self.most, sum(nbytes for copy, nbytes in self.made if copy() is not None))
        return out
