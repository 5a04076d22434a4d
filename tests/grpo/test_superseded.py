"""``correction.superseded: mask``: the attempt before a reflection has no loss, and all else is as under ``credit``."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from corrections import SAMPLED
from training import LOSSES, flat_gradient, gradient, rollout

from edge_grpo.config import CorrectionConfig
from edge_grpo.learning.totals import LossTotals
from edge_grpo.metrics import drift_metrics, superseded_metrics
from edge_grpo.trainer import Trainer
from edge_grpo.types import Provenance, Response

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore:.*use_reentrant.*")]

# A wrong attempt is kept by two kinds of correction; a hint keeps nothing of it.
MIX = {"reflect": 0.4, "answer": 0.3, "hint": 0.3}


@pytest.fixture
def masking(config):
    return replace(config, seed=1, correction=CorrectionConfig(mix=MIX, superseded="mask", max_length=24))


def own_rollout(trainer):
    """A step's samples, every one with an advantage of its own."""
    samples = rollout(trainer)
    for number, sample in enumerate(samples):
        sample.advantage = (-1.0) ** number * (1 + number / 4)
    assert {"reflect", "answer"} <= {sample.response.correction for sample in samples}, "choose another seed"
    return samples


def test_which_tokens_are_superseded():
    marks = (Provenance.SAMPLED, Provenance.SAMPLED, Provenance.INJECTED, Provenance.CONTINUED)
    plain = Response((1, 2, 3, 4), (0.0,) * 4, (0.0,) * 4, marks, "stop")
    assert plain.superseded == (False,) * 4
    assert replace(plain, correction="reflect").superseded == (True, True, False, False)


def test_superseded_tokens_have_no_loss(masking):
    """One step on-policy under dapo is -sum(A * ratio) / tokens, over the tokens that are left: value and gradient."""
    trainer = Trainer(masking)
    samples = own_rollout(trainer)
    totals = LossTotals()
    trainer.learner.policy.zero_grad()
    trainer.learner.accumulate_gradient(samples, totals)
    ours = flat_gradient(trainer.learner)
    trainer.learner.policy.zero_grad()
    kept = [
        torch.tensor([not (sample.response.correction and mark == SAMPLED) for mark in sample.response.provenance])
        for sample in samples
    ]
    tokens = sum(int(flags.sum()) for flags in kept)
    assert 0 < tokens < sum(len(sample.response.token_ids) for sample in samples)
    value = -sum(sample.advantage * int(flags.sum()) for sample, flags in zip(samples, kept, strict=True)) / tokens
    assert totals.loss == pytest.approx(value, rel=1e-5)
    loss = torch.zeros(())
    for sample, flags in zip(samples, kept, strict=True):
        ids = torch.tensor([sample.prompt.token_ids + sample.response.token_ids])
        logprobs = trainer.learner.model(input_ids=ids).logits[0, :-1].log_softmax(-1)
        taken = logprobs.gather(1, ids[0, 1:, None])[len(sample.prompt.token_ids) - 1 :, 0]
        loss = loss - sample.advantage * taken[flags].sum() / tokens
    loss.backward()
    plain = flat_gradient(trainer.learner)
    trainer.close()
    torch.testing.assert_close(ours, plain, rtol=0, atol=float(2e-5 * plain.abs().max()))


# dapo counts tokens, grpo means over each response, bnpo masks injected tokens too (an answer has then none left),
# gspo has one ratio a response, and the quantile takes its threshold from the tokens that are left.
@pytest.mark.parametrize("name", ["dapo", "grpo", "bnpo", "gspo", "entropy quantile"])
def test_micro_batches_give_the_big_batch_gradient(masking, name):
    trainer = Trainer(replace(masking, loss=LOSSES[name]))
    samples = own_rollout(trainer)
    gradients = []
    for size in (8, 3):
        trainer.learner.optim = replace(masking.optim, micro_batch_size=size)
        gradients.append(gradient(trainer.learner, samples))
    trainer.close()
    assert gradients[0].abs().max() > 0
    torch.testing.assert_close(*gradients, rtol=0, atol=float(2e-5 * gradients[0].abs().max()))


def test_entropy_and_advantages_are_those_of_credit(masking):
    """The weights are the response's, wrong attempt included, so that the switch changes the loss alone."""
    found = {}
    for superseded in ("credit", "mask"):
        correction = replace(masking.correction, superseded=superseded)
        trainer = Trainer(replace(masking, correction=correction))
        samples = rollout(trainer)
        gradient(trainer.learner, samples)
        found[superseded] = (
            [(s.response.token_ids, s.advantage, s.weight) for s in samples],
            gradient(trainer.learner, samples),
        )
        trainer.close()
    assert found["credit"][0] == found["mask"][0]
    assert any(weight != 1 for _, _, weight in found["mask"][0])
    assert not torch.allclose(found["credit"][1], found["mask"][1])


def test_metrics_count_them_and_drift_leaves_them_out(masking):
    trainer = Trainer(masking)
    samples, metrics = trainer.step(1)
    trainer.close()
    superseded = sum(sum(sample.response.superseded) for sample in samples)
    tokens = sum(len(sample.response.token_ids) for sample in samples)
    assert metrics["masked/superseded"] == pytest.approx(superseded / tokens)
    assert metrics["masked/superseded"] > 0
    assert metrics["drift/logprob_max"] < 1e-3  # what the loss does not read is no drift
    assert superseded_metrics(samples) == {"masked/superseded": metrics["masked/superseded"]}
    recorded = Response((1, 2), (-1.0, -2.0), (1.0, math.nan), (SAMPLED, SAMPLED), "stop")
    pair = (replace(samples[0], response=recorded), [None, -2.5], [None, 1.0])
    assert drift_metrics([pair]) == {"drift/logprob_mean": 0.5, "drift/logprob_max": 0.5}


def test_without_correction_there_is_nothing_to_mask(masking):
    trainer = Trainer(replace(masking, method="grpo"))
    _, metrics = trainer.step(1)
    trainer.close()
    assert "masked/superseded" not in metrics
