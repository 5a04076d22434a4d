"""GRPO and EDGE-GRPO losses from hidden states and the LM head: one sweep of tiles, the ops around it, autograd.

A batch's options and totals, and the second half of two sweeps, are batch.py's; tiles are head.py's.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from edge_kernels._checks import check_targets_in_range, stats_dtype
from edge_kernels.backend import fused_head, kernels
from edge_kernels.config import GRPOLossConfig
from edge_kernels.contract import METRICS, HeadKernels, Injected, KernelStats, LossRule, TokenTerms, Transform
from edge_kernels.ops.autograd import (
    grad_to_add_to,
    hand_out,
    is_one,
    keep_gradients,
    none_if_unwanted,
    refuse_second_derivative,
    waits_for_loss_gradient,
    wants_gradient,
)
from edge_kernels.ops.batch import Batch, Total, loss_of_stats, output_of
from edge_kernels.ops.batch_checks import check_batch, prepared_hidden
from edge_kernels.ops.head import (
    Head,
    HeadGradient,
    Tile,
    Wanted,
    fake_head_gradient,
    product_dtype,
    rows_per_tile,
    tile_buffer,
    tiles,
    weight_gradient_by_columns,
)
from edge_kernels.ops.head_checks import LowRank, check_head, check_low_rank, check_memory_budget
from edge_kernels.ops.head_plan import FUSED, plan_of, selects_rows
from edge_kernels.ops.linear_token_stats import linear_token_stats
from edge_kernels.ops.memory import fresh
from edge_kernels.types import GRPOLossOutput

# --- the sweep --------------------------------------------------------------------------------------------------------


class _Call(NamedTuple):
    """The op's arguments, unpacked."""

    hidden: Tensor  # (N, D)
    weight: Tensor  # (V, D)
    bias: Tensor | None  # (V,)
    targets: Tensor  # (N,)
    wanted: Wanted
    dtype: torch.dtype
    transform: Transform
    terms: TokenTerms  # (N,) each
    rule: LossRule

    @property
    def learning(self) -> Tensor:
        """Tokens that have a gradient: without a penalty or a bonus not those of advantage 0 (equal rewards), (N,)."""
        terms, rule = self.terms, self.rule
        teaches_regardless = rule.beta != 0 or terms.bonus_weight is not None
        if teaches_regardless or (rule.injected == Injected.SFT and terms.injected is not None):
            return terms.mask
        return terms.mask & (terms.advantages != 0)


class _Swept(NamedTuple):
    """What the op returns. With a kept tile the gradients are empty, else the last two are."""

    loss: Tensor
    metrics: Tensor
    logprobs: Tensor  # (N,)
    entropy: Tensor  # (N,)
    d_hidden: Tensor
    d_weight: Tensor
    d_bias: Tensor
    tile: Tensor  # (N, V): the gradient of the logits, in its first rows that of the tokens marked in ``learning``
    learning: Tensor  # (N,), bool


def _by_kernels(call: _Call, fused: HeadKernels) -> _Swept:
    """Return loss and gradients by a backend that makes the logits itself, twice."""
    inputs = call[:4]
    stats = fused.linear_forward(*inputs, call.dtype, call.transform)
    total = fused.token_loss(stats.logprobs, stats.entropy, call.terms, call.rule)
    coefficients = total.gradients(call.terms)
    gradients = fused.linear_backward(*inputs, stats, coefficients, call.wanted, call.dtype, call.transform, None)
    tile = call.weight.new_empty(0, dtype=Head(call.weight, None, call.dtype).products)
    per_token = (stats.logprobs, stats.entropy)
    return _Swept(total.loss, total.metrics, *per_token, *gradients, tile, call.terms.mask.new_empty(0))


def _by_tiles(call: _Call, head: Head, keep_tile: bool) -> _Swept:
    """Return loss and gradients, or the one tile they are made from, in a sweep over tiles of logits.

    Nothing waits for the device where the head has a plan: tiles hold all rows, those without a gradient too.
    """
    hidden, weight, bias, targets, wanted, dtype, transform, terms, rule = call
    backend = kernels(weight)
    learning = call.learning if head.plan is None else terms.mask
    stats = KernelStats(*(targets.new_zeros(targets.shape, dtype=stats_dtype(dtype)) for _ in KernelStats._fields))
    num_rows = head.count(learning)
    by_columns = wanted[1] and not keep_tile and head.needs_column_pass(num_rows)
    in_tiles = (
        wanted[0] and not keep_tile,
        wanted[1] and not keep_tile and not by_columns,
        wanted[2] and not keep_tile,
    )
    gradient = HeadGradient(hidden, weight, bias, head, in_tiles, is_one_tile=num_rows <= head.height)
    others = None if head.plan is not None else terms.mask & ~learning
    if keep_tile:
        buffer = fresh((len(targets), weight.shape[0]), weight, head.products)
    else:
        buffer = tile_buffer(weight, head, num_rows if others is None else max(num_rows, head.count(others)))
    for tile in tiles(hidden, head, learning, buffer):
        tile_terms, tile_targets = terms.select(tile.rows), targets[tile.rows]
        if not by_columns:
            parts = backend.grpo_sweep(tile.logits, tile_targets, tile_terms, rule, transform, out=tile.logits)
            stats.logprobs[tile.rows], stats.entropy[tile.rows] = parts
        else:  # the pass by columns will need all of a row's statistics
            tile_stats = backend.token_stats_forward(tile.logits, tile_targets, transform)
            for whole, part in zip(stats, tile_stats, strict=True):
                whole[tile.rows] = part
            tile_loss = backend.token_loss(tile_stats.logprobs, tile_stats.entropy, tile_terms, rule)
            coefficients = tile_loss.gradients(terms)
            backend.token_stats_backward(
                tile.logits, tile_targets, tile_stats, coefficients, transform, out=tile.logits
            )
        if any(in_tiles):
            gradient.add(tile)
    # The others have a loss and metrics: they need their statistics.
    rest = buffer[num_rows:] if keep_tile else buffer
    for tile in tiles(hidden, head, others, rest) if others is not None else ():
        tile_stats = backend.token_stats_forward(tile.logits, targets[tile.rows], transform)
        stats.logprobs[tile.rows], stats.entropy[tile.rows] = tile_stats.logprobs, tile_stats.entropy

    total = backend.token_loss(stats.logprobs, stats.entropy, terms, rule)
    d_hidden, d_weight, d_bias = gradient.result()
    if by_columns:
        coefficients = total.gradients(terms)
        columns_arguments = (hidden, weight, head, learning, targets, stats, coefficients, transform, buffer)
        d_weight = weight_gradient_by_columns(*columns_arguments)
    if keep_tile:
        kept = (buffer, learning.clone())
    else:
        kept = (weight.new_empty(0, dtype=head.products), learning.new_empty(0))
    return _Swept(total.loss, total.metrics, stats.logprobs, stats.entropy, d_hidden, d_weight, d_bias, *kept)


def _sweep(call: _Call, keep_tile: bool, memory_budget: int) -> _Swept:
    hidden, weight, bias, _, wanted, dtype, *_ = call
    plan = plan_of(hidden, weight, dtype, memory_budget, advantages_known=True, wants_weight=wanted[1])
    fused = None if keep_tile or (plan is not None and plan.way != FUSED) else fused_head(hidden)
    if fused is not None:
        return _by_kernels(call, fused)
    return _by_tiles(call, Head(weight, bias, dtype, plan, memory_budget), keep_tile)


@torch.library.custom_op("edge_kernels::linear_grpo_loss", mutates_args=())
def linear_grpo_loss_op(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    wanted: list[bool],
    keep_tile: bool,
    dtype: torch.dtype,
    memory_budget: int,
    transform: Tensor,
    terms: list[Tensor | None],
    rule: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the fields of ``_Swept``."""
    records = (Transform.unpack(transform), TokenTerms.unpack(terms), LossRule.unpack(rule))
    call = _Call(hidden, weight, bias, targets, wanted, dtype, *records)
    check_targets_in_range(targets, weight.shape[0], call.transform.ignore_index)
    return _sweep(call, keep_tile, memory_budget)


@linear_grpo_loss_op.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    wanted: list[bool],
    keep_tile: bool,
    dtype: torch.dtype,
    *_: Any,
) -> tuple[Tensor, ...]:
    per_token = [targets.new_empty(targets.shape, dtype=stats_dtype(dtype)) for _ in range(2)]
    loss, metrics = per_token[0].new_empty(()), per_token[0].new_empty(len(METRICS))
    gradients = fake_head_gradient(hidden, weight, bias, [False] * 3 if keep_tile else wanted)
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
    wanted: Wanted,
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
    wanted: list[bool],
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    return _gradient_of_tile(grad_loss, hidden, weight, bias, tile, learning, wanted, dtype)


@linear_grpo_loss_backward_op.register_fake
def _(grad_loss: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    return fake_head_gradient(hidden, weight, bias, rest[2])


linear_grpo_loss_backward_op.register_autograd(refuse_second_derivative)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    swept = _Swept(*output)
    *tensors, _, wanted, ctx.keep_tile, ctx.dtype = inputs[:7]
    ctx.mark_non_differentiable(*swept[1:])
    gradients = swept[4:7]
    keep_gradients(ctx, (*tensors, *swept[7:]) if ctx.keep_tile else gradients, wanted, inputs)


def _backward(ctx: Any, grad_loss: Tensor | None, *_: Tensor | None) -> tuple[Any, ...]:
    if not ctx.keep_tile or grad_loss is None:
        return hand_out(ctx, grad_loss)
    if torch.is_grad_enabled():
        refuse_second_derivative()
    hidden, weight, bias, tile, learning = ctx.saved_tensors  # once: checkpointing recomputes them at each access
    inputs = (grad_loss, hidden, weight, bias, tile, learning)
    want_hidden, want_weight, want_bias = ctx.wanted
    into = grad_to_add_to(weight) if want_weight else None
    if into is None:
        gradients = linear_grpo_loss_backward_op(*inputs, ctx.wanted, ctx.dtype)
    else:
        gradients = _gradient_of_tile(*inputs, ctx.wanted, ctx.dtype, into)
        want_weight = False
    return *none_if_unwanted(gradients, (want_hidden, want_weight, want_bias)), *ctx.others


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
    truncated_mask: Tensor | None = None,
    temperature: Tensor | None = None,
    num_items: Total = None,
    num_sequences: Total = None,
    entropy_threshold: Total = None,
    cu_seqlens: Tensor | None = None,
    config: GRPOLossConfig | None = None,
    low_rank: LowRank | None = None,
    memory_budget: int | None = None,
) -> GRPOLossOutput:
    """Return ``edge_grpo_loss(F.linear(hidden, weight, bias), targets, completion_mask, ...)`` without all the logits.

    hidden  (B, T, D), or (N, D) or (1, N, D) with ``cu_seqlens``: float32, bfloat16, float16 or float64.
    weight  (V, D), and bias (V,) or None, in the dtype of ``hidden`` (under autocast in any).

    Everything else as ``edge_grpo_loss``; hidden, weight and bias receive gradients, each only if it requires one.
    Masked rows are left out before the first product (not from tiles on a GPU). A ``temperature`` for each response
    divides the hidden states, in their dtype; it takes neither a bias nor a soft cap.

    One sweep of tiles and three products (logits, d hidden, d weight) where a token's coefficient is known once its
    own statistics are. On a CPU a batch of one tile (``TILE_BYTES``; 138 rows of V = 151,936 in float32) keeps that
    tile's gradient until the backward pass, which adds to an existing ``weight.grad`` in place. The gradient of a
    larger batch is made in the forward pass, scaled by the incoming one in the backward pass, and returned once
    (``retain_graph`` for a second pass raises).

    A fourth product, on a CPU: for a 16-bit weight and more than one tile, whose weight gradient takes a pass of its
    own, block by block, so that it is summed in float32 without a float32 tensor of its size. Two sweeps and a fourth
    (there a fifth) product for a float16 batch of more than one tile (on a GPU for any), whose gradient cannot be
    rounded before a gradient scaler's factor is known, and where coefficients depend on other tokens: with rewards
    instead of advantages; with ``importance_sampling_level="sequence"``; with a sequence-level sampler ratio but no
    old_logprobs; with
    ``top_entropy_quantile`` < 1 but no entropy_threshold, or, where there is an entropy bonus, no num_items. Without
    gradients there is one product.

    low_rank       states (B, T, r) and factor (V, r) that add ``states @ factor.T`` to the logits, as an adapter on the
                   head does; see ``linear_token_stats``. Always two sweeps.

    memory_budget  bytes that the op may have in use besides its inputs and results. On a CPU it bounds the tile of
                   logits (None: 80 MiB). On a GPU (None: 3 GiB) it decides, with the sizes, between tiles by the
                   library's products and the fused kernels, which keep no logits and take four products: head_plan.py.
                   There a ValueError says how much is needed if nothing fits, and rows that do not count take part in
                   the tiles' products, because the host does not know which they are and does not wait to learn it.

    Extra memory is O(N) besides. Products are in the inputs' dtype, under ``torch.autocast`` in its; 16-bit ones on a
    CPU without instructions for them are made in float32, the weight being converted block by block.
    """
    dtype = check_head(hidden, weight, bias)
    check_low_rank(low_rank, hidden, weight)
    tokens, low_rank, left = prepared_hidden(hidden, low_rank, bias, temperature, config, cu_seqlens)
    batch = check_batch(
        tokens,
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
        truncated_mask=truncated_mask,
        temperature=left,
        num_items=num_items,
        num_sequences=num_sequences,
        entropy_threshold=entropy_threshold,
    )
    return loss_of_hidden(tokens.values, weight, bias, batch, dtype, low_rank, memory_budget)


def loss_of_hidden(
    hidden: Tensor,  # (B, T, D) or (N, D)
    weight: Tensor,
    bias: Tensor | None,
    batch: Batch,
    dtype: torch.dtype,
    low_rank: LowRank | None,
    memory_budget: int | None,
) -> GRPOLossOutput:
    """Return the loss of a checked batch from its hidden states, in as few sweeps as its options need."""
    wanted = [wants_gradient(t) for t in (hidden, weight, bias)]
    products, budget = product_dtype(dtype, weight.device), check_memory_budget(memory_budget)
    keep_tile = selects_rows(weight) and batch.mask.numel() <= rows_per_tile(weight, products, budget)
    # The products of a kept tile are taken in the backward pass.
    rounded = (products,) if keep_tile else (products, hidden.dtype, weight.dtype)
    takes_one_sweep = not (batch.needs_statistics_first() or waits_for_loss_gradient(*rounded))
    if batch.advantages is None or not takes_one_sweep or not any(wanted) or low_rank is not None:
        options = batch.transform()._asdict() | {"low_rank": low_rank, "memory_budget": memory_budget}
        stats = linear_token_stats(hidden, weight, batch.targets, bias, **options)
        return loss_of_stats(stats, batch)
    terms, rule = batch.terms(batch.advantages, None).flatten(), LossRule.of(batch.config)
    inputs = (hidden.flatten(0, -2), weight, bias, batch.targets.flatten())
    records = (batch.transform().pack(), terms.pack(), rule.pack())
    loss, metrics, logprobs, entropy, *_ = linear_grpo_loss_op(*inputs, wanted, keep_tile, dtype, budget, *records)
    return output_of(loss, metrics, logprobs, entropy, batch.advantages, batch)
