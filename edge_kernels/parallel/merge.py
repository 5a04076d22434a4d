"""The merged statistics of a vocabulary's shards: two all-reduces, and autograd around them.

Each process makes the statistics of its own columns with the ordinary ops, and the gradient of its own columns from the
merged statistics. What merges how: docs/parallel.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from edge_kernels._checks import IGNORE_INDEX, stats_dtype
from edge_kernels.backend import kernels
from edge_kernels.contract import HUGE, KernelStats, StatsGradients, Transform
from edge_kernels.ops.autograd import none_if_unwanted, refuse_second_derivative
from edge_kernels.ops.linear_token_stats import (
    head_kernels,
    linear_token_stats_backward_op,
    linear_token_stats_op,
)
from edge_kernels.ops.token_stats import run_backward, stats_for_backward, token_stats_backward_op, token_stats_op
from edge_kernels.parallel.agreement import digest, digest_of_sizes
from edge_kernels.parallel.layout import Layout, Targets, targets_of

# --- merging ----------------------------------------------------------------------------------------------------------


@torch.library.custom_op("edge_kernels::units_per_nat", mutates_args=())
def units_per_nat_op(
    logits: Tensor,  # or hidden states, with the head's weight
    weight: Tensor | None,
    bias: Tensor | None,
    factor: Tensor | None,
    dtype: torch.dtype,
    memory_budget: int,
    transform: Tensor,
) -> Tensor:
    """Return ``Kernels.units_per_nat`` of the backend that serves these tensors, float64 (2, 1).

    (2, B) with a temperature for each of B entries.
    """
    unpacked = Transform.unpack(transform)
    if weight is not None and len(weight):
        backend = head_kernels(logits, weight, bias, dtype, memory_budget, factor)
    else:
        backend = kernels(logits)
    if not isinstance(unpacked.temperature, tuple):
        pair = backend.units_per_nat(unpacked, logits.device)  # filled in: a copy would wait for the device
        return torch.stack([torch.full((1,), x, dtype=torch.float64, device=logits.device) for x in pair])
    each = [unpacked._replace(temperature=temperature) for temperature in unpacked.temperature]
    pairs = [backend.units_per_nat(one, logits.device) for one in each]
    return torch.tensor(pairs, dtype=torch.float64).t().contiguous().to(logits.device)


@units_per_nat_op.register_fake
def _(logits: Tensor, *others: Any) -> Tensor:
    return logits.new_empty((2, max(1, others[-1].shape[0] - 3)), dtype=torch.float64)


class _Units(NamedTuple):
    """What ``KernelStats.maximum`` of a backend is in nats, and the reverse; float64, of a shape that expands."""

    fine: Tensor
    coarse: Tensor

    def nats(self, maximum: Tensor) -> Tensor:
        maximum = maximum.double()
        return torch.where(maximum.abs() > HUGE, maximum / self.coarse, maximum / self.fine)

    def of(self, nats: Tensor) -> Tensor:
        units = nats * self.fine
        return torch.where(units.abs() > HUGE, nats * self.coarse, units)


def _units(like: Tensor, *inputs: Any) -> _Units:
    """``like`` (B, ...): statistics."""
    pair = units_per_nat_op(*inputs)
    return _Units(*pair.view(2, -1, *[1] * (like.dim() - 1)).unbind())


def _nothing(like: Tensor, dtype: torch.dtype) -> KernelStats:
    """Return the statistics of rows without columns."""
    zero = torch.zeros(like.shape, dtype=dtype, device=like.device)
    return KernelStats(zero, zero, zero, zero, zero)


def _largest(maximum: Tensor, targets: Tensor, layout: Layout) -> tuple[Tensor, Tensor | None]:
    """Return the largest of all shards, and whether sizes and targets differ, if that is not known, a scalar.

    What must be equal goes along, with either sign: the largest of both are each other's negative then.
    """
    if layout.is_agreed:
        dist.all_reduce(maximum, dist.ReduceOp.MAX, group=layout.group)
        return maximum, None
    sizes = maximum.new_full((), digest_of_sizes(layout.sizes))
    same = torch.stack([sizes, digest(targets)])
    every = torch.cat([maximum.flatten(), same, -same])
    dist.all_reduce(every, dist.ReduceOp.MAX, group=layout.group)
    largest, same, negative = every.split([maximum.numel(), 2, 2])
    return largest.view(maximum.shape), (same != -negative).any()


def _merged(local: KernelStats, units: _Units, targets: Targets, layout: Layout) -> KernelStats:
    """Return the whole rows' statistics, in two all-reduces; ``maximum`` in the units of this process's backend.

    A process may take any number near the largest z as ``maximum``, if ``total`` refers to that very number.
    """
    dtype = local.total.dtype
    has_columns = local.total > 0  # else it is 0 (no column, or -inf throughout), or NaN
    own = units.nats(local.maximum)
    maximum, differs = _largest(own.masked_fill(~has_columns, -torch.inf), targets.whole, layout)
    d = (own - maximum).masked_fill(~has_columns, 0)
    factor, s = d.exp(), local.total.double()
    log_s = s.log()
    t = torch.where(has_columns, s * (log_s - local.entropy.double()), s)
    target = (local.logprobs.double() + log_s + d).masked_fill(s == 0, -torch.inf)  # z - maximum
    sums = torch.stack(
        [
            s * factor,
            (factor * (t + d * s)).masked_fill(factor == 0, 0),  # not 0 * inf
            target.masked_fill(~targets.is_own, 0),
        ]
    ).to(dtype)
    dist.all_reduce(sums, group=layout.group)
    s, t, target = sums.double().unbind()
    s = s.masked_fill(s == 0, torch.nan)  # -inf in every column
    if differs is not None:
        s = s.masked_fill(differs, torch.nan)
    log_s = s.log()
    near = torch.where(has_columns & (own == maximum), local.maximum.double(), units.of(maximum)).to(dtype)
    merged = KernelStats(
        logprobs=(target - log_s).clamp(max=0).masked_fill(targets.is_wrong, torch.nan),
        entropy=(log_s - t / s).clamp(min=0),
        logsumexp=maximum + log_s,
        maximum=near.masked_fill(s.isnan(), torch.nan),
        total=s * (maximum - units.nats(near)).exp(),
    )
    return KernelStats(*(value.to(dtype).masked_fill(targets.ignored, 0) for value in merged))


# --- autograd ---------------------------------------------------------------------------------------------------------


def sharded_stats(
    logits: Tensor, targets: Tensor, transform: Transform, layout: Layout, *, inplace: bool
) -> tuple[Tensor, ...]:
    """Return the statistics of sharded logits, differentiable."""
    own = targets_of(targets, layout, transform.ignore_index)
    packed, detached = transform._replace(ignore_index=IGNORE_INDEX).pack(), logits.detach()
    if layout.size():
        local = KernelStats(*token_stats_op(detached, own.forward, packed))
    else:
        local = _nothing(targets, stats_dtype(logits.dtype))
    units = _units(targets, detached, None, None, None, logits.dtype, 0, packed)
    merged = _merged(local, units, own, layout)
    return _ShardedStats.apply(logits, own.backward, packed, inplace and not torch.compiler.is_compiling(), *merged)


def _kept(ctx: Any, inputs: Sequence[Tensor | None], merged: KernelStats) -> tuple[Tensor, ...]:
    """Save what the backward pass reads, ``inputs`` first, and return the statistics that have a gradient."""
    ctx.save_for_backward(*inputs, merged.entropy, merged.maximum, merged.total)
    ctx.set_materialize_grads(False)
    return merged.logprobs.clone(), merged.entropy.clone(), merged.logsumexp.clone()


def _is_wanted(grads: Sequence[Tensor | None]) -> bool:
    """Whether any statistic has received a gradient; raises RuntimeError where what follows is differentiated again."""
    if all(gradient is None for gradient in grads):
        return False
    if torch.is_grad_enabled():
        refuse_second_derivative()
    return True


class _ShardedStats(torch.autograd.Function):
    """The merged statistics, with the gradient of this process's columns, which needs no communication."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        targets: Tensor,  # ``Targets.backward``
        packed: Tensor,
        inplace: bool,
        *merged: Tensor,
    ) -> tuple[Tensor, ...]:
        ctx.inplace = inplace
        return _kept(ctx, (logits, targets, packed), KernelStats(*merged))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        none = (None,) * len(ctx.needs_input_grad)
        if not _is_wanted(grads):
            return none
        logits, targets, packed, *stats = ctx.saved_tensors
        if logits.numel() == 0:
            return torch.zeros_like(logits), *none[1:]
        if not ctx.inplace:
            return token_stats_backward_op(logits, targets, stats, list(grads), packed), *none[1:]
        out = logits.detach()
        options = (stats_for_backward(stats), StatsGradients(*grads), Transform.unpack(packed))
        run_backward(out, targets, *options, out=out)
        torch.autograd.graph.increment_version(logits)
        return out, *none[1:]


def sharded_head_stats(
    hidden: Tensor,  # (N, D), or (N, D + r) with a factor
    weight: Tensor,  # (size, D)
    bias: Tensor | None,  # (size,)
    factor: Tensor | None,  # (size, r)
    targets: Tensor,  # (N,)
    dtype: torch.dtype,
    memory_budget: int,
    transform: Transform,
    layout: Layout,
) -> tuple[Tensor, ...]:
    """Return the statistics of a head whose weight is sharded, differentiable."""
    own = targets_of(targets, layout, transform.ignore_index)
    packed, options = transform._replace(ignore_index=IGNORE_INDEX).pack(), (dtype, memory_budget)
    inputs = [None if value is None else value.detach() for value in (hidden, weight, bias, factor)]
    if layout.size():
        local = KernelStats(*linear_token_stats_op(*inputs[:3], own.forward, *options, packed, inputs[3]))
    else:
        local = _nothing(targets, stats_dtype(dtype))
    merged = _merged(local, _units(targets, *inputs, *options, packed), own, layout)
    hidden = _SummedGradient.apply(hidden, layout.group)
    return _ShardedHeadStats.apply(hidden, weight, bias, factor, own.backward, packed, *options, *merged)


class _SummedGradient(torch.autograd.Function):
    """The tensor itself; its gradient is summed over the group, in float32 at least: docs/parallel.md has figures."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        total = gradient.to(stats_dtype(gradient.dtype)).contiguous()
        if total is gradient:
            total = gradient.clone()
        dist.all_reduce(total, group=ctx.group)
        return total.to(gradient.dtype), None


class _ShardedHeadStats(torch.autograd.Function):
    """The merged statistics, with the gradients of this process's rows and what they add to the hidden's."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        factor: Tensor | None,
        targets: Tensor,  # ``Targets.backward``
        packed: Tensor,
        dtype: torch.dtype,
        memory_budget: int,
        *merged: Tensor,
    ) -> tuple[Tensor, ...]:
        ctx.options = (dtype, memory_budget)
        return _kept(ctx, (hidden, weight, bias, factor, targets, packed), KernelStats(*merged))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        none = (None,) * len(ctx.needs_input_grad)
        if not _is_wanted(grads):
            return none
        hidden, weight, bias, factor, targets, packed, *stats = ctx.saved_tensors
        wanted = list(ctx.needs_input_grad[:4])
        if len(weight):
            inputs = (hidden, weight, bias, targets, stats, list(grads), wanted)
            parts = linear_token_stats_backward_op(*inputs, *ctx.options, packed, factor)
        else:
            whole = (hidden, weight, hidden if bias is None else bias, hidden if factor is None else factor)
            parts = tuple(torch.zeros_like(value) for value in whole)
        return *none_if_unwanted(parts, wanted), *none[4:]
