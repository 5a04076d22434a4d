"""Token statistics from hidden states and the LM head's weight, without ever holding all the logits: the op.

Its tiles are head.py's; what happens inside a tile is the backends' business.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from edge_kernels._checks import (
    IGNORE_INDEX,
    check_like,
    check_targets_in_range,
    check_temperature,
    check_transform,
    describe,
    stats_dtype,
)
from edge_kernels.backend import fused_head, kernels
from edge_kernels.contract import HeadKernels, Kernels, KernelStats, StatsGradients, Transform
from edge_kernels.ops.autograd import grad_to_add_to, none_if_unwanted, refuse_second_derivative
from edge_kernels.ops.head import (
    Head,
    HeadGradient,
    Wanted,
    fake_head_gradient,
    tile_buffer,
    tiles,
    weight_gradient_by_columns,
)
from edge_kernels.ops.head_checks import LowRank, check_head, check_low_rank, check_memory_budget
from edge_kernels.ops.head_plan import FUSED, plan_of
from edge_kernels.ops.token_stats import stats_for_backward
from edge_kernels.types import TokenStats

# --- ops --------------------------------------------------------------------------------------------------------------


def _way(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    memory_budget: int,
    factor: Tensor | None = None,
) -> HeadKernels | Head:
    """Return the kernels that make the logits themselves, or the head whose tiles are to be made."""
    plan = plan_of(hidden, weight, dtype, memory_budget, advantages_known=False, may_fuse=factor is None)
    fused = fused_head(hidden) if factor is None and (plan is None or plan.way == FUSED) else None
    return fused or Head(weight, bias, dtype, plan, memory_budget, factor)


def head_kernels(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype, memory_budget: int, factor: Tensor | None
) -> Kernels:
    """Return the backend that makes the statistics of these logits."""
    head = _way(hidden, weight, bias, dtype, memory_budget, factor)
    return kernels(weight) if isinstance(head, Head) else head


@torch.library.custom_op("edge_kernels::linear_token_stats", mutates_args=())
def linear_token_stats_op(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    dtype: torch.dtype,
    memory_budget: int,
    transform: Tensor,
    factor: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``factor`` (V, r): hidden has D + r columns then, the last ones for it."""
    unpacked = Transform.unpack(transform)
    check_targets_in_range(targets, weight.shape[0], unpacked.ignore_index)
    head = _way(hidden, weight, bias, dtype, memory_budget, factor)
    if not isinstance(head, Head):
        return head.linear_forward(hidden, weight, bias, targets, dtype, unpacked)
    return _forward(hidden, weight, targets, head, unpacked)


def _forward(hidden: Tensor, weight: Tensor, targets: Tensor, head: Head, transform: Transform) -> KernelStats:
    dtype = stats_dtype(head.products)
    out = KernelStats(*(targets.new_zeros(targets.shape, dtype=dtype) for _ in KernelStats._fields))
    active, backend = targets != transform.ignore_index, kernels(weight)
    buffer = tile_buffer(weight, head, head.count(active))
    for tile in tiles(hidden, head, active, buffer):
        parts = backend.token_stats_forward(tile.logits, targets[tile.rows], transform)
        for whole, part in zip(out, parts, strict=True):
            whole[tile.rows] = part
    return out


@linear_token_stats_op.register_fake
def _(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, dtype: torch.dtype, *_: Any
) -> tuple[Tensor, ...]:
    return tuple(targets.new_empty(targets.shape, dtype=stats_dtype(dtype)) for _ in KernelStats._fields)


def _gradient(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    stats: KernelStats,
    gradients: StatsGradients,
    wanted: Wanted,
    dtype: torch.dtype,
    memory_budget: int,
    transform: Transform,
    into: Tensor | None = None,
    factor: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of hidden states, weight, bias, and factor.

    The weight's is added to ``into`` where that is given.
    """
    inputs = (hidden, weight, bias, targets)
    head = _way(hidden, weight, bias, dtype, memory_budget, factor)
    if not isinstance(head, Head):
        parts = head.linear_backward(*inputs, stats, gradients, wanted[:3], dtype, transform, into)
        return *parts, hidden.new_empty(0)
    return _by_tiles(*inputs, stats, gradients, wanted, head, transform, into, factor)


def _by_tiles(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    stats: KernelStats,
    gradients: StatsGradients,
    wanted: Wanted,
    head: Head,
    transform: Transform,
    into: Tensor | None,
    factor: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    backend = kernels(weight)
    # Besides ignored rows, those without a gradient are left out: clipped tokens, and groups of equal rewards.
    active = torch.zeros_like(targets, dtype=torch.bool)
    for gradient in gradients:
        if gradient is not None:
            active |= gradient != 0
    active &= targets != transform.ignore_index
    num_rows = head.count(active)
    by_columns = wanted[1] and (into is None or head.plan is not None) and head.needs_column_pass(num_rows)
    in_tiles = (wanted[0], wanted[1] and not by_columns, *wanted[2:])
    is_one_tile = num_rows <= head.height
    into_tiles = None if by_columns else into
    total = HeadGradient(hidden, weight, bias, head, in_tiles, is_one_tile=is_one_tile, into=into_tiles)
    buffer = tile_buffer(weight, head, num_rows)
    for tile in tiles(hidden, head, active, buffer) if any(in_tiles) else ():
        parts = StatsGradients(*(None if gradient is None else gradient[tile.rows] for gradient in gradients))
        tile_stats = KernelStats(*(value[tile.rows] for value in stats))
        backend.token_stats_backward(tile.logits, targets[tile.rows], tile_stats, parts, transform, out=tile.logits)
        total.add(tile)
    d_hidden, d_weight, d_bias = total.result()
    if by_columns:
        d_weight = weight_gradient_by_columns(
            hidden, weight, head, active, targets, stats, gradients, transform, buffer, into
        )
    return d_hidden, d_weight, d_bias, total.factor_result(factor)


@torch.library.custom_op("edge_kernels::linear_token_stats_backward", mutates_args=())
def linear_token_stats_backward_op(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    stats: list[Tensor],  # entropy, maximum, total
    gradients: list[Tensor | None],
    wanted: list[bool],
    dtype: torch.dtype,
    memory_budget: int,
    transform: Tensor,
    factor: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    inputs, kept, given = (hidden, weight, bias, targets), stats_for_backward(stats), StatsGradients(*gradients)
    return _gradient(*inputs, kept, given, wanted, dtype, memory_budget, Transform.unpack(transform), None, factor)


@linear_token_stats_backward_op.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    stats: list[Tensor],
    gradients: list[Tensor | None],
    wanted: list[bool],
    dtype: torch.dtype,
    memory_budget: int,
    transform: Tensor,
    factor: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    has_factor = factor is not None and len(wanted) > 3 and wanted[3]
    part = factor.new_empty(factor.shape) if factor is not None and has_factor else hidden.new_empty(0)
    return *fake_head_gradient(hidden, weight, bias, wanted[:3]), part


linear_token_stats_backward_op.register_autograd(refuse_second_derivative)

# --- autograd ---------------------------------------------------------------------------------------------------------


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.dtype, ctx.memory_budget, transform, factor = inputs
    ctx.save_for_backward(*tensors, transform, factor, output[1], *output[3:])
    ctx.mark_non_differentiable(*output[3:])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    none = (None,) * 8
    if all(g is None for g in grads[:3]):
        return none
    # Once: checkpointing recomputes them at each access.
    hidden, weight, bias, targets, transform, factor, *stats = ctx.saved_tensors
    wanted = [*ctx.needs_input_grad[:3], ctx.needs_input_grad[7]]
    inputs, gradients = (hidden, weight, bias, targets), list(grads[:3])
    into = grad_to_add_to(weight) if wanted[1] else None
    if into is None:
        options = (ctx.dtype, ctx.memory_budget, transform, factor)
        parts = linear_token_stats_backward_op(*inputs, stats, gradients, wanted, *options)
    else:
        kept, given, unpacked = stats_for_backward(stats), StatsGradients(*gradients), Transform.unpack(transform)
        parts = _gradient(*inputs, kept, given, wanted, ctx.dtype, ctx.memory_budget, unpacked, into, factor)
        wanted[1] = False
    of_hidden, of_weight, of_bias, of_factor = none_if_unwanted(parts, wanted)
    return of_hidden, of_weight, of_bias, *none[3:7], of_factor


linear_token_stats_op.register_autograd(_backward, setup_context=_setup_context)


def at_temperatures(hidden: Tensor, bias: Tensor | None, temperature: Tensor, softcap: float | None) -> Tensor:
    """Return hidden states, or those of a low-rank part, divided by each response's temperature, in their dtype."""
    if bias is not None or softcap is not None:
        raise ValueError(
            "a temperature for each response divides the hidden states, so it takes neither bias nor softcap; got "
            f"bias={'None' if bias is None else describe(bias)}, softcap={softcap}; pass the logits to token_stats or "
            "edge_grpo_loss"
        )
    divisor = check_temperature(temperature, hidden.shape[0]).to(hidden.device)
    divided = hidden.to(torch.promote_types(hidden.dtype, torch.float32)) / divisor.view(-1, *[1] * (hidden.dim() - 1))
    return divided.to(hidden.dtype)


# --- public -----------------------------------------------------------------------------------------------------------


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
) -> TokenStats:
    """Return ``token_stats(F.linear(hidden, weight, bias), targets, ...)`` without ever holding all the logits.

    hidden   (..., D): float32, bfloat16, float16 or float64.
    weight   (V, D), in the dtype of ``hidden``.
    bias     (V,), in the same dtype, or None.
    targets  (...), int64, in [0, V) or ``ignore_index``: such rows are left out before the first product.

    Options, results and special values as ``token_stats``; a temperature for each entry of the first dimension divides
    the hidden states, in their dtype, and takes neither bias nor softcap. Differentiable once in hidden, weight and
    bias; only what requires a gradient is computed. The backward pass makes the logits again, tile by tile (four
    products in all), for the rows that have a gradient, and adds to an existing ``weight.grad`` in place. The weight's
    gradient is summed in float32 at least; for a 16-bit weight and more than one tile by a pass of its own (a fifth
    product) instead of in a float32 tensor of the weight's size.

    low_rank       states (..., r) and factor (V, r): the logits have ``states @ factor.T`` added, in the dtype of the
                   products. So an adapter on the head is computed, ``(scale * F.linear(hidden, A), B)``, without a
                   sum of weights; states and factor receive gradients.

    memory_budget  bytes in use besides inputs and results, as in ``linear_edge_grpo_loss``; None: 80 MiB for the tile
                   of logits on a CPU, 3 GiB on a GPU, where it and the sizes decide between tiles and fused kernels.

    Extra memory is O(N) besides. Products are in the inputs' dtype, under
    autocast in autocast's, as ``F.linear``'s; 16-bit ones on a CPU without instructions for them are made in float32,
    from blocks of the weight converted on the fly, and their logits are not rounded. Raises TypeError or ValueError for
    wrong dtypes, shapes and targets.
    """
    dtype = check_head(hidden, weight, bias)
    remedy = "pass one token id per row of hidden"
    check_like("targets", targets, {"hidden.shape[:-1]": tuple(hidden.shape[:-1])}, "int64", hidden, remedy=remedy)
    check_low_rank(low_rank, hidden, weight)
    factor = None
    if low_rank is not None:
        hidden, factor = torch.cat([hidden, low_rank[0].to(hidden.dtype)], dim=-1), low_rank[1]
    if isinstance(temperature, Tensor):
        hidden, temperature = at_temperatures(hidden, bias, temperature, softcap), 1.0
    check_transform(temperature, softcap)
    transform = Transform(temperature, softcap, logit_scale, ignore_index)
    inputs = (hidden.flatten(0, -2), weight, bias, targets.flatten())
    stats = linear_token_stats_op(*inputs, dtype, check_memory_budget(memory_budget), transform.pack(), factor)
    return TokenStats(*(value.view(targets.shape) for value in stats[:3]))
