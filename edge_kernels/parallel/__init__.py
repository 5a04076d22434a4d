"""Token statistics and losses where the vocabulary is split over a process group, or the tokens of each response are.

The public functions; who has which columns: layout.py; how statistics are merged: merge.py; what responses are summed
to: sequences.py of the package.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypedDict, TypeVar

import torch
from torch import Tensor

from edge_kernels._checks import (
    IGNORE_INDEX,
    check_float,
    check_like,
    check_targets_in_range,
    check_temperature,
    check_transform,
)
from edge_kernels.advantages import checked_entropy, mean_entropy_of
from edge_kernels.config import GRPOLossConfig
from edge_kernels.contract import Transform
from edge_kernels.ops.batch import Total, loss_of_stats
from edge_kernels.ops.batch_checks import Draft, batch_of, check_arguments, prepared_hidden, temperature_of_rows
from edge_kernels.ops.grpo_loss import loss_of_logits
from edge_kernels.ops.head_checks import LowRank, check_head, check_low_rank, check_memory_budget
from edge_kernels.ops.linear_grpo_loss import loss_of_hidden
from edge_kernels.ops.linear_token_stats import at_temperatures
from edge_kernels.ops.token_stats import check_writable_rows
from edge_kernels.parallel import agreement
from edge_kernels.parallel.agreement import agreed_responses, require_same, together
from edge_kernels.parallel.layout import Layout, agreed_layout, is_distributed, local_part, member_of
from edge_kernels.parallel.merge import sharded_head_stats, sharded_stats
from edge_kernels.sequences import Sequences, tokens_of
from edge_kernels.types import GRPOLossOutput, TokenStats

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["edge_grpo_loss", "linear_edge_grpo_loss", "linear_token_stats", "response_entropy", "token_stats"]

T = TypeVar("T")


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
    vocab_sizes  the size of each rank's shard. None: the ranks ask each other, one collective of 40 bytes a rank, for
                 which a GPU waits; a DTensor knows. Needed for one graph under ``torch.compile(fullgraph=True)``.

    Two all-reduces: 8 N bytes (maxima), and 12 N (24 N for float64) of sums; none in the backward pass. Raises
    RuntimeError without a process group, TypeError or ValueError as ``edge_kernels.token_stats``; on a CPU, and where
    the ranks ask for the sizes, on all of them for what is wrong on one, and for targets, rows or sizes that differ.
    On a GPU and in compiled code, with known sizes, different targets or sizes make all statistics NaN.
    """
    shard, group, vocab_sizes = local_part("logits", logits, logits.dim() - 1, group, vocab_sizes)

    def check() -> tuple[Tensor, Transform]:
        check_float("logits", shard, least_dims=1, may_be_empty=True)
        remedy = "pass one token id per row of logits"
        check_like("targets", targets, {"logits.shape[:-1]": tuple(shard.shape[:-1])}, "int64", shard, remedy=remedy)
        check_transform(temperature, softcap)
        if inplace:
            check_writable_rows(shard)
        transform = Transform(check_temperature(temperature, shard.shape[0]), softcap, logit_scale, ignore_index)
        return targets, transform

    places = (member_of(group), vocab_sizes)
    transform, layout = agreed_layout(check, shard.shape[-1], shard.device, ignore_index, *places)
    return TokenStats(*sharded_stats(shard, targets, transform, layout, inplace=inplace))


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
    the gradient of the hidden states in float32 (float64 for float64; N D elements, with a low-rank part N (D + r)), if
    they want one.
    """
    if is_distributed(hidden):
        raise ValueError(
            "hidden must be an ordinary tensor, whole on every process; got a DTensor; pass its to_local()"
        )
    given = (group, vocab_sizes)
    weight, group, vocab_sizes = local_part("weight", weight, 0, *given)
    bias, low_rank = local_part("bias", bias, 0, *given)[0], _local_low_rank(low_rank, *given)

    def check() -> tuple[Tensor, _Head]:
        dtype = check_head(hidden, weight, bias, may_be_empty=True)
        check_low_rank(low_rank, hidden, weight)
        remedy = "pass one token id per row of hidden"
        check_like("targets", targets, {"hidden.shape[:-1]": tuple(hidden.shape[:-1])}, "int64", hidden, remedy=remedy)
        head = _head(hidden, weight, bias, low_rank, memory_budget, dtype)
        left = temperature
        if isinstance(temperature, Tensor):
            head, left = head._replace(hidden=at_temperatures(head.hidden, bias, temperature, softcap)), 1.0
        check_transform(left, softcap)
        return targets, head._replace(transform=Transform(left, softcap, logit_scale, ignore_index))

    head, layout = agreed_layout(check, len(weight), hidden.device, ignore_index, member_of(group), vocab_sizes)
    return head.stats(targets, layout)


class _Head(NamedTuple):
    """The checked arguments of a split head."""

    hidden: Tensor  # (..., D), or (..., D + r) with a factor
    weight: Tensor  # (size, D)
    bias: Tensor | None
    factor: Tensor | None  # (size, r)
    dtype: torch.dtype
    memory_budget: int
    transform: Transform = Transform(1.0, None, 1.0, IGNORE_INDEX)

    def stats(self, targets: Tensor, layout: Layout) -> TokenStats:
        inputs = (self.hidden.flatten(0, -2), self.weight, self.bias, self.factor, targets.flatten())
        stats = sharded_head_stats(*inputs, self.dtype, self.memory_budget, self.transform, layout)
        return TokenStats(*(value.view(targets.shape) for value in stats))


def _head(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    low_rank: LowRank | None,
    memory_budget: int | None,
    dtype: torch.dtype,
) -> _Head:
    """Return the head of arguments that are checked, but for ``memory_budget``."""
    factor = None
    if low_rank is not None:
        hidden, factor = torch.cat([hidden, low_rank[0].to(hidden.dtype)], dim=-1), low_rank[1]
    return _Head(hidden, weight, bias, factor, dtype, check_memory_budget(memory_budget))


def _local_low_rank(low_rank: LowRank | None, group: Any, vocab_sizes: Sequence[int] | None) -> LowRank | None:
    if isinstance(low_rank, tuple) and len(low_rank) == 2:
        return low_rank[0], local_part("low_rank[1]", low_rank[1], 0, group, vocab_sizes)[0]
    return low_rank


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
    gradient is the part of these tokens, to be added up over the group. On a CPU what is wrong on one process raises on
    all of the group, and so do a different number of responses and different values of a response.
    """
    shard, group, vocab_sizes = local_part("logits", logits, logits.dim() - 1, group, vocab_sizes)
    places = _places(group, vocab_sizes, sequence_group)
    arguments: dict[str, Any] = dict.fromkeys(LossOptions.__annotations__) | options

    def check() -> tuple[Draft, Tensor]:
        check_float("logits", shard, least_dims=1 if cu_seqlens is not None else 3, may_be_empty=True)
        tokens = tokens_of("logits", shard, cu_seqlens, places.sequence_group, feature="V")
        if inplace:
            check_writable_rows(tokens.values)
        given = arguments
        if arguments["temperature"] is not None:
            given = arguments | {"temperature": temperature_of_rows(arguments["temperature"], tokens.sequences)}
        return check_arguments(tokens, shard.dtype, targets, completion_mask, config, **given), tokens.values

    draft, values, layout = _agreed(check, shard.shape[-1], shard.device, places)
    batch = batch_of(draft)
    if layout is None:
        return loss_of_logits(values, batch, inplace=inplace)
    stats = sharded_stats(values, batch.targets, batch.transform(), layout, inplace=inplace)
    return loss_of_stats(TokenStats(*stats), batch)


class _Places(NamedTuple):
    """Over which processes what is split."""

    group: Any  # None: the vocabulary is whole
    vocab_sizes: Sequence[int] | None
    sequence_group: Any  # None: so are the responses


def _places(group: Any, vocab_sizes: Sequence[int] | None, sequence_group: Any) -> _Places:
    is_whole = sequence_group is not None and group is None and vocab_sizes is None
    sequence_group = None if sequence_group is None else member_of(sequence_group)
    return _Places(None if is_whole else member_of(group), vocab_sizes, sequence_group)


def _agreed(
    check: Callable[[], tuple[Draft, T]], size: int, device: torch.device, places: _Places
) -> tuple[Draft, T, Layout | None]:
    """Return what ``check`` returns, and the division of the vocabulary, if all processes agree."""

    def of_vocabulary() -> tuple[Draft, tuple[T, Layout | None]]:
        if places.group is None:
            draft, inputs = check()
            if agreement.reads(device):
                check_targets_in_range(draft.batch.targets, size, IGNORE_INDEX)
            return draft, (inputs, None)

        def with_targets() -> tuple[Tensor, tuple[Draft, T]]:
            checked = check()
            return checked[0].batch.targets, checked

        options = (size, device, IGNORE_INDEX, places.group, places.vocab_sizes)
        (draft, inputs), layout = agreed_layout(with_targets, *options)
        return draft, (inputs, layout)

    if places.sequence_group is None:
        draft, (inputs, layout) = of_vocabulary()
    else:
        draft, (inputs, layout) = agreed_responses(of_vocabulary, device, places.sequence_group)
    return draft, inputs, layout


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
    given = (group, vocab_sizes)
    weight, group, vocab_sizes = local_part("weight", weight, 0, *given)
    bias, low_rank = local_part("bias", bias, 0, *given)[0], _local_low_rank(low_rank, *given)
    places = _places(group, vocab_sizes, sequence_group)
    arguments: dict[str, Any] = dict.fromkeys(LossOptions.__annotations__) | options

    def check() -> tuple[Draft, tuple[Tensor, LowRank | None, torch.dtype]]:
        dtype = check_head(hidden, weight, bias, may_be_empty=places.group is not None)
        check_low_rank(low_rank, hidden, weight)
        check_memory_budget(memory_budget)
        given = (hidden, low_rank, bias, arguments["temperature"], config, cu_seqlens, places.sequence_group)
        tokens, states, temperature = prepared_hidden(*given)
        replaced = arguments | {"temperature": temperature}
        draft = check_arguments(tokens, dtype, targets, completion_mask, config, **replaced)
        return draft, (tokens.values, states, dtype)

    draft, (values, low_rank, dtype), layout = _agreed(check, len(weight), hidden.device, places)
    batch = batch_of(draft)
    if layout is None:
        return loss_of_hidden(values, weight, bias, batch, dtype, low_rank, memory_budget)
    head = _head(values, weight, bias, low_rank, memory_budget, dtype)._replace(transform=batch.transform())
    return loss_of_stats(head.stats(batch.targets, layout), batch)


def response_entropy(
    entropy: Tensor, completion_mask: Tensor, *, cu_seqlens: Tensor | None = None, sequence_group: Any = None
) -> Tensor:
    """Return ``edge_kernels.response_entropy`` of responses whose tokens are split over a process group, (B,).

    Every process passes the entropy (nats) and the mask of its own tokens, (B, T_own) or packed, of the same B
    responses in the same order, and gets the means of the whole responses. One all-reduce of 16 B bytes. For a trainer
    that forms advantages itself, with ``response_entropy_weights``; the losses do this with ``rewards``.

    sequence_group  a ``ProcessGroup``; None: the default one.
    """
    group = member_of(sequence_group)

    def check() -> tuple[Tensor, Tensor, Sequences]:
        return checked_entropy(entropy, completion_mask, cu_seqlens, group)

    if not agreement.reads(entropy.device):
        return mean_entropy_of(*check())
    checked, counts = together(check, lambda checked: [checked[2].num_responses], 1, entropy.device, group)
    require_same("number of responses", [count for (count,) in counts], remedy="also those without a token here")
    return mean_entropy_of(*checked)
