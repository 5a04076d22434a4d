"""Rollout engines: what samples completions from the policy. ``edge_grpo.types.RolloutEngine`` is their protocol."""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from ..config import TrainConfig
from ..model import eos_token_ids, unwrap
from ..types import RolloutEngine
from .transformers import TransformersEngine

__all__ = ["TransformersEngine", "build_engine"]


def build_engine(config: TrainConfig, model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> RolloutEngine:
    """Return the engine that ``config.rollout.engine`` names, generating with ``model``, wrapped or not."""
    if config.rollout.engine != "transformers":
        raise ValueError(f"rollout.engine={config.rollout.engine!r} is not supported yet; use 'transformers'")
    return TransformersEngine(
        unwrap(model),
        eos_token_ids=eos_token_ids(model, tokenizer),
        pad_token_id=int(tokenizer.pad_token_id),
        batch_size=config.rollout.batch_size,
        autocast_dtype=torch.bfloat16 if config.model.precision == "mixed" else None,
    )
