"""A run that trains adapters: what moves, the reference without a copy, checkpoints and the saved adapter."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from training import records, rollout

from edge_grpo.config import ModelConfig
from edge_grpo.policy.adapters import CONFIG_FILE, merged_weights
from edge_grpo.policy.loading import load_model
from edge_grpo.trainer import Trainer, train
from edge_kernels import GRPOLossConfig

pytest.importorskip("peft", reason="adapters are peft's")
pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore:.*use_reentrant.*")]

LORA = {"rank": 4}
TIMING = ("time/", "throughput/", "memory/")


@pytest.fixture
def config(config):
    return replace(config, model=ModelConfig(lora=LORA), loss=GRPOLossConfig(beta=0.01), save_every=2, seed=1)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_only_adapters_move(config, checkpointing):
    config = replace(config, model=replace(config.model, gradient_checkpointing=checkpointing))
    trainer = Trainer(config)
    before = {name: value.clone() for name, value in trainer.learner.model.named_parameters()}
    samples = rollout(trainer)
    assert trainer.learner.reference is None  # the base model under the adapters serves
    for sample in samples:
        torch.testing.assert_close(sample.ref_logprobs, sample.logprobs, rtol=0, atol=1e-5)
    metrics = trainer.learner.update(samples, 1)
    assert metrics["grad/norm"] > 0
    moved = {name for name, value in trainer.learner.model.named_parameters() if not torch.equal(value, before[name])}
    assert moved
    assert all(".lora_B." in name for name in moved)  # B is 0, so A has no gradient yet
    trainer.learner.score(samples)
    differences = [float((sample.ref_logprobs - sample.logprobs).abs().max()) for sample in samples]
    assert max(differences) > 1e-4
    trainer.close()


def test_a_resumed_run_makes_the_same_steps_and_leaves_an_adapter(config, tmp_path):
    whole = replace(config, steps=4, output=str(tmp_path / "whole"))
    train(whole)
    parts = replace(config, steps=2, output=str(tmp_path / "parts"))
    train(parts)
    train(replace(parts, steps=4), resume=True)
    for expected, got in zip(records(tmp_path / "whole"), records(tmp_path / "parts"), strict=True):
        assert math.isfinite(expected["loss"])
        for key, value in expected.items():
            assert key.startswith(TIMING) or got[key] == value, (expected["step"], key)

    final = tmp_path / "parts" / "final"
    assert (final / CONFIG_FILE).is_file()
    assert not (final / "model.safetensors").exists()
    saved = load_file(tmp_path / "parts" / "checkpoints" / "step-000004" / "model.safetensors")
    assert saved
    assert all(".lora_" in name for name in saved)
    model, tokenizer = load_model(ModelConfig(path=str(final)))
    base, _ = load_model(ModelConfig())
    names = dict(merged_weights(model)).keys()
    assert names == base.state_dict().keys()
    assert tokenizer.get_vocab()
    for name, value in model.named_parameters():
        if value.requires_grad:
            torch.testing.assert_close(value.detach(), saved[name], rtol=0, atol=0)


def test_a_saved_adapter_is_trained_further_from_where_it_was(config, tmp_path):
    train(replace(config, steps=1))
    again = replace(
        config,
        model=ModelConfig(path=str(tmp_path / "run" / "final")),
        output=str(tmp_path / "again"),
    )
    trainer = Trainer(again)
    assert trainer.learner.reference is not None  # the base model is not where this run begins
    samples = rollout(trainer)
    for sample in samples:
        torch.testing.assert_close(sample.ref_logprobs, sample.logprobs, rtol=0, atol=1e-5)
    trainer.close()


def test_a_checkpoint_of_other_adapters_is_refused(config):
    train(replace(config, steps=2))
    other = replace(config, steps=4, model=ModelConfig(lora={"rank": 8}))
    with pytest.raises(ValueError, match=r"model\.lora was \{'rank': 4\}, is \{'rank': 8\}"):
        train(other, resume=True)


def test_a_configuration_of_peft_that_changed_is_noticed(config, tmp_path):
    """Its shapes fit, but the same adapter would count twice as much."""
    file = tmp_path / "lora.json"
    options = {"peft_type": "LORA", "r": 4, "target_modules": ["q_proj"], "lora_alpha": 4}
    file.write_text(json.dumps(options))
    config = replace(config, model=ModelConfig(lora={"config": str(file)}))
    train(config)
    train(replace(config, steps=3), resume=True)
    file.write_text(json.dumps(options | {"lora_alpha": 8}))
    with pytest.raises(ValueError, match="adapter changed since the run last began"):
        train(replace(config, steps=4), resume=True)
