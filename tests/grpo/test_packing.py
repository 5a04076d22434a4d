"""Learning from micro-batches that are one row without padding: what the padded ones give, to rounding."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from training import LOSSES, gradient, rollout

from edge_grpo.config import ModelConfig, TrainConfig
from edge_grpo.trainer import Trainer

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore:.*use_reentrant.*")]


def uneven(samples) -> None:
    """Advantages for all, a reference that differs, and one response cut to its first token."""
    for number, sample in enumerate(samples):
        sample.advantage = (-1.0) ** number * (1 + number / 4)
        sample.ref_logprobs = sample.logprobs - 0.3
    first = samples[0]
    fields = ("token_ids", "logprobs", "entropy", "provenance")
    first.response = replace(first.response, **{name: getattr(first.response, name)[:1] for name in fields})
    for name in ("logprobs", "entropy", "ref_logprobs"):
        setattr(first, name, getattr(first, name)[:1])


def compare(trainer: Trainer, samples, **options) -> None:
    padded = gradient(trainer.learner, samples)
    optim = trainer.learner.optim
    trainer.learner.optim = replace(optim, packing=True, **options)
    packed = gradient(trainer.learner, samples)
    trainer.learner.optim = optim
    scale = padded.abs().max()
    assert scale > 0
    torch.testing.assert_close(packed, padded, rtol=0, atol=float(2e-5 * scale))


def test_every_loss_has_the_padded_gradient(config):
    """With several optimizer steps a rollout, so that old logprobs count; packs of 3 sequences, and of 70 tokens."""
    trainer = Trainer(replace(config, optim=replace(config.optim, epochs=2)))
    samples = rollout(trainer)
    uneven(samples)
    own = trainer.learner.loss
    for number, loss in enumerate(LOSSES.values()):
        trainer.learner.loss = replace(loss, temperature=own.temperature)
        compare(trainer, samples, **({"micro_batch_tokens": 70, "micro_batch_size": 8} if number % 2 else {}))
    trainer.close()


def test_scoring_gives_the_padded_values(config):
    trainer = Trainer(config)
    samples = rollout(trainer)
    padded = trainer.learner.token_stats(trainer.learner.unwrapped, samples)
    trainer.learner.optim = replace(config.optim, packing=True)
    packed = trainer.learner.token_stats(trainer.learner.unwrapped, samples)
    trainer.close()
    torch.testing.assert_close(packed, padded, rtol=0, atol=2e-5)


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings")  # peft's, of merging
def test_adapters_and_checkpointed_activations(config):
    pytest.importorskip("peft", reason="adapters are peft's")
    model = ModelConfig(gradient_checkpointing=True, lora={"rank": 4, "targets": "q_proj,lm_head"})
    trainer = Trainer(replace(config, model=model))
    samples = rollout(trainer)
    uneven(samples)
    compare(trainer, samples)
    trainer.close()


def test_padding_is_not_averaged_over_where_there_is_none():
    optim = replace(TrainConfig().optim, packing=True)
    for name in ("padding_entropy", "entropy_gradient"):
        with pytest.raises(ValueError, match=r"optim.packing and published.padding_entropy"):
            TrainConfig(optim=optim, published=replace(TrainConfig().published, **{name: True}))
