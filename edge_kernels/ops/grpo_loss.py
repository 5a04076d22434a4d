"""GRPO and EDGE-GRPO losses: options and totals of a batch, and the loss from logits.

The loss of a token is token_loss.py's, its statistics are token_stats.py's; from hidden states: linear_grpo_loss.py.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from edge_kernels._checks import IGNORE_INDEX, check_float, check_like, check_targets_in_range, describe, stats_dtype
from edge_kernels.advantages import entropy_driven_advantages
from edge_kernels.backend import kernels, unavailable
from edge_kernels.backends.rows import with_unit_stride
from edge_kernels.config import GRPOLossConfig
from edge_kernels.memory import fresh
from edge_kernels.ops.token_loss import METRICS, LossRule, TokenTerms, run_token_loss, sampler_correction, token_loss_op
from edge_kernels.ops.token_stats import (
    Transform,
    check_writable_rows,
    inplace_token_stats,
    refuse_second_derivative,
    token_stats,
)
from edge_kernels.reference import tokens_above_quantile
from edge_kernels.types import GRPOLossOutput, TokenStats

# --- a batch and its options ------------------------------------------------------------------------------------------

Total = Tensor | float | None


class Batch(NamedTuple):
    """Checked arguments, in the statistics' dtype; ``mask`` is where a loss is taken."""

    config: GRPOLossConfig
    dtype: torch.dtype
    targets: Tensor  # (B, T), ignore_index outside the mask
    mask: Tensor  # (B, T)
    advantages: Tensor | None  # (B,) or (B, T)
    rewards: Tensor | None  # (B,)
    group_ids: Tensor | None  # (B,)
    old_logprobs: Tensor | None  # (B, T), as the following four
    ref_logprobs: Tensor | None
    sampler_ratio: Tensor | None
    sampling_logprobs: Tensor | None
    injected: Tensor | None
    num_items: Total
    num_sequences: Total
    entropy_threshold: Tensor | None

    @property
    def transform(self) -> Transform:
        config = self.config
        softcap = None if config.softcap is None else float(config.softcap)
        return Transform(float(config.temperature), softcap, float(config.logit_scale), IGNORE_INDEX)

    @property
    def needs_statistics_first(self) -> bool:
        """Whether some token's coefficient depends on other tokens' statistics, so that one sweep cannot do."""
        config = self.config
        counts_high_entropy = config.top_entropy_quantile < 1 and config.entropy_coef != 0 and self.num_items is None
        return (
            self.advantages is None
            or config.importance_sampling_level == "sequence"
            or (config.top_entropy_quantile < 1 and self.entropy_threshold is None)
            or counts_high_entropy
            or (self.sampling_logprobs is not None and config.sampler_ratio_mode.startswith("sequence"))
        )

    def terms(self, advantages: Tensor, stats: TokenStats | None) -> TokenTerms:
        """Return what each token's loss depends on; with ``stats``, also what whole-batch statistics decide."""
        config, mask = self.config, self.mask
        advantages = advantages.to(self.dtype)
        threshold, bonus_weight = self.entropy_threshold, None
        if config.top_entropy_quantile < 1 and threshold is None and stats is not None:
            threshold = _entropy_threshold(stats.entropy.detach(), mask, config.top_entropy_quantile)
        if config.entropy_coef != 0:
            if self.num_items is not None:
                acting_items = tokens_above_quantile(self.num_items, config.top_entropy_quantile)
            elif threshold is None or stats is None:
                acting_items = mask.sum()
            else:
                acting_items = (mask & ~(stats.entropy.detach() < threshold)).sum()
            acting_items = _scalar(acting_items, self.dtype, mask.device)
            bonus_weight = config.entropy_coef / acting_items.clamp(min=1)
        return TokenTerms(
            mask=mask,
            weight=_loss_weight(mask, config, self.num_items, self.num_sequences, self.dtype),
            advantages=(advantages[:, None] if advantages.dim() == 1 else advantages).expand(mask.shape),
            old_logprobs=self.old_logprobs,
            ref_logprobs=self.ref_logprobs,
            sampler_ratio=self.sampler_ratio,
            sampling_logprobs=self.sampling_logprobs,
            injected=self.injected,
            entropy_threshold=threshold,
            bonus_weight=bonus_weight,
        )


def _scalar(value: Tensor | float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return a scalar on the device; a number is filled in there, since copying it would wait for the device."""
    if isinstance(value, Tensor):
        return value.to(device=device, dtype=dtype)
    return torch.full((), value, dtype=dtype, device=device)


def _at_least_one(total: Tensor | float) -> Tensor | float:
    return total.clamp(min=1) if isinstance(total, Tensor) else max(total, 1)


def _loss_weight(
    mask: Tensor, config: GRPOLossConfig, num_items: Total, num_sequences: Total, dtype: torch.dtype
) -> Tensor:
    """Return what each token's loss is multiplied by before it is summed, (B, T)."""
    sequences = _at_least_one(mask.shape[0] if num_sequences is None else num_sequences)
    items = _at_least_one(mask.sum() if num_items is None else num_items)
    weight = mask.to(dtype)
    if config.loss_type == "grpo":
        return weight / mask.sum(-1, keepdim=True).clamp(min=1) / sequences
    if config.loss_type == "dr_grpo" and config.max_completion_length is not None:  # the configuration sees to it
        return weight / config.max_completion_length / sequences
    return weight / items


def _entropy_threshold(entropy: Tensor, mask: Tensor, share: float) -> Tensor:
    """Return the (1 - share) quantile of the masked tokens' entropy, a scalar."""
    if entropy.numel() == 0:
        return entropy.new_zeros(())
    return entropy.masked_fill(~mask, float("nan")).flatten().nanquantile(1 - share)


def check_batch(
    like: Tensor,  # logits or hidden states: the batch's shape and device
    dtype: torch.dtype,
    targets: Tensor,
    completion_mask: Tensor,
    config: GRPOLossConfig | None,
    *,
    advantages: Tensor | None,
    rewards: Tensor | None,
    group_ids: Tensor | None,
    old_logprobs: Tensor | None,
    ref_logprobs: Tensor | None,
    sampling_logprobs: Tensor | None,
    injected_mask: Tensor | None,
    num_items: Total,
    num_sequences: Total,
    entropy_threshold: Total,
) -> Batch:
    if config is not None and not isinstance(config, GRPOLossConfig):
        raise TypeError(f"config must be a GRPOLossConfig; got {type(config).__name__}")
    config = config or GRPOLossConfig()
    B, T = like.shape[0], like.shape[1]
    tokens, sequences = {"(B, T)": (B, T)}, {"(B,)": (B,)}
    remedy = "pass the mask that batching returned"
    check_like("targets", targets, tokens, "int64", like, remedy="pass one token id per position of the completion")
    check_like("completion_mask", completion_mask, tokens, "bool", like, remedy=remedy)

    if (advantages is None) == (rewards is None):
        raise ValueError(
            f"exactly one of advantages and rewards must be given; got {'neither' if rewards is None else 'both'}; "
            "pass advantages, or rewards with group_ids for entropy-driven advantages"
        )
    if advantages is not None:
        remedy = "pass one advantage per response or per token"
        check_like("advantages", advantages, {**sequences, **tokens}, "floating point", like, remedy=remedy)
        if group_ids is not None:
            raise ValueError("group_ids belongs to rewards; got it with advantages; leave it out")
    else:
        check_like("rewards", rewards, sequences, "floating point", like, remedy="pass one reward per response")
        remedy = "pass one group number per response; responses to the same prompt share it"
        check_like("group_ids", group_ids, sequences, "int64", like, remedy=remedy)
    per_token = {"old_logprobs": old_logprobs, "ref_logprobs": ref_logprobs, "sampling_logprobs": sampling_logprobs}
    for name, value in per_token.items():
        if value is not None:
            check_like(name, value, tokens, "floating point", like, remedy="pass one log-probability per token")
            per_token[name] = value.detach().to(stats_dtype(dtype))
    if injected_mask is not None:
        remedy = "pass the mask of tokens that the policy did not sample"
        check_like("injected_mask", injected_mask, tokens, "bool", like, remedy=remedy)
    if config.beta > 0 and ref_logprobs is None:
        raise ValueError(
            f"beta = {config.beta} needs ref_logprobs; got None; score the reference policy, or set beta=0"
        )
    if config.sampler_ratio_cap is not None and sampling_logprobs is None:
        raise ValueError(
            f"sampler_ratio_cap = {config.sampler_ratio_cap} needs sampling_logprobs; got None; "
            "pass the sampler's log-probabilities, or set sampler_ratio_cap=None"
        )
    if isinstance(entropy_threshold, Tensor) and entropy_threshold.dim():
        raise ValueError(f"entropy_threshold must be a number or a scalar tensor; got {describe(entropy_threshold)}")

    mask = completion_mask
    if config.injected == "mask" and injected_mask is not None:
        mask = mask & ~injected_mask
    old, sampling = per_token["old_logprobs"], per_token["sampling_logprobs"]
    sampler_ratio = None
    if config.sampler_ratio_cap is None:
        sampling = None
    elif old is not None and sampling is not None:
        sampler_ratio = sampler_correction(old, sampling, mask, LossRule.of(config))
        sampling = None
    if entropy_threshold is not None:
        entropy_threshold = _scalar(entropy_threshold, stats_dtype(dtype), like.device).detach()
    return Batch(
        config=config,
        dtype=stats_dtype(dtype),
        targets=targets.masked_fill(~mask, IGNORE_INDEX),
        mask=mask,
        advantages=None if advantages is None else advantages.detach(),
        rewards=rewards,
        group_ids=group_ids,
        old_logprobs=old,
        ref_logprobs=per_token["ref_logprobs"],
        sampler_ratio=sampler_ratio,
        sampling_logprobs=sampling,
        injected=injected_mask if config.injected in ("sft", "shaped") else None,
        num_items=num_items,
        num_sequences=num_sequences,
        entropy_threshold=entropy_threshold if config.top_entropy_quantile < 1 else None,
    )


# --- sweeps -----------------------------------------------------------------------------------------------------------


def loss_of_stats(stats: TokenStats, batch: Batch) -> GRPOLossOutput:
    """Return the loss from statistics that carry a gradient: the second half of two sweeps."""
    advantages = batch.advantages
    if advantages is None:
        assert batch.rewards is not None
        assert batch.group_ids is not None
        rewards = batch.rewards.to(batch.dtype)
        advantages = entropy_driven_advantages(rewards, stats.entropy, batch.mask, batch.group_ids, batch.config.eda)
    terms, rule = batch.terms(advantages, stats), LossRule.of(batch.config)
    loss, metrics, _, _ = token_loss_op(stats.logprobs, stats.entropy, *terms, *rule)
    return output_of(loss, metrics, stats.logprobs, stats.entropy, advantages, batch)


def output_of(
    loss: Tensor, metrics: Tensor, logprobs: Tensor, entropy: Tensor, advantages: Tensor, batch: Batch
) -> GRPOLossOutput:
    named = dict(zip(METRICS, metrics.unbind(), strict=True))
    if batch.ref_logprobs is None:
        del named["kl_sum"]
    if batch.config.sampler_ratio_cap is None:
        del named["sampler_ratio_sum"], named["sampler_ratio_max"]
    return GRPOLossOutput(loss, logprobs.detach(), entropy.detach(), advantages, named)


def run_sweep(
    logits: Tensor,  # (B, T, V)
    targets: Tensor,  # (B, T)
    terms: TokenTerms,
    rule: LossRule,
    transform: Transform,
    *,
    out: Tensor,
) -> tuple[Tensor, Tensor]:
    """Write the loss's gradient into ``out`` (may be the logits) and return logprobs and entropy: one read, one write.

    For rules under which a token's derivatives depend on its own statistics alone.
    """
    return kernels(logits).grpo_sweep(logits, targets, terms, rule, transform, out=out)


@torch.library.custom_op("edge_kernels::grpo_loss", mutates_args=())
def grpo_loss_op(
    logits: Tensor,
    targets: Tensor,
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return loss, metrics, logprobs, entropy and the gradient of the logits, from one sweep over them."""
    check_targets_in_range(targets, logits.shape[-1], ignore_index)
    recorded = (old_logprobs, ref_logprobs, sampler_ratio, sampling_logprobs)
    terms = TokenTerms(mask, loss_weight, advantages, *recorded, injected, entropy_threshold, bonus_weight)
    clip = (loss_type, level, epsilon_low, epsilon_high, delta, beta)
    rule = LossRule(*clip, sampler_cap, sampler_floor, sampler_mode, injected_treatment, sft_weight, shaped_gamma)
    out = fresh(logits.shape, logits)
    transform = Transform(temperature, softcap, logit_scale, ignore_index)
    logprobs, entropy = run_sweep(with_unit_stride(logits), targets, terms, rule, transform, out=out)
    loss, metrics, _, _ = run_token_loss(logprobs, entropy, terms, rule)
    return loss, metrics, logprobs, entropy, out


@grpo_loss_op.register_fake
def _(logits: Tensor, targets: Tensor, *_: Any) -> tuple[Tensor, ...]:
    logprobs, entropy = (torch.empty_like(targets, dtype=stats_dtype(logits.dtype)) for _ in range(2))
    gradient = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    return logprobs.new_empty(()), logprobs.new_empty(len(METRICS)), logprobs, entropy, gradient


def keep_gradients(ctx: Any, gradients: tuple[Tensor, ...], wanted: tuple[bool, ...], num_inputs: int) -> None:
    ctx.save_for_backward(*gradients)
    ctx.set_materialize_grads(False)
    ctx.wanted = wanted
    ctx.num_inputs = num_inputs
    ctx.is_spent = False


def hand_out(ctx: Any, grad_loss: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    """Return the gradients of the first inputs, made in the forward pass, times the loss's own."""
    if grad_loss is None:
        return (None,) * ctx.num_inputs
    if torch.is_grad_enabled():
        refuse_second_derivative()
    if ctx.is_spent:
        raise RuntimeError(
            "this loss makes its gradient in the forward pass and hands it out once; "
            "call it again for a second backward pass, or combine the losses before calling backward"
        )
    ctx.is_spent = True
    gradients = zip(ctx.saved_tensors, ctx.wanted, strict=True)
    scaled = (_scaled(gradient, grad_loss) if want else None for gradient, want in gradients)
    return *scaled, *(None,) * (ctx.num_inputs - len(ctx.wanted))


def is_one(factor: Tensor) -> bool:
    """Whether a scalar is known to be 1: where asking costs nothing, which on a GPU it would."""
    return factor.device.type == "cpu" and float(factor) == 1


def _scaled(gradient: Tensor, factor: Tensor) -> Tensor:
    """Return ``gradient * factor``, scaled where it lies: another V x D, or N x V, would otherwise be allocated."""
    if type(gradient) is not Tensor:  # a tracer's tensors cannot be written
        return gradient * factor.to(gradient.dtype)
    if is_one(factor):
        return gradient
    if gradient.is_cuda and gradient.dtype != torch.float64 and gradient.is_contiguous() and not unavailable("triton"):
        from edge_kernels.backends.triton.scale import scale_

        return scale_(gradient, factor)
    return gradient.mul_(factor)


def _setup_logits(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    keep_gradients(ctx, output[4:], (True,), len(inputs))
    ctx.mark_non_differentiable(*output[1:])


class _InplaceLoss(torch.autograd.Function):
    """``grpo_loss_op`` with the gradient written over the logits, in the forward pass.

    The version counter is raised by hand, as autograd does not see that write: whoever saved these logits for a
    backward pass gets autograd's "modified by an inplace operation" instead of a wrong gradient.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, *options: Any) -> tuple[Tensor, ...]:
        transform, terms, rule = _unpack(options)
        check_targets_in_range(targets, logits.shape[-1], transform.ignore_index)
        out = logits.detach()
        logprobs, entropy = run_sweep(out, targets, terms, rule, transform, out=out)
        torch.autograd.graph.increment_version(logits)
        loss, metrics, _, _ = run_token_loss(logprobs, entropy, terms, rule)
        keep_gradients(ctx, (logits,), (True,), 2 + len(options))
        ctx.mark_non_differentiable(metrics, logprobs, entropy)
        return loss, metrics, logprobs, entropy

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        gradient, *none = hand_out(ctx, *grads)
        return None if gradient is None else gradient.detach(), *none


def _unpack(options: tuple[Any, ...]) -> tuple[Transform, TokenTerms, LossRule]:
    """Return the trailing arguments of ``grpo_loss_op`` as what they were made from."""
    first, second = len(Transform._fields), len(Transform._fields) + len(TokenTerms._fields)
    return Transform(*options[:first]), TokenTerms(*options[first:second]), LossRule(*options[second:])


grpo_loss_op.register_autograd(hand_out, setup_context=_setup_logits)


def wants_gradient(tensor: Tensor | None) -> bool:
    return torch.is_grad_enabled() and tensor is not None and tensor.requires_grad


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
    num_items: Total = None,
    num_sequences: Total = None,
    entropy_threshold: Total = None,
    config: GRPOLossConfig | None = None,
    inplace: bool = False,
) -> GRPOLossOutput:
    """Return ``GRPOLossOutput(loss, logprobs, entropy, advantages, metrics)`` of completions, from their logits.

    With r = exp(logprob - old_logprob) and A the advantage, token t of response i has the loss::

        -min(min(r, delta) A, clamp(r, 1 - epsilon_low, 1 + epsilon_high) A)            grpo, bnpo, dr_grpo, dapo
        -min(r, epsilon_high).detach() A logprob                                         cispo
        + beta * (exp(d) - d - 1),  d = ref_logprob - logprob                            where beta > 0

    and the batch has, with w the totals below::

        grpo            sum_i mean_t loss / num_sequences
        dr_grpo         sum loss / (num_sequences * max_completion_length)
        bnpo dapo cispo sum loss / num_items
        - entropy_coef * sum entropy / num_items                                         where entropy_coef != 0

    ``edge_kernels.reference.edge_grpo_loss`` is the same in plain PyTorch; on the same tensors TRL 1.16's
    ``GRPOTrainer._compute_loss`` agrees in value and gradient.

    logits             (B, T, V): float32, bfloat16, float16 or float64: those that predict ``targets``. The only input
                       that receives a gradient.
    targets            (B, T), int64, in [0, V) where the mask holds; any number elsewhere.
    completion_mask    (B, T), bool: tokens that count. Rows outside are not read and get gradient 0.
    advantages         (B,) or (B, T), floating point. Exactly one of advantages and rewards must be given.
    rewards            (B,), floating point, with ``group_ids`` (B,), int64: entropy-driven advantages are formed here
                       (arXiv:2507.21848, eqs. 3, 6, 7; ``config.eda``); every group must be whole in this batch.
    old_logprobs       (B, T): of the policy that the ratio refers to; None for the current one, detached (the ratio is
                       1, its gradient is not 0). NaN marks a token without a record: it has ratio 1 to its present
                       value, and takes no part in a sequence-level ratio.
    ref_logprobs       (B, T): of the reference policy; needed where beta > 0, else only measured.
    sampling_logprobs  (B, T): what the sampler reported; needed where ``sampler_ratio_cap`` is set. The policy term is
                       then multiplied by exp(old - sampling), truncated or masked. NaN marks an unknown one: factor 1.
    injected_mask      (B, T), bool: tokens that the policy did not sample, treated as ``config.injected`` says. Under
                       "mask" they leave everything, denominators and entropy-driven weights included. Under "sft" their
                       policy term, sampler correction and quantile mask included, is -sft_weight * logprob; under
                       "shaped" p / (p + shaped_gamma) stands for the clipped ratio. KL penalty and entropy bonus stay.
    num_items, num_sequences  totals, numbers or scalar tensors, over everything whose losses are summed, ranks and
                       micro-batches; this batch's own by default. With them the losses add up to the big batch's.
                       ``num_items`` counts the tokens that have a loss.
    entropy_threshold  nats: replaces the quantile of this batch where ``top_entropy_quantile`` < 1. A bonus with
                       ``num_items`` then counts the tokens above the quantile from ``num_items``, without ties.
    inplace            True: the gradient is written over the logits instead of into a new tensor. Regard
                       the logits as undefined from this call on. Their version counter is raised, so that another
                       function that saved them for its backward pass raises autograd's "modified by an inplace
                       operation" instead of using a gradient for logits. Rows must not overlap, and their elements must
                       be adjacent. Under ``torch.compile``, which plans buffers itself, it has no effect.

    One sweep where a token's coefficient is known once its own statistics are: each row is read once, and its gradient
    written while it is in cache, in the forward pass; the backward pass scales it and hands it out once. Two sweeps,
    statistics and then the gradient, where ``linear_edge_grpo_loss`` takes two.

    Returns a scalar loss, float32 (float64 for float64 logits), and detached logprobs and entropy in nats, (B, T), 0
    outside the mask; ``metrics``: see ``GRPOLossOutput``. A batch in which nothing counts has loss 0 and gradient 0. A
    NaN in a row that counts gives a NaN loss. Differentiable once. Raises TypeError or ValueError for wrong dtypes,
    shapes, targets and missing arguments.
    """
    check_float("logits", logits, least_dims=3)
    if logits.dim() != 3:
        raise ValueError(f"logits must have shape (B, T, V); got {describe(logits)}; add the dimension of sequences")
    batch = check_batch(
        logits,
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
        num_items=num_items,
        num_sequences=num_sequences,
        entropy_threshold=entropy_threshold,
    )
    if batch.advantages is not None and not batch.needs_statistics_first and wants_gradient(logits):
        is_inplace = inplace and not torch.compiler.is_compiling()
        if is_inplace:
            check_writable_rows(logits)
        loss, metrics, logprobs, entropy, *_ = (_InplaceLoss.apply if is_inplace else grpo_loss_op)(
            logits,
            batch.targets,
            *batch.transform,
            *batch.terms(batch.advantages, None),
            *LossRule.of(batch.config),
        )
        return output_of(loss, metrics, logprobs, entropy, batch.advantages, batch)
    if inplace:
        stats = inplace_token_stats(logits, batch.targets, batch.transform)
    else:
        stats = token_stats(logits, batch.targets, **batch.transform._asdict())
    return loss_of_stats(stats, batch)
