"""What a whole response decides about its tokens: plain PyTorch on (B, T), without gradient, for every backend.

Each function takes what one sweep over the logits has left; the kernels see the result as one more factor of a token.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from edge_kernels.config import GRPOLossConfig, KLEstimator

_SMALLEST = 1e-10  # added to a factor before its logarithm is taken, as verl does
_LOG_RATIO = 20.0  # bounds a token's log ratio and the sequence's in VESPO's weight, as in TRL
_LEAST_LOG = math.log(1e-8)


def geometric_mean(factor: Tensor, mask: Tensor) -> Tensor:
    """Return the geometric mean of a response's factors over its tokens, (B, 1); ``factor`` (B, T) or (B, 1)."""
    logs = (factor + _SMALLEST).log().expand(mask.shape).masked_fill(~mask, 0)
    return (logs.sum(-1, keepdim=True) / mask.sum(-1, keepdim=True).clamp(min=1)).exp()


def gamma_weight(
    log_ratio: Tensor,  # (B, T): current policy to old one, 0 where there is no record
    factor: Tensor | None,  # (B, T): the sampler's correction
    advantages: Tensor,  # (B, 1) or (B, T)
    mask: Tensor,  # (B, T)
    config: GRPOLossConfig,
) -> Tensor:
    """Return VESPO's weight w^k exp(lambda (1 - w)) of each response, or token where advantages are per token.

    w is the product of the response's ratios and factors; k and lambda depend on the advantage's sign. It is 1 at
    w = 1. arXiv:2602.10693; bounded as in TRL.
    """
    logs = log_ratio.clamp(-_LOG_RATIO, _LOG_RATIO)
    if factor is not None:
        logs = logs + factor.log().clamp(_LEAST_LOG, _LOG_RATIO)
    log_w = logs.masked_fill(~mask, 0).nan_to_num(nan=0.0).sum(-1, keepdim=True).clamp(_LEAST_LOG, _LOG_RATIO)
    is_negative = advantages < 0
    k = torch.full_like(advantages, config.vespo_k_pos).masked_fill(is_negative, config.vespo_k_neg)
    decay = torch.full_like(advantages, config.vespo_lambda_pos).masked_fill(is_negative, config.vespo_lambda_neg)
    decay = decay.clamp(min=1e-4)
    return (decay + k * log_w - decay * log_w.exp()).exp().nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)


def is_on_policy(
    logprobs: Tensor,  # (B, T)
    sampling_logprobs: Tensor,  # (B, T): the sampler's, or else the old ones; NaN without a record
    advantages: Tensor,  # (B, 1) or (B, T)
    mask: Tensor,  # (B, T)
    threshold: float,
) -> Tensor:
    """Return where the off-policy mask keeps a policy term, in the shape of ``advantages``, bool.

    Where the advantage is not negative, or the response's mean of ``sampling_logprobs - logprobs`` is at most the
    threshold; a token without a record counts as 0 in it, as in TRL.
    """
    difference = sampling_logprobs - logprobs
    difference = difference.masked_fill(~mask | difference.isnan(), 0)
    mean = difference.sum(-1, keepdim=True) / mask.sum(-1, keepdim=True).clamp(min=1)
    return (advantages >= 0) | (mean <= threshold)


def kl_estimate(logprobs: Tensor, ref_logprobs: Tensor, estimator: KLEstimator) -> Tensor:
    """Return an estimate of each token's KL divergence to the reference policy, nats; names and bounds are verl's.

    With d = logprob - ref_logprob: "k1" d, "abs" |d|, "k2" d^2 / 2, "k3" exp(-d) + d - 1, of a d within 20 and at
    most 10.
    """
    difference = logprobs - ref_logprobs
    if estimator == "abs":
        return difference.abs()
    if estimator == "k2":
        return difference.square() / 2
    if estimator == "k3":
        bounded = difference.clamp(-20, 20)
        return ((-bounded).exp() + bounded - 1).clamp(max=10)
    return difference
