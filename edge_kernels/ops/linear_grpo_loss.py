"""GRPO and EDGE-GRPO losses from hidden states and the LM head: one sweep of tiles, the ops around it, autograd.

A batch's options and totals, and the second half of two sweeps, are grpo_loss.py's; tiles are linear_token_stats.py's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from edge_kernels._checks import check_targets_in_range, describe, stats_dtype
from edge_kernels.backend import fused_head
from edge_kernels.config import GRPOLossConfig
from edge_kernels.memory import fresh, grad_to_add_to
from edge_kernels.ops.grpo_loss import (
    Total,
    check_batch,
    hand_out,
    is_one,
    keep_gradients,
    loss_of_stats,
    output_of,
    run_sweep,
    wants_gradient,
)
from edge_kernels.ops.linear_token_stats import (
    Head,
    HeadGradient,
    Tile,
    check_head,
    fake_head_gradient,
    linear_token_stats,
    needs_column_pass,
    none_if_unwanted,
    product_dtype,
    rows_per_tile,
    tile_buffer,
    tiles,
    weight_gradient_by_columns,
)
from edge_kernels.ops.token_loss import METRICS, LossRule, TokenTerms, run_token_loss
from edge_kernels.ops.token_stats import (
    KernelStats,
    StatsGradients,
    Transform,
    refuse_second_derivative,
    run_backward,
    run_forward,
)
from edge_kernels.types import GRPOLossOutput

# --- the sweep --------------------------------------------------------------------------------------------------------


@torch.library.custom_op("edge_kernels::linear_grpo_loss", mutates_args=())
def linear_grpo_loss_op(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    want_hidden: bool,
    want_weight: bool,
    want_bias: bool,
    keep_tile: bool,
    dtype: torch.dtype,
    temperature: float,
    softcap: float | None,
    logit_scale: float,
    ignore_index: int,
    mask: Tensor,
    loss_weight: Tensor,
    advantages: Tensor,
    old_logprobs: Tensor | None,
    ref_logprobs: Tensor | None,
    sampler_ratio: Tensor | None,
    sampling_logprobs: Tensor | None,
    injected: Tensor | None,
    entropy_threshold: Tensor | None,
    bonus_weight: Tensor | None,
    loss_type: str,
    level: str,
    epsilon_low: float,
    epsilon_high: float,
    delta: float | None,
    beta: float,
    sampler_cap: float | None,
    sampler_floor: float,
    sampler_mode: str,
    injected_treatment: str,
    sft_weight: float,
    shaped_gamma: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return loss, metrics, logprobs, entropy; gradients of hidden, weight and bias; and what makes them later.

    With ``keep_tile`` the gradients are empty, and the last two are the gradient of the logits, (N, V), whose first
    rows belong to the tokens marked in the other, (N,) bool. Otherwise these two are empty.
    """
    check_targets_in_range(targets, weight.shape[0], ignore_index)
    transform = Transform(temperature, softcap, logit_scale, ignore_index)
    recorded = (old_logprobs, ref_logprobs, sampler_ratio, sampling_logprobs)
    terms = TokenTerms(mask, loss_weight, advantages, *recorded, injected, entropy_threshold, bonus_weight)
    clip = (loss_type, level, epsilon_low, epsilon_high, delta, beta)
    rule = LossRule(*clip, sampler_cap, sampler_floor, sampler_mode, injected_treatment, sft_weight, shaped_gamma)
    has_bonus = bonus_weight is not None
    if not keep_tile and (fused := fused_head(hidden)) is not None:
        stats = fused.linear_forward(hidden, weight, bias, targets, dtype, transform)
        total = fused.token_loss(stats.logprobs, stats.entropy, terms, rule)
        coefficients = StatsGradients(total.d_logprobs, total.d_entropy if has_bonus else None, None)
        wanted = (want_hidden, want_weight, want_bias)
        gradients = fused.linear_backward(
            hidden, weight, bias, targets, stats, coefficients, wanted, dtype, transform, None
        )
        nothing = (weight.new_empty(0, dtype=Head(weight, None, dtype).products), mask.new_empty(0))
        return total.loss, total.metrics, stats.logprobs, stats.entropy, *gradients, *nothing
    head = Head(weight, bias, dtype)
    # Without a penalty or a bonus, tokens of advantage 0 (groups of equal rewards) need their logits, no gradient.
    learning = mask
    if beta == 0 and not has_bonus and not (injected_treatment == "sft" and injected is not None):
        learning = mask & (advantages != 0)

    stats = KernelStats(*(torch.zeros_like(targets, dtype=stats_dtype(dtype)) for _ in KernelStats._fields))
    num_rows = int(learning.sum())
    num_others = int(mask.sum()) - num_rows
    by_columns = want_weight and not keep_tile and needs_column_pass(weight, head.products, num_rows)
    in_tiles = (want_hidden, want_weight and not by_columns, want_bias)
    gradient = None
    if not keep_tile:
        is_one_tile = num_rows <= rows_per_tile(weight, head.products)
        gradient = HeadGradient(hidden, weight, bias, head, in_tiles, is_one_tile=is_one_tile)
        buffer = tile_buffer(weight, head, max(num_rows, num_others))
    else:
        buffer = fresh((len(targets), weight.shape[0]), weight, head.products)
    for tile in tiles(hidden, head, learning, buffer):
        tile_terms, tile_targets = terms.select(tile.rows), targets[tile.rows]
        if not by_columns:
            arguments = (tile.logits, tile_targets, tile_terms, rule, transform)
            stats.logprobs[tile.rows], stats.entropy[tile.rows] = run_sweep(*arguments, out=tile.logits)
        else:  # the pass by columns will need all of a row's statistics
            tile_stats = run_forward(tile.logits, tile_targets, transform)
            for whole, part in zip(stats, tile_stats, strict=True):
                whole[tile.rows] = part
            loss_part = run_token_loss(tile_stats.logprobs, tile_stats.entropy, tile_terms, rule)
            coefficients = StatsGradients(loss_part.d_logprobs, loss_part.d_entropy if has_bonus else None, None)
            run_backward(tile.logits, tile_targets, tile_stats, coefficients, transform, out=tile.logits)
        if gradient is not None and any(in_tiles):
            gradient.add(tile)
    for tile in tiles(hidden, head, mask & ~learning, buffer[num_rows:] if keep_tile else buffer):
        tile_stats = run_forward(tile.logits, targets[tile.rows], transform)
        stats.logprobs[tile.rows], stats.entropy[tile.rows] = tile_stats.logprobs, tile_stats.entropy

    total = run_token_loss(stats.logprobs, stats.entropy, terms, rule)
    d_hidden, d_weight, d_bias = hidden.new_empty(0), weight.new_empty(0), weight.new_empty(0)
    if gradient is not None:
        d_hidden, d_weight, d_bias = gradient.result()
    if by_columns:
        coefficients = StatsGradients(total.d_logprobs, total.d_entropy if has_bonus else None, None)
        columns_arguments = (hidden, weight, head, learning, targets, stats, coefficients, transform, buffer)
        d_weight = weight_gradient_by_columns(*columns_arguments)
    if keep_tile:
        kept, marked = buffer, learning.clone()
    else:
        kept, marked = weight.new_empty(0, dtype=head.products), learning.new_empty(0)
    return total.loss, total.metrics, stats.logprobs, stats.entropy, d_hidden, d_weight, d_bias, kept, marked


@linear_grpo_loss_op.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    want_hidden: bool,
    want_weight: bool,
    want_bias: bool,
    keep_tile: bool,
    dtype: torch.dtype,
    *_: Any,
) -> tuple[Tensor, ...]:
    per_token = [torch.empty_like(targets, dtype=stats_dtype(dtype)) for _ in range(2)]
    loss, metrics = per_token[0].new_empty(()), per_token[0].new_empty(len(METRICS))
    wanted = (False, False, False) if keep_tile else (want_hidden, want_weight, want_bias)
    gradients = fake_head_gradient(hidden, weight, bias, wanted)
    rows = targets.shape[0] if keep_tile else 0
    shape = (rows, weight.shape[0]) if keep_tile else (0,)
    tile = weight.new_empty(shape, dtype=Head(weight, None, dtype).products)
    return loss, metrics, *per_token, *gradients, tile, targets.new_empty(rows, dtype=torch.bool)


# --- autograd ---------------------------------------------------------------------------------------------------------


def _gradient_of_tile(
    grad_loss: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    tile: Tensor,
    learning: Tensor,
    wanted: tuple[bool, bool, bool],
    dtype: torch.dtype,
    into: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    head = Head(weight, bias, dtype)
    gradient = HeadGradient(hidden, weight, bias, head, wanted, is_one_tile=True, into=into)
    rows = learning.nonzero()[:, 0]
    if len(rows):
        scale = None if is_one(grad_loss) else grad_loss
        gradient.add(Tile(rows, head.convert(hidden[rows]), tile[: len(rows)]), scale)
    return gradient.result()


@torch.library.custom_op("edge_kernels::linear_grpo_loss_backward", mutates_args=())
def linear_grpo_loss_backward_op(
    grad_loss: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    tile: Tensor,
    learning: Tensor,
    want_hidden: bool,
    want_weight: bool,
    want_bias: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    wanted = (want_hidden, want_weight, want_bias)
    return _gradient_of_tile(grad_loss, hidden, weight, bias, tile, learning, wanted, dtype)


@linear_grpo_loss_backward_op.register_fake
def _(grad_loss: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    return fake_head_gradient(hidden, weight, bias, rest[2:5])


linear_grpo_loss_backward_op.register_autograd(refuse_second_derivative)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, bias, _, *wanted, keep_tile, dtype = inputs[:9]
    ctx.mark_non_differentiable(*output[1:])
    if not keep_tile:
        keep_gradients(ctx, output[4:7], tuple(wanted), len(inputs))
    else:
        keep_gradients(ctx, (hidden, weight, bias, *output[7:]), tuple(wanted), len(inputs))
    ctx.keep_tile, ctx.dtype = keep_tile, dtype


def _backward(ctx: Any, grad_loss: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    if not ctx.keep_tile:
        return hand_out(ctx, grad_loss)
    none = (None,) * ctx.num_inputs
    if grad_loss is None:
        return none
    if torch.is_grad_enabled():
        refuse_second_derivative()
    hidden, weight, bias, tile, learning = ctx.saved_tensors  # once: checkpointing makes them anew at each access
    want_hidden, want_weight, want_bias = ctx.wanted
    into = grad_to_add_to(weight) if want_weight else None
    arguments = (grad_loss, hidden, weight, bias, tile, learning)
    if into is None:
        gradients = linear_grpo_loss_backward_op(*arguments, *ctx.wanted, ctx.dtype)
    else:
        gradients = _gradient_of_tile(*arguments, ctx.wanted, ctx.dtype, into)
        want_weight = False
    return *none_if_unwanted(gradients, (want_hidden, want_weight, want_bias)), *none[3:]


linear_grpo_loss_op.register_autograd(_backward, setup_context=_setup_context)

# --- public -----------------------------------------------------------------------------------------------------------


def linear_edge_grpo_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    completion_mask: Tensor,
    bias: Tensor | None = None,
    *,
    advantages: Tensor | None = None,
    rewards: Tensor | None = None,
    group_ids: Tensor | None = None,
    old_logprobs: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    sampling_logprobs: Tensor | None = None,
    injected_mask: Tensor | None = None,
    num_items: Total = None,
    num_sequences: Total = None,
    entropy_threshold: Total = None,
    config: GRPOLossConfig | None = None,
) -> GRPOLossOutput:
    """Return ``edge_grpo_loss(F.linear(hidden, weight, bias), targets, completion_mask, ...)`` without all the logits.

    hidden  (B, T, D): float32, bfloat16, float16 or float64.
    weight  (V, D), and bias (V,) or None, in the dtype of ``hidden`` (under autocast in any).

    Everything else as ``edge_grpo_loss``; hidden, weight and bias receive gradients, each only if it requires one.
    Masked rows are left out before the first product.

    One sweep of tiles and three products (logits, d hidden, d weight) where a token's coefficient is known once its
    own statistics are. On a CPU a batch of one tile (``TILE_BYTES``; 138 rows of V = 151,936 in float32) keeps that
    tile's gradient until the backward pass, which adds to an existing ``weight.grad`` where it lies. The gradient of a
    larger batch is made in the forward pass, scaled by the incoming one in the backward pass, and handed out once
    (``retain_graph`` for a second pass raises).

    A fourth product: for a 16-bit weight and more than one tile, whose weight gradient takes a pass of its own, block
    by block, so that it is summed in float32 without a float32 tensor of its size. Two sweeps and a fourth (there a
    fifth) product where coefficients depend on other tokens: with rewards instead of advantages; with
    ``importance_sampling_level="sequence"``; with a sequence-level sampler ratio but no old_logprobs; with
    ``top_entropy_quantile`` < 1 but no entropy_threshold, or, where there is an entropy bonus, no num_items. On a GPU
    four at all times: its kernels keep no logits, and make them again. Without gradients there is one product.

    Extra memory: one tile of logits (``TILE_BYTES``, 80 MiB) and O(N), besides the gradients. Products are in the
    inputs' dtype, under ``torch.autocast`` in its; 16-bit ones on a CPU without instructions for them are made in
    float32, the weight being converted block by block.
    """
    dtype = check_head(hidden, weight, bias)
    if hidden.dim() != 3:
        raise ValueError(f"hidden must have shape (B, T, D); got {describe(hidden)}; add the dimension of sequences")
    batch = check_batch(
        hidden,
        dtype,
        targets,
        completion_mask,
        config,
        advantages=advantages,
        rewards=rewards,
        group_ids=group_ids,
        old_logprobs=old_logprobs,
        ref_logprobs=ref_logprobs,
        sampling_logprobs=sampling_logprobs,
        injected_mask=injected_mask,
        num_items=num_items,
        num_sequences=num_sequences,
        entropy_threshold=entropy_threshold,
    )
    wanted = [wants_gradient(t) for t in (hidden, weight, bias)]
    if batch.advantages is None or batch.needs_statistics_first or not any(wanted):
        stats = linear_token_stats(hidden, weight, batch.targets, bias, **batch.transform._asdict())
        return loss_of_stats(stats, batch)
    loss, metrics, logprobs, entropy, *_ = linear_grpo_loss_op(
        hidden.flatten(0, 1),
        weight,
        bias,
        batch.targets.flatten(),
        *wanted,
        # A GPU has kernels that make no tile, and selecting rows for one would wait for it.
        weight.device.type == "cpu"
        and batch.mask.numel() <= rows_per_tile(weight, product_dtype(dtype, weight.device)),
        dtype,
        *batch.transform,
        *batch.terms(batch.advantages, None).flatten(),
        *LossRule.of(batch.config),
    )
    shape = batch.mask.shape
    return output_of(loss, metrics, logprobs.view(shape), entropy.view(shape), batch.advantages, batch)
