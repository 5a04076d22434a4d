"""The loss of a batch of tokens whose statistics are known: the op, which carries a gradient to the statistics.

A token's loss itself is the backends'; what a batch's masks, totals and options make of it is batch.py's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from edge_kernels.backend import kernels
from edge_kernels.contract import METRICS, LossRule, TokenLoss, TokenTerms
from edge_kernels.ops.autograd import no_gradients


@torch.library.custom_op("edge_kernels::token_loss", mutates_args=())
def token_loss_op(
    logprobs: Tensor, entropy: Tensor, terms: list[Tensor | None], rule: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return kernels(logprobs).token_loss(logprobs, entropy, TokenTerms.unpack(terms), LossRule.unpack(rule))


@token_loss_op.register_fake
def _(logprobs: Tensor, entropy: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    shape = logprobs.shape
    return logprobs.new_empty(()), logprobs.new_empty(len(METRICS)), logprobs.new_empty(shape), entropy.new_empty(shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, metrics, d_logprobs, d_entropy = output
    ctx.save_for_backward(d_logprobs, d_entropy)
    ctx.mark_non_differentiable(metrics, d_logprobs, d_entropy)
    ctx.set_materialize_grads(False)
    ctx.has_bonus = TokenTerms.unpack(inputs[2]).bonus_weight is not None
    ctx.others = no_gradients(inputs[2:])


def _backward(ctx: Any, grad_loss: Tensor | None, *_: Tensor | None) -> tuple[Any, ...]:
    if grad_loss is None:
        return None, None, *ctx.others
    d_logprobs, d_entropy = ctx.saved_tensors
    # Without a bonus the entropy has no gradient at all, which spares the kernel its part.
    return grad_loss * d_logprobs, grad_loss * d_entropy if ctx.has_bonus else None, *ctx.others


token_loss_op.register_autograd(_backward, setup_context=_setup_context)


class KnownLoss(torch.autograd.Function):
    """A loss, and its metrics, whose derivatives by the statistics are known already."""

    @staticmethod
    def forward(
        ctx: Any, logprobs: Tensor, entropy: Tensor, known: TokenLoss, has_bonus: bool
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(known.d_logprobs, known.d_entropy)
        ctx.mark_non_differentiable(known.metrics)
        ctx.set_materialize_grads(False)
        ctx.has_bonus, ctx.others = has_bonus, (None, None)
        return known.loss, known.metrics

    backward = staticmethod(_backward)
