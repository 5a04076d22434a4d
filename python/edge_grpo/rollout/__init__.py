"""Rollout engines, which sample completions from the policy, and the choice among them.

Their protocol is ``edge_grpo.types.RolloutEngine``: evaluation and correction know it without what engines import.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from edge_grpo.config import TrainConfig
from edge_grpo.policy.loading import eos_token_ids
from edge_grpo.policy.model import unwrap
from edge_grpo.rollout.transformers import TransformersEngine
from edge_grpo.types import RolloutEngine

__all__ = ["TransformersEngine", "build_engine"]


def build_engine(config: TrainConfig, model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> RolloutEngine:
    """Return the engine that ``config.rollout.engine`` names, generating with ``model``, wrapped or not.

    Raises ValueError where vLLM is not installed or cannot hold the run's sequences, and RolloutError where a server is
    not reached within ``rollout.timeout``.
    """
    if config.rollout.engine == "vllm":
        from edge_grpo.rollout.vllm import VLLMEngine

        return VLLMEngine(config, model, tokenizer)
    if config.rollout.engine == "vllm-server":
        from edge_grpo.rollout.server import ServerEngine

        return ServerEngine(config, model, tokenizer)
    return TransformersEngine(
        unwrap(model),
        eos_token_ids=eos_token_ids(model, tokenizer),
        pad_token_id=int(tokenizer.pad_token_id),
        batch_size=config.rollout.batch_size,
        autocast_dtype=torch.bfloat16 if config.model.precision == "mixed" else None,
    )
