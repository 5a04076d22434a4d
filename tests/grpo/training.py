"""A very small run taken apart: a model, one rollout, its gradient, and what a run has recorded."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from edge_grpo.batching import Sample
from edge_grpo.config import ModelConfig
from edge_grpo.credit import assign_advantages
from edge_grpo.learning.learner import Learner
from edge_grpo.learning.totals import LossTotals
from edge_grpo.metrics import PhaseTimes
from edge_grpo.policy.loading import load_tokenizer
from edge_grpo.trainer import Trainer
from edge_kernels import GRPOLossConfig

LOSSES = {
    "dapo": GRPOLossConfig(),
    "grpo": GRPOLossConfig(loss_type="grpo"),
    "bnpo": GRPOLossConfig(loss_type="bnpo", injected="mask"),
    "dr_grpo": GRPOLossConfig(loss_type="dr_grpo", max_completion_length=24),
    "cispo": GRPOLossConfig(loss_type="cispo", epsilon_high=5.0, injected="shaped"),
    "sapo": GRPOLossConfig(loss_type="sapo"),
    "luspo": GRPOLossConfig(loss_type="luspo", importance_sampling_level="sequence"),
    "geo_mean": GRPOLossConfig(loss_type="geo_mean"),
    "vespo": GRPOLossConfig(loss_type="vespo"),
    "gspo": GRPOLossConfig(loss_type="grpo", importance_sampling_level="sequence", injected="sft"),
    "entropy bonus": GRPOLossConfig(entropy_coef=0.1),
    "entropy quantile": GRPOLossConfig(top_entropy_quantile=0.5),
    "kl": GRPOLossConfig(beta=0.1),
}


def untied_model(folder: Path) -> Path:
    """A random Qwen2 of two layers, its head apart from its embedding, with the shipped tokenizer; written to load."""
    tokenizer = load_tokenizer(ModelConfig())
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}  # of 32, the smallest that vLLM has on a CPU
    vocab = len(tokenizer) + 16  # loaded for a Qwen2 it gets a token more
    config = Qwen2Config(vocab_size=vocab, tie_word_embeddings=False, **sizes, **heads)
    Qwen2ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def collect(trainer: Trainer, step: int = 1) -> list[Sample]:
    return trainer.collector.collect(step, PhaseTimes(torch.device("cpu"))).samples


def assign(trainer: Trainer, samples: Sequence[Sample]) -> None:
    assign_advantages(samples, trainer.learner.loss, entropy_driven=trainer.config.use_eda)


def rollout(trainer: Trainer) -> list[Sample]:
    """The samples of the first step as the update receives them."""
    samples = collect(trainer)
    trainer.learner.score(samples)
    assign(trainer, samples)
    return samples


def gradient(learner: Learner, samples: Sequence[Sample]) -> torch.Tensor:
    """The gradient of one optimizer step's loss over ``samples``, all parameters in one vector."""
    learner.policy.zero_grad()
    learner.model.train()
    learner.accumulate_gradient(samples, LossTotals())
    return flat_gradient(learner)


def flat_gradient(learner: Learner) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in learner.policy.parameters() if p.grad is not None])


def records(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
