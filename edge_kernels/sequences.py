"""Which tokens are one response's, and what a whole response decides about its tokens.

Plain PyTorch on values per token, without gradient, for every backend: each function takes what one sweep over the
logits has left; the kernels see the result as one more factor of a token.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from edge_kernels._checks import describe
from edge_kernels.config import GRPOLossConfig, KLEstimator

_SMALLEST = 1e-10  # added to a factor before its logarithm is taken, as verl does
_LOG_RATIO = 20.0  # bounds a token's log ratio and the sequence's in VESPO's weight, as in TRL
_LEAST_LOG = math.log(1e-8)

# --- which tokens are one response's ----------------------------------------------------------------------------------


class Sequences(NamedTuple):
    """Which tokens are a response's: a row of (B, T), or in packed tokens (N,) those of its number.

    With a process group each of its processes has some tokens of each response, or none, and sums are of all of them.
    Methods and no properties, which torch.compile of torch 2.9 takes for tensors.
    """

    number: Tensor | None = None  # (N,), int64, in [0, B); None: rows
    num_responses: int = 0  # B
    group: Any = None  # a ProcessGroup

    def are_rows(self) -> bool:
        """Whether a kernel that is given (B, T) finds whole responses in the rows."""
        return self.number is None and self.group is None

    def sums(self, *values: Tensor) -> tuple[Tensor, ...]:
        """Return the sum over each response's tokens of each tensor, (B,) in its dtype; of bool a count, int64.

        Packed tokens and those of several processes are added in float64, in one all-reduce for all the tensors.
        """
        if self.are_rows():
            return tuple(value.sum(-1) for value in values)
        dtypes = [torch.int64 if value.dtype == torch.bool else value.dtype for value in values]
        each = torch.stack([value.double() for value in values])  # (k, B, T) or (k, N)
        if self.number is None:
            sums = each.sum(-1)
        else:
            sums = each.new_zeros(len(values), self.num_responses).index_add(1, self.number, each)
        return tuple(value.to(dtype) for value, dtype in zip(self._of_all(sums).unbind(), dtypes, strict=True))

    def total(self, flags: Tensor) -> Tensor:
        """Return how many of all tokens have the flag set, a scalar."""
        count = flags.sum()
        return count if self.group is None else self._of_all(count)

    def of_all(self, values: Tensor) -> Tensor:
        """Return the values of all tokens, those of other processes in two all-gathers, (any,); NaN for no value."""
        if self.group is None:
            return values
        dist = torch.distributed
        own = torch.tensor([values.numel()], device=values.device)
        sizes = [torch.empty_like(own) for _ in range(dist.get_world_size(self.group))]
        dist.all_gather(sizes, own, group=self.group)
        padded = values.new_full((int(torch.cat(sizes).max()),), math.nan)
        padded[: values.numel()] = values.flatten()
        parts = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(parts, padded, group=self.group)
        return torch.cat(parts)

    def spread(self, values: Tensor) -> Tensor:
        """Return a value of each response, (B,), for its tokens: (B, 1), or (N,)."""
        return values[:, None] if self.number is None else values[self.number]

    def _of_all(self, values: Tensor) -> Tensor:
        if self.group is not None:
            torch.distributed.all_reduce(values, group=self.group)
        return values


ROWS = Sequences()


def packed_sequences(cu_seqlens: Tensor, tokens: Tensor, group: Any = None) -> Sequences:
    """Return the sequences of packed ``tokens`` (N, ...): number i has those from cu_seqlens[i] to cu_seqlens[i + 1].

    Raises TypeError or ValueError for another dtype or shape, and on a CPU for values that are no division of N tokens;
    on a GPU, whose values are not waited for, a token past the last sequence is an index out of bounds.
    """
    integer = isinstance(cu_seqlens, Tensor) and cu_seqlens.dtype in (torch.int32, torch.int64)
    if not integer or cu_seqlens.dim() != 1 or not len(cu_seqlens):
        raise TypeError(
            f"cu_seqlens must be int32 or int64 with shape (B + 1,); got {describe(cu_seqlens)}; pass the cumulative "
            "lengths that the model's attention got, or cumulative_lengths(position_ids)"
        )
    if cu_seqlens.device != tokens.device:
        raise ValueError(
            f"cu_seqlens must be on {tokens.device}; got {cu_seqlens.device}; move it with .to({str(tokens.device)!r})"
        )
    N = tokens.shape[0]
    is_readable = cu_seqlens.device.type == "cpu" and type(cu_seqlens) is Tensor and not torch.compiler.is_compiling()
    if is_readable and not (cu_seqlens[0] == 0 and cu_seqlens[-1] == N and bool((cu_seqlens.diff() >= 0).all())):
        raise ValueError(
            f"cu_seqlens must rise from 0 to the number of tokens, {N}; got {cu_seqlens.tolist()}; where the last "
            "token of the pack was cut off with the shift to next tokens, keep it, masked"
        )
    places = torch.arange(N, dtype=cu_seqlens.dtype, device=cu_seqlens.device)
    number = torch.bucketize(places, cu_seqlens[1:].contiguous(), right=True)
    return Sequences(number, cu_seqlens.shape[0] - 1, group)


class Tokens(NamedTuple):
    """Values per token as kernels take them, whose they are, and the shapes that other tensors per token may have."""

    values: Tensor  # (B, T, ...) or packed (N, ...)
    sequences: Sequences
    shapes: dict[str, tuple[int, ...]]  # by their symbolic names


def tokens_of(name: str, values: Tensor, cu_seqlens: Tensor | None, group: Any = None, *, feature: str = "") -> Tokens:
    """Return checked values per token: (B, T), or with ``cu_seqlens`` (N,) or (1, N), which come back as (N,).

    The dimension that ``feature`` names, if any, follows these.
    """
    more = f", {feature}" if feature else ""
    dims, shape = values.dim() - bool(feature), tuple(values.shape)
    if cu_seqlens is None:
        if dims != 2:
            remedy = "add the dimension of sequences" if feature else "pass one row per response"
            raise ValueError(
                f"{name} must have shape (B, T{more}); got {describe(values)}; {remedy}, or pass cu_seqlens with "
                "packed tokens"
            )
        return Tokens(values, Sequences(None, shape[0], group), {"(B, T)": shape[:2]})
    if not (dims == 1 or (dims == 2 and shape[0] == 1)):
        raise ValueError(
            f"{name} must have shape (N{more}) or (1, N{more}) with cu_seqlens; got {describe(values)}; pass one "
            "packed row, or leave out cu_seqlens"
        )
    tokens = values.flatten(0, 1) if dims == 2 else values
    N = tokens.shape[0]
    return Tokens(tokens, packed_sequences(cu_seqlens, tokens, group), {"(N,)": (N,), "(1, N)": (1, N)})


def cumulative_lengths(position_ids: Tensor) -> Tensor:
    """Return the ``cu_seqlens`` (B + 1,), int32, of packed sequences, from the position of each token in its own.

    position_ids  (N,) or (1, N), integer: as transformers' ``DataCollatorWithFlattening`` makes them. A sequence starts
                  wherever the position is not the one after its predecessor's.

    The number of sequences depends on the values, so that a GPU waits and ``torch.compile`` breaks its graph: prefer
    cumulative lengths that were made on the host. Raises ValueError for another shape or dtype.
    """
    is_pack = isinstance(position_ids, Tensor) and (
        position_ids.dim() == 1 or (position_ids.dim() == 2 and position_ids.shape[0] == 1)
    )
    if not is_pack or position_ids.is_floating_point() or position_ids.dtype == torch.bool:
        raise ValueError(
            f"position_ids must be integer with shape (N,) or (1, N); got {describe(position_ids)}; pass those of one "
            "packed row"
        )
    positions = position_ids.flatten()
    starts = (positions.diff() != 1).nonzero()[:, 0] + 1
    ends = positions.new_full((1,), len(positions))
    first = positions.new_zeros(1 if len(positions) else 0)
    return torch.cat([first, starts, ends]).to(torch.int32)


# --- what a whole response decides ------------------------------------------------------------------------------------


def geometric_mean(factor: Tensor, mask: Tensor, sequences: Sequences = ROWS) -> Tensor:
    """Return the geometric mean of a response's factors over its tokens, as ``Sequences.spread`` does.

    ``factor`` has the mask's shape, or (B, 1).
    """
    logs = (factor + _SMALLEST).log().expand(mask.shape).masked_fill(~mask, 0)
    total, length = sequences.sums(logs, mask)
    return sequences.spread((total / length.clamp(min=1)).exp())


def gamma_weight(
    log_ratio: Tensor,  # (B, T) or (N,): current policy to old one, 0 where there is no record
    factor: Tensor | None,  # the same: the sampler's correction
    advantages: Tensor,  # the same, or (B, 1)
    mask: Tensor,
    config: GRPOLossConfig,
    sequences: Sequences = ROWS,
) -> Tensor:
    """Return VESPO's weight w^k exp(lambda (1 - w)) of each response, or token where advantages are per token.

    w is the product of the response's ratios and factors; k and lambda depend on the advantage's sign. It is 1 at
    w = 1. arXiv:2602.10693; bounded as in TRL.
    """
    logs = log_ratio.clamp(-_LOG_RATIO, _LOG_RATIO)
    if factor is not None:
        logs = logs + factor.log().clamp(_LEAST_LOG, _LOG_RATIO)
    (log_w,) = sequences.sums(logs.masked_fill(~mask, 0).nan_to_num(nan=0.0))
    log_w = sequences.spread(log_w.clamp(_LEAST_LOG, _LOG_RATIO))
    is_negative = advantages < 0
    k = torch.full_like(advantages, config.vespo_k_pos).masked_fill(is_negative, config.vespo_k_neg)
    decay = torch.full_like(advantages, config.vespo_lambda_pos).masked_fill(is_negative, config.vespo_lambda_neg)
    decay = decay.clamp(min=1e-4)
    return (decay + k * log_w - decay * log_w.exp()).exp().nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)


def is_on_policy(
    logprobs: Tensor,  # (B, T) or (N,)
    sampling_logprobs: Tensor,  # the same: the sampler's, or else the old ones; NaN without a record
    advantages: Tensor,  # the same, or (B, 1)
    mask: Tensor,
    threshold: float,
    sequences: Sequences = ROWS,
) -> Tensor:
    """Return where the off-policy mask keeps a policy term, in the shape of ``advantages``, bool.

    Where the advantage is not negative, or the response's mean of ``sampling_logprobs - logprobs`` is at most the
    threshold; a token without a record counts as 0 in it, as in TRL.
    """
    difference = sampling_logprobs - logprobs
    difference = difference.masked_fill(~mask | difference.isnan(), 0)
    total, length = sequences.sums(difference, mask)
    return (advantages >= 0) | (sequences.spread(total / length.clamp(min=1)) <= threshold)


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
