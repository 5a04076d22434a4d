"""GRPO and EDGE-GRPO losses from logits, in one sweep where that is possible: the op, autograd, the public function.

The options and totals of a batch are batch.py's; from hidden states: linear_grpo_loss.py.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from edge_kernels._checks import check_float, check_targets_in_range
from edge_kernels.backend import kernels
from edge_kernels.backends.rows import with_unit_stride
from edge_kernels.config import GRPOLossConfig
from edge_kernels.contract import METRICS, LossRule, TokenTerms, Transform, new_stats
from edge_kernels.ops.autograd import hand_out, keep_gradients, waits_for_loss_gradient, wants_gradient
from edge_kernels.ops.batch import Batch, Total, loss_of_stats, output_of
from edge_kernels.ops.batch_checks import check_batch, temperature_of_rows
from edge_kernels.ops.memory import fresh
from edge_kernels.ops.temperatures import grpo_sweep
from edge_kernels.ops.token_stats import check_writable_rows, inplace_token_stats, token_stats
from edge_kernels.sequences import tokens_of
from edge_kernels.types import GRPOLossOutput

# --- op and autograd --------------------------------------------------------------------------------------------------


def _sweep(
    logits: Tensor,  # (B, T, V) or (N, V), and so on
    targets: Tensor,  # (B, T)
    transform: Transform,
    terms: TokenTerms,
    rule: LossRule,
    out: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Write the gradient of the logits into ``out`` (may be the logits); return loss, metrics, logprobs and entropy.

    One read, one write, for rules under which a token's derivatives depend on its own statistics alone.
    """
    check_targets_in_range(targets, logits.shape[-1], transform.ignore_index)
    backend = kernels(logits)
    logprobs, entropy = grpo_sweep(backend, logits, targets, terms, rule, transform, out=out)
    total = backend.token_loss(logprobs, entropy, terms, rule)
    return total.loss, total.metrics, logprobs, entropy


@torch.library.custom_op("edge_kernels::grpo_loss", mutates_args=())
def grpo_loss_op(
    logits: Tensor, targets: Tensor, transform: Tensor, terms: list[Tensor | None], rule: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return loss, metrics, logprobs, entropy and the gradient of the logits, from one sweep over them."""
    out = fresh(logits.shape, logits)
    records = (Transform.unpack(transform), TokenTerms.unpack(terms), LossRule.unpack(rule))
    loss, metrics, logprobs, entropy = _sweep(with_unit_stride(logits), targets, *records, out=out)
    return loss, metrics, logprobs, entropy, out


@grpo_loss_op.register_fake
def _(logits: Tensor, targets: Tensor, *_: Any) -> tuple[Tensor, ...]:
    logprobs, entropy = new_stats(logits), new_stats(logits)
    gradient = logits.new_empty(logits.shape)
    return logprobs.new_empty(()), logprobs.new_empty(len(METRICS)), logprobs, entropy, gradient


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    keep_gradients(ctx, output[4:], (True,), inputs)
    ctx.mark_non_differentiable(*output[1:])


grpo_loss_op.register_autograd(hand_out, setup_context=_setup_context)


class _InplaceLoss(torch.autograd.Function):
    """``grpo_loss_op`` with the gradient written over the logits, in the forward pass.

    The version counter is raised by hand, as autograd does not see that write: a function that saved these logits for
    its backward pass gets autograd's "modified by an inplace operation" instead of a wrong gradient.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, targets: Tensor, transform: Transform, terms: TokenTerms, rule: LossRule
    ) -> tuple[Tensor, ...]:
        out = logits.detach()
        results = _sweep(out, targets, transform, terms, rule, out=out)
        torch.autograd.graph.increment_version(logits)
        keep_gradients(ctx, (logits,), (True,), (logits, targets, transform, terms, rule))
        ctx.mark_non_differentiable(*results[1:])
        return results

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        gradient, *none = hand_out(ctx, *grads)
        return None if gradient is None else gradient.detach(), *none


# --- public -----------------------------------------------------------------------------------------------------------


def edge_grpo_loss(
    logits: Tensor,
    targets: Tensor,
    completion_mask: Tensor,
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
    inplace: bool = False,
) -> GRPOLossOutput:
    """Return ``GRPOLossOutput(loss, logprobs, entropy, advantages, metrics)`` of completions, from their logits.

    With A the advantage and r = exp(logprob - old_logprob), or the geometric mean of a response's r under
    ``importance_sampling_level="sequence"`` (GSPO, and meant for luspo), token t of response i has the loss::

        -min(min(r, delta) A, clamp(r, 1 - epsilon_low, 1 + epsilon_high) A)     grpo, bnpo, dr_grpo, dapo, luspo
        -min(r, epsilon_high).detach() A logprob                                         cispo
        -4 / t A sigmoid(t (r - 1)), t = sapo_temperature_pos or _neg                    sapo
        -A exp(mean over the response of log r, at most epsilon_high where A > 0,
               at least -epsilon_low where A < 0)                                        geo_mean (GMPO)
        -A logprob (w^k exp(lambda (1 - w))).detach(), w the product of the response's r vespo
        + beta * (exp(d) - d - 1),  d = ref_logprob - logprob                            where beta > 0

    and the batch has, with w the totals below::

        grpo sapo geo_mean    sum_i mean_t loss / num_sequences
        luspo                 sum loss / num_sequences
        dr_grpo               sum loss / (num_sequences * max_completion_length)
        bnpo dapo cispo vespo sum loss / num_items
        - entropy_coef * sum entropy / num_items                                         where entropy_coef != 0

    ``edge_kernels.reference.edge_grpo_loss`` is the same in plain PyTorch; on the same tensors TRL 1.16's
    ``GRPOTrainer._compute_loss`` agrees in value and gradient, and for geo_mean verl 0.9's ``core_algos``.

    logits             (B, T, V), or with ``cu_seqlens`` (N, V) or (1, N, V): float32, bfloat16, float16 or float64:
                       those that predict ``targets``. The only input that receives a gradient.
    targets            (B, T), int64, in [0, V) where the mask holds; any number elsewhere.
    completion_mask    (B, T), bool: tokens that count. Rows outside are not read and get gradient 0.
    advantages         (B,) or (B, T), floating point. Exactly one of advantages and rewards must be given. NaN and
                       infinity, where the mask holds, are refused on a CPU; on a GPU, whose values are not waited for,
                       and in compiled code, they make the loss and the gradient of their rows NaN or infinite. The
                       same goes for rewards.
    rewards            (B,), floating point, with ``group_ids`` (B,), int64: entropy-driven advantages are formed here
                       (arXiv:2507.21848, eqs. 3, 6, 7; ``config.eda``); every group must be whole in this batch. With
                       ``reward_kl_coef`` they are lessened first, as ``kl_penalized_rewards`` does.
    old_logprobs       (B, T): of the policy that the ratio refers to; None for the current one, detached (the ratio is
                       1, its gradient is not 0). NaN marks a token without a record: it has ratio 1 to its present
                       value, and takes no part in a sequence-level ratio.
    ref_logprobs       (B, T): of the reference policy; needed where beta > 0, else only measured.
    sampling_logprobs  (B, T): what the sampler reported; needed where ``sampler_ratio_cap`` is set. The policy term is
                       then multiplied by exp(old - sampling), truncated or masked. NaN marks an unknown one: factor 1.
    injected_mask      (B, T), bool: tokens that the policy did not sample, treated as ``config.injected`` says. Under
                       "mask" they leave everything, denominators and entropy-driven weights included. Under "sft" their
                       policy term, sampler correction and quantile mask included, is -sft_weight * logprob; under
                       "shaped" p / (p + shaped_gamma) replaces the clipped ratio. KL penalty and entropy bonus stay.
    truncated_mask     (B,), bool: responses that the length limit cut off. Under ``mask_truncated_completions`` (needed
                       then) their tokens leave everything, ``num_items`` included; they still count as sequences.
    temperature        (B,), floating point, > 0: one for each response, in place of ``config.temperature``, as in verl;
                       logprobs, entropy and gradient are those at it. A GPU waits for it unless it is on the CPU. The
                       kernels run once for each stretch of responses of one temperature.
    num_items, num_sequences  totals, numbers or scalar tensors, over everything whose losses are summed, ranks and
                       micro-batches; this batch's own by default. With them the losses add up to the big batch's.
                       ``num_items`` counts the tokens that have a loss.
    entropy_threshold  nats: replaces the quantile of this batch where ``top_entropy_quantile`` < 1. A bonus with
                       ``num_items`` then counts the tokens above the quantile from ``num_items``, without ties.
    cu_seqlens         (B + 1,), int32 or int64: the tokens are packed, one response after the other without padding,
                       response i from cu_seqlens[i] to cu_seqlens[i + 1] (its prompt may be among them, masked), as
                       FlashAttention and transformers' ``DataCollatorWithFlattening`` have them. Every (B, T) here is
                       then (N,) or (1, N), every (B,) stays. ``cumulative_lengths(position_ids)`` makes them; on a GPU
                       they are taken as they are. Ratios of whole sequences are then made by PyTorch on (N,).
    inplace            True: the gradient is written over the logits instead of into a new tensor. Regard
                       the logits as undefined from this call on. Their version counter is raised, so that another
                       function that saved them for its backward pass raises autograd's "modified by an inplace
                       operation" instead of using a gradient for logits. Rows must not overlap, and their elements must
                       be adjacent. Under ``torch.compile``, which plans buffers itself, it has no effect.

    One sweep where a token's coefficient is known once its own statistics are: each row is read once, and its gradient
    written while it is in cache, in the forward pass; the backward pass scales and returns it once. Two sweeps,
    statistics and then the gradient, where ``linear_edge_grpo_loss`` takes two, and for float16, whose gradient cannot
    be rounded before a gradient scaler's factor is known.

    Returns a scalar loss, float32 (float64 for float64 logits), and detached logprobs and entropy in nats, (B, T), 0
    outside the mask; ``metrics``: see ``GRPOLossOutput``. A batch in which nothing counts has loss 0 and gradient 0. A
    NaN in a row that counts gives a NaN loss. Differentiable once. Raises TypeError or ValueError for wrong dtypes,
    shapes, targets and missing arguments.
    """
    check_float("logits", logits, least_dims=1 if cu_seqlens is not None else 3)
    tokens = tokens_of("logits", logits, cu_seqlens, feature="V")
    batch = check_batch(
        tokens,
        logits.dtype,
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
        temperature=None if temperature is None else temperature_of_rows(temperature, tokens.sequences),
        num_items=num_items,
        num_sequences=num_sequences,
        entropy_threshold=entropy_threshold,
    )
    return loss_of_logits(tokens.values, batch, inplace=inplace)


def loss_of_logits(logits: Tensor, batch: Batch, *, inplace: bool) -> GRPOLossOutput:
    """Return the loss of a checked batch from its logits, (B, T, V) or (N, V), in as few sweeps as its options need."""
    takes_one_sweep = not (batch.needs_statistics_first() or waits_for_loss_gradient(logits.dtype))
    if batch.advantages is not None and takes_one_sweep and wants_gradient(logits):
        terms, rule = batch.terms(batch.advantages, None), LossRule.of(batch.config)
        if inplace and not torch.compiler.is_compiling():
            check_writable_rows(logits)
            transform = Transform.unpack(batch.transform().pack())
            results = _InplaceLoss.apply(logits, batch.targets, transform, terms, rule)
        else:
            results = grpo_loss_op(logits, batch.targets, batch.transform().pack(), terms.pack(), rule.pack())
        loss, metrics, logprobs, entropy, *_ = results
        return output_of(loss, metrics, logprobs, entropy, batch.advantages, batch)
    if inplace:
        stats = inplace_token_stats(logits, batch.targets, batch.transform())
    else:
        stats = token_stats(logits, batch.targets, **batch.transform()._asdict())
    return loss_of_stats(stats, batch)
