"""What the published code does with entropy otherwise than the paper: averages it over padding, and learns from it.

Off by default, and meant for comparisons. The paper's weights are in ``credit``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from accelerate.utils import gather_object
from torch import Tensor

from edge_grpo.batching import Sample, counted_tokens
from edge_grpo.learning.totals import Normalizers
from edge_kernels import GRPOLossConfig, GRPOLossOutput

_ROUNDING = 1e-5  # of a weight


def add_padding(samples: Sequence[Sample]) -> None:
    """Let the entropy of each response be averaged over as many positions as the longest of all processes has.

    All processes call it.
    """
    longest = max(gather_object([max((len(sample.response.token_ids) for sample in samples), default=0)]))
    for sample in samples:
        sample.padding = longest - len(sample.response.token_ids)


def entropy_mask(samples: Sequence[Sample], loss: GRPOLossConfig, like: Tensor) -> Tensor:
    """Return the positions over which each response's entropy is averaged, bool, in the shape (B, T) of ``like``.

    These are the tokens that count, and the padding that ``add_padding`` has added.
    """
    mask = torch.zeros(like.shape, dtype=torch.bool)
    for row, sample in enumerate(samples):
        start = len(sample.prompt.token_ids) - 1
        flags = counted_tokens(sample.response, loss) + [True] * sample.padding
        mask[row, start : start + len(flags)] = torch.tensor(flags, dtype=torch.bool)
    return mask.to(like.device)


def mean_over(entropy: Tensor, mask: Tensor) -> Tensor:
    """Return the mean of ``entropy`` (B, T) over each row's ``mask``, (B,); 0 for a row without one."""
    return (entropy * mask).sum(1) / mask.sum(1).clamp(min=1)


class EntropyTerm(NamedTuple):
    """What lets a loss learn from the entropy in its advantages: a term that is 0 and has a gradient."""

    mask: Tensor  # (B, T) bool: over which positions the entropy is averaged
    slopes: Tensor  # (B,): what ``loss_by_entropy`` returns

    def added_to(self, out: GRPOLossOutput, entropy: Tensor) -> GRPOLossOutput:
        """Return the loss with this term, given the entropy (B, T), which carries the gradient."""
        means = mean_over(entropy, self.mask)
        return out._replace(loss=out.loss + (self.slopes * (means - means.detach())).sum())


def loss_by_entropy(
    samples: Sequence[Sample], num_tokens: Sequence[int], loss: GRPOLossConfig, totals: Normalizers
) -> Tensor:
    """Return the derivative of an on-policy loss with respect to the mean entropy P of each response, (B,).

    A response's part of the loss is -w A / P_hat, w its tokens' weights. With the mean over the group held constant, as
    in the published code, the derivative of 1 / P_hat is -1 / (P_hat P), so it is w (A / P_hat) / P: descending makes
    responses of positive advantage surer, and all others less sure. 0 where P_hat is at its bound.

    num_tokens  of each sample, those that have a loss.
    """
    eda = loss.eda
    slopes = []
    for sample, tokens in zip(samples, num_tokens, strict=True):
        weight = {
            "grpo": 1 / totals.num_sequences,
            "dr_grpo": tokens / (totals.num_sequences * (loss.max_completion_length or 1)),
        }.get(loss.loss_type, tokens / totals.num_items)
        bounded = not eda.min_ratio * sample.weight < 1 - _ROUNDING < 1 + _ROUNDING < eda.max_ratio * sample.weight
        slopes.append(0.0 if bounded or not tokens else weight * sample.advantage / sample.mean_entropy)
    return torch.tensor(slopes)
