"""Token statistics and losses where the vocabulary is split over a process group, or the tokens of each response are.

The public functions; who has which columns: layout.py; how statistics are merged: merge.py; what responses are summed
to: sequences.py of the package.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypedDict

import torch
from torch import Tensor

from edge_kernels._checks import IGNORE_INDEX, check_float, check_like, check_temperature, check_transform
from edge_kernels.advantages import checked_entropy, mean_entropy_of
from edge_kernels.config import GRPOLossConfig
from edge_kernels.contract import Transform
from edge_kernels.ops.batch import Total, loss_of_stats
from edge_kernels.ops.batch_checks import check_batch, prepared_hidden, temperature_of_rows
from edge_kernels.ops.grpo_loss import loss_of_logits
from edge_kernels.ops.head_checks import LowRank, check_head, check_low_rank, check_memory_budget
from edge_kernels.ops.linear_grpo_loss import loss_of_hidden
from edge_kernels.ops.linear_token_stats import at_temperatures
from edge_kernels.ops.token_stats import check_writable_rows
from edge_kernels.parallel.layout import is_distributed, layout_of, local_part, member_of
from edge_kernels.parallel.merge import ShardedHeadStats, ShardedStats
from edge_kernels.sequences import tokens_of
from edge_kernels.types import GRPOLossOutput, TokenStats

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["edge_grpo_loss", "linear_edge_grpo_loss", "linear_token_stats", "response_entropy", "token_stats"]


def token_stats(
    logits: Tensor,
    targets: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = IGNORE_INDEX,
    inplace: bool = False,
    group: Any = None,
    vocab_sizes: Sequence[int] | None = None,
) -> TokenStats:
    """Return ``edge_kernels.token_stats`` of logits of which each process of a group has some columns.

    Every process of the group calls it, with the same targets and options, and gets the same statistics; the gradient
    that comes back must be the same on all, as that of a loss computed from them alike is.

    logits       (..., size): the shard, the ``size`` columns that follow those of the ranks before; sizes may differ
                 and be 0. Or a DTensor with the placement Shard(-1) on a mesh of one dimension.
    targets      (...), int64, in [0, V) of the whole vocabulary, or ``ignore_index``.
    inplace      True: the backward pass writes the gradient over the logits; see ``edge_grpo_loss``.
    group        a ``ProcessGroup``; None: the default one, or the DTensor's.
    vocab_sizes  the size of each rank's shard. None: the ranks ask each other, one collective of 16 bytes a rank, for
                 which a GPU waits; a DTensor knows.

    Two all-reduces: 8 N bytes (maxima), and 12 N (24 N for float64) of sums; none in the backward pass. Raises
    RuntimeError without a process group, TypeError or ValueError as ``edge_kernels.token_stats``.
    """
    shard, group, vocab_sizes = local_part("logits", logits, logits.dim() - 1, group, vocab_sizes)
    check_float("logits", shard, least_dims=1, may_be_empty=True)
    remedy = "pass one token id per row of logits"
    check_like("targets", targets, {"logits.shape[:-1]": tuple(shard.shape[:-1])}, "int64", shard, remedy=remedy)
    check_transform(temperature, softcap)
    transform = Transform(check_temperature(temperature, shard.shape[0]), softcap, logit_scale, ignore_index)
    if inplace:
        check_writable_rows(shard)
    layout = layout_of(shard.shape[-1], shard, group, vocab_sizes)
    return TokenStats(*ShardedStats.apply(shard, targets, transform, layout, inplace))


def linear_token_stats(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    *,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = IGNORE_INDEX,
    low_rank: LowRank | None = None,
    memory_budget: int | None = None,
    group: Any = None,
    vocab_sizes: Sequence[int] | None = None,
) -> TokenStats:
    """Return ``edge_kernels.linear_token_stats`` of a head of which each process of a group has some rows.

    hidden  (..., D): the same on every process; its gradient is the whole one, on every process.
    weight  (size, D), and bias (size,): the shard, as the columns of ``token_stats``, or DTensors with the placement
            Shard(0) on a mesh of one dimension. So is the factor of ``low_rank``; its states are as ``hidden``.

    Everything else as ``token_stats`` and ``edge_kernels.linear_token_stats``. The backward pass has one all-reduce, of
    the gradient of the hidden states in their dtype (N D elements, with a low-rank part N (D + r)), if they want one.
    """
    if is_distributed(hidden):
        raise ValueError(
            "hidden must be an ordinary tensor, whole on every process; got a DTensor; pass its to_local()"
        )
    given = (group, vocab_sizes)
    weight, group, vocab_sizes = local_part("weight", weight, 0, *given)
    bias = local_part("bias", bias, 0, *given)[0]
    dtype = check_head(hidden, weight, bias, may_be_empty=True)
    remedy = "pass one token id per row of hidden"
    check_like("targets", targets, {"hidden.shape[:-1]": tuple(hidden.shape[:-1])}, "int64", hidden, remedy=remedy)
    factor = None
    if low_rank is not None:
        if isinstance(low_rank, tuple) and len(low_rank) == 2:
            low_rank = (low_rank[0], local_part("low_rank[1]", low_rank[1], 0, *given)[0])
        check_low_rank(low_rank, hidden, weight)
        hidden, factor = torch.cat([hidden, low_rank[0].to(hidden.dtype)], dim=-1), low_rank[1]
    if isinstance(temperature, Tensor):
        hidden, temperature = at_temperatures(hidden, bias, temperature, softcap), 1.0
    check_transform(temperature, softcap)
    transform = Transform(temperature, softcap, logit_scale, ignore_index)
    layout = layout_of(len(weight), hidden, group, vocab_sizes)
    inputs = (hidden.flatten(0, -2), weight, bias, factor, targets.flatten())
    stats = ShardedHeadStats.apply(*inputs, dtype, check_memory_budget(memory_budget), transform, layout)
    return TokenStats(*(value.view(targets.shape) for value in stats))


class LossOptions(TypedDict, total=False):
    """The arguments of the losses that describe a batch; see ``edge_kernels.edge_grpo_loss``."""

    advantages: Tensor | None
    rewards: Tensor | None
    group_ids: Tensor | None
    old_logprobs: Tensor | None
    ref_logprobs: Tensor | None
    sampling_logprobs: Tensor | None
    injected_mask: Tensor | None
    truncated_mask: Tensor | None
    temperature: Tensor | None
    num_items: Total
    num_sequences: Total
    entropy_threshold: Total


def edge_grpo_loss(
    logits: Tensor,
    targets: Tensor,
    completion_mask: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    config: GRPOLossConfig | None = None,
    inplace: bool = False,
    group: Any = None,
    vocab_sizes: Sequence[int] | None = None,
    sequence_group: Any = None,
    **options: Unpack[LossOptions],
) -> GRPOLossOutput:
    """Return ``edge_kernels.edge_grpo_loss`` of logits whose vocabulary, or whose tokens, are split over processes.

    group           the vocabulary is split: logits (B, T, size) as ``token_stats`` says. Every process of the group
                    passes the same batch. Always two sweeps: statistics, and the gradient in the backward pass, which
                    ``inplace`` writes over the logits.
    sequence_group  the tokens of each response are split, over the processes of this group: each passes its own logits,
                    targets, masks and logprobs, (B, T_own) or packed, and the same B responses in the same order, also
                    those of which it has no token. What is per response ((B,): rewards, group_ids, advantages,
                    truncated_mask, temperature) and the totals are the same on all, and of all tokens.

    With neither, the vocabulary is split over the default group; with ``sequence_group`` alone the vocabulary is whole;
    with both, processes of one ``group`` pass the same tokens. Every process has the same loss and metrics, those of
    the whole batch; logprobs and entropy are of its own tokens. Under ``sequence_group`` the gradient is that of the
    whole loss by this process's own logits (or hidden states), and no collective is in the backward pass; a weight's
    gradient is the part of these tokens, to be added up over the group.
    """
    logits, group, vocab_sizes = local_part("logits", logits, logits.dim() - 1, group, vocab_sizes)
    check_float("logits", logits, least_dims=1 if cu_seqlens is not None else 3, may_be_empty=True)
    sequence_group = None if sequence_group is None else member_of(sequence_group)
    tokens = tokens_of("logits", logits, cu_seqlens, sequence_group, feature="V")
    logits = tokens.values
    arguments: dict[str, Any] = dict.fromkeys(LossOptions.__annotations__) | options
    if arguments["temperature"] is not None:
        arguments["temperature"] = temperature_of_rows(arguments["temperature"], tokens.sequences)
    batch = check_batch(tokens, logits.dtype, targets, completion_mask, config, **arguments)
    if sequence_group is not None and group is None and vocab_sizes is None:
        return loss_of_logits(logits, batch, inplace=inplace)
    places: dict[str, Any] = {"inplace": inplace, "group": group, "vocab_sizes": vocab_sizes}
    return loss_of_stats(token_stats(logits, batch.targets, **batch.transform()._asdict(), **places), batch)


def linear_edge_grpo_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    completion_mask: Tensor,
    bias: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    config: GRPOLossConfig | None = None,
    low_rank: LowRank | None = None,
    memory_budget: int | None = None,
    group: Any = None,
    vocab_sizes: Sequence[int] | None = None,
    sequence_group: Any = None,
    **options: Unpack[LossOptions],
) -> GRPOLossOutput:
    """Return ``edge_kernels.linear_edge_grpo_loss`` of a head, or of responses, split over processes.

    The head as ``linear_token_stats`` says; ``group`` and ``sequence_group`` as in ``edge_grpo_loss``, results too. A
    split vocabulary takes two sweeps.
    """
    own_weight, own, _ = local_part("weight", weight, 0, group, None)
    dtype = check_head(hidden, own_weight, None, may_be_empty=True)
    sequence_group = None if sequence_group is None else member_of(sequence_group)
    is_whole = sequence_group is not None and own is None and vocab_sizes is None
    arguments: dict[str, Any] = dict.fromkeys(LossOptions.__annotations__) | options
    given = (hidden, low_rank, bias, arguments["temperature"], config, cu_seqlens, sequence_group)
    tokens, low_rank, arguments["temperature"] = prepared_hidden(*given)
    hidden = tokens.values
    batch = check_batch(tokens, dtype, targets, completion_mask, config, **arguments)
    if is_whole:
        check_head(hidden, weight, bias)
        return loss_of_hidden(hidden, weight, bias, batch, dtype, low_rank, memory_budget)
    kept: dict[str, Any] = {"low_rank": low_rank, "memory_budget": memory_budget}
    places: dict[str, Any] = {"group": group, "vocab_sizes": vocab_sizes}
    stats = linear_token_stats(hidden, weight, batch.targets, bias, **batch.transform()._asdict(), **kept, **places)
    return loss_of_stats(stats, batch)


def response_entropy(
    entropy: Tensor, completion_mask: Tensor, *, cu_seqlens: Tensor | None = None, sequence_group: Any = None
) -> Tensor:
    """Return ``edge_kernels.response_entropy`` of responses whose tokens are split over a process group, (B,).

    Every process passes the entropy (nats) and the mask of its own tokens, (B, T_own) or packed, of the same B
    responses in the same order, and gets the means of the whole responses. One all-reduce of 16 B bytes. For a trainer
    that forms advantages itself, with ``response_entropy_weights``; the losses do this with ``rewards``.

    sequence_group  a ``ProcessGroup``; None: the default one.
    """
    return mean_entropy_of(*checked_entropy(entropy, completion_mask, cu_seqlens, member_of(sequence_group)))
