"""The model's forward under the trainer: statistics and losses from hidden states, by ``edge_kernels``.

TRL's own patched forward, which this one wraps, serves generation and what is left to TRL. Everything happens inside
the forward of the outermost module, because that is where wrappers have gathered the parameters.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from trl.trainer.utils import FusedCausalLMOutput

from edge_grpo.policy.head import LMHead
from edge_kernels import GRPOLossOutput, linear_token_stats

HeadLoss = Callable[[Tensor, LMHead], GRPOLossOutput]  # of the hidden states (B, L - 1, D) that predict a token


def use_edge_kernels(model: PreTrainedModel, *, temperature: float, cast_to_fp32: bool) -> None:
    """Let ``model(..., fused_lm_head=True)`` compute its statistics with ``edge_kernels``, and accept ``edge_loss``.

    ``model(..., edge_loss=f)`` returns ``f(hidden, head)``. ``model`` is one that TRL's trainer has prepared. Router
    logits (mixture of experts) and labels that are already shifted remain TRL's.
    """
    of_trl = model.forward
    text_config = model.config.get_text_config()

    @functools.wraps(type(model).forward)  # `generate` checks its arguments against this signature
    def forward(
        self: PreTrainedModel,
        *args: Any,
        edge_loss: HeadLoss | None = None,
        fused_lm_head: bool = False,
        labels: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        if edge_loss is None:
            routed = kwargs.get("output_router_logits", getattr(text_config, "output_router_logits", False))
            if not fused_lm_head:
                return of_trl(*args, **kwargs) if labels is None else of_trl(*args, labels=labels, **kwargs)
            if routed or labels is None:
                return of_trl(*args, fused_lm_head=True, labels=labels, **kwargs)
        hidden = self.base_model(*args, use_cache=False, **kwargs).last_hidden_state[:, :-1]
        head = LMHead.of(self)
        if cast_to_fp32:
            hidden = hidden.float()
        with torch.autocast(hidden.device.type, enabled=False) if cast_to_fp32 else nullcontext():
            if edge_loss is not None:
                return edge_loss(hidden, head)
            assert labels is not None
            targets = labels[:, 1:]
            stats = linear_token_stats(
                hidden,
                head.weight,
                targets,
                head.bias,
                temperature=temperature,
                softcap=head.softcap,
                logit_scale=head.logit_scale,
                low_rank=head.low_rank(hidden),
            )
        return FusedCausalLMOutput(log_probs=stats.logprobs, entropy=stats.entropy, label_mask=targets != -100)

    model.forward = types.MethodType(forward, model)
