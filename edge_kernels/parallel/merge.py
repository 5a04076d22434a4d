"""The merged statistics of a vocabulary's shards: two all-reduces, and autograd around them.

Each process makes the statistics of its own columns with the ordinary ops, and the gradient of its own columns from the
merged statistics. What merges how: docs/parallel.md.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from edge_kernels._checks import IGNORE_INDEX, stats_dtype
from edge_kernels.backend import kernels
from edge_kernels.contract import HUGE, Kernels, KernelStats, StatsGradients, Transform
from edge_kernels.ops.autograd import none_if_unwanted, refuse_second_derivative
from edge_kernels.ops.linear_token_stats import (
    head_kernels,
    linear_token_stats_backward_op,
    linear_token_stats_op,
)
from edge_kernels.ops.token_stats import run_backward, stats_for_backward, token_stats_backward_op, token_stats_op
from edge_kernels.parallel.layout import Layout, Targets, targets_of

# --- merging ----------------------------------------------------------------------------------------------------------


class _Units:
    """What ``KernelStats.maximum`` of a backend is in nats, and the reverse; float64."""

    def __init__(self, backend: Kernels, transform: Transform, like: Tensor) -> None:
        """``like`` (B, ...): statistics, where the transform has a temperature for each of B entries."""
        if not isinstance(transform.temperature, Tensor):
            pair: Any = backend.units_per_nat(transform, like.device)
        else:
            each = [
                backend.units_per_nat(transform._replace(temperature=temperature), like.device)
                for temperature in transform.temperature.tolist()
            ]
            shape = (2, -1, *[1] * (like.dim() - 1))
            pair = torch.tensor(each, dtype=torch.float64).view(-1, 2).t().reshape(shape).to(like.device).unbind()
        self._fine, self._coarse = pair

    def nats(self, maximum: Tensor) -> Tensor:
        maximum = maximum.double()
        return torch.where(maximum.abs() > HUGE, maximum / self._coarse, maximum / self._fine)

    def of(self, nats: Tensor) -> Tensor:
        units = nats * self._fine
        return torch.where(units.abs() > HUGE, nats * self._coarse, units)


def _nothing(like: Tensor, dtype: torch.dtype) -> KernelStats:
    """Return the statistics of rows without columns."""
    zero = torch.zeros(like.shape, dtype=dtype, device=like.device)
    return KernelStats(zero, zero, zero, zero, zero)


def _merged(local: KernelStats, units: _Units, targets: Targets, group: Any) -> KernelStats:
    """Return the whole rows' statistics, in two all-reduces; ``maximum`` in the units of this process's backend.

    A process may take any number near the largest z as ``maximum``, if ``total`` refers to that very number.
    """
    dtype = local.total.dtype
    has_columns = local.total > 0  # else it is 0 (no column, or -inf throughout), or NaN
    own = units.nats(local.maximum)
    maximum = own.masked_fill(~has_columns, -torch.inf)
    dist.all_reduce(maximum, dist.ReduceOp.MAX, group=group)
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
    dist.all_reduce(sums, group=group)
    s, t, target = sums.double().unbind()
    s = s.masked_fill(s == 0, torch.nan)  # -inf in every column
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


class ShardedStats(torch.autograd.Function):
    """The statistics of sharded logits. The gradient of a shard needs no communication."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, targets: Tensor, transform: Transform, layout: Layout, inplace: bool
    ) -> tuple[Tensor, ...]:
        own = targets_of(targets, layout, transform.ignore_index)
        transform = transform._replace(ignore_index=IGNORE_INDEX)
        packed, backend = transform.pack(), kernels(logits)
        if layout.size():
            local = KernelStats(*token_stats_op(logits, own.forward, packed))
        else:
            local = _nothing(targets, stats_dtype(logits.dtype))
        merged = _merged(local, _Units(backend, transform, targets), own, layout.group)
        ctx.save_for_backward(logits, own.backward, packed, merged.entropy, *merged[3:])
        ctx.set_materialize_grads(False)
        ctx.inplace = inplace
        return merged[:3]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        none = (None,) * 5
        if all(gradient is None for gradient in grads):
            return none
        if torch.is_grad_enabled():
            refuse_second_derivative()
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


class ShardedHeadStats(torch.autograd.Function):
    """The statistics of a head whose weight is sharded. The gradient of the hidden states is summed over the group."""

    @staticmethod
    def forward(
        ctx: Any,
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
        own = targets_of(targets, layout, transform.ignore_index)
        transform = transform._replace(ignore_index=IGNORE_INDEX)
        packed, options = transform.pack(), (dtype, memory_budget)
        backend = kernels(hidden)
        if layout.size():
            backend = head_kernels(hidden, weight, bias, *options, factor)
            local = KernelStats(*linear_token_stats_op(hidden, weight, bias, own.forward, *options, packed, factor))
        else:
            local = _nothing(targets, stats_dtype(dtype))
        merged = _merged(local, _Units(backend, transform, targets), own, layout.group)
        ctx.save_for_backward(hidden, weight, bias, own.backward, packed, factor, merged.entropy, *merged[3:])
        ctx.set_materialize_grads(False)
        ctx.options, ctx.group = options, layout.group
        return merged[:3]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        none = (None,) * 9
        if all(gradient is None for gradient in grads):
            return none
        if torch.is_grad_enabled():
            refuse_second_derivative()
        hidden, weight, bias, targets, packed, factor, *stats = ctx.saved_tensors
        needs_hidden, needs_weight, needs_bias, needs_factor = ctx.needs_input_grad[:4]
        wanted = [needs_hidden, needs_weight, needs_bias, needs_factor]
        if len(weight):
            inputs = (hidden, weight, bias, targets, stats, list(grads), wanted)
            parts = linear_token_stats_backward_op(*inputs, *ctx.options, packed, factor)
        else:
            whole = (hidden, weight, hidden if bias is None else bias, hidden if factor is None else factor)
            parts = tuple(torch.zeros_like(value) for value in whole)
        d_hidden = parts[0]
        if needs_hidden:
            d_hidden = d_hidden.contiguous()
            dist.all_reduce(d_hidden, group=ctx.group)
        return *none_if_unwanted((d_hidden, *parts[1:]), wanted), *none[4:]
