"""The specification: every op in plain, differentiable PyTorch, for reading and for testing against. Any device.

No kernel, no chunking and no care for memory lives here; the only subtleties are the ones a user could see: a logit of
-inf contributes nothing to a value or a gradient, a row with NaN or +inf gives NaN, an ignored row gives 0.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from edge_kernels._checks import IGNORE_INDEX, stats_dtype
from edge_kernels.config import EDAConfig, GRPOLossConfig, ScaleRewards, scale_of
from edge_kernels.sequences import gamma_weight, geometric_mean, is_on_policy, kl_estimate
from edge_kernels.types import GRPOLossOutput, TokenStats

SCALE_EPSILON = 1e-4  # what GRPO adds to a group's standard deviation
MAX_LOG_RATIO = 80.0  # exp of it is finite in float32, so that a clipped or zero-advantage token stays finite
MAX_KL_LOG_RATIO = 10.0  # beyond it the KL estimate is continued linearly: one drifted token cannot fill a gradient


def transform_logits(logits: Tensor, temperature: float | Tensor, softcap: float | None, logit_scale: float) -> Tensor:
    """Return z = f(x) / temperature, where f scales by ``logit_scale`` and then caps softly: c * tanh(x / c)."""
    if isinstance(temperature, Tensor):  # one for each entry of the first dimension
        temperature = temperature.to(logits.device).view(-1, *[1] * (logits.dim() - 1))
    z = logits.to(stats_dtype(logits.dtype)) * logit_scale
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    return z / temperature


def token_stats(
    logits: Tensor,  # (..., V)
    targets: Tensor | None,  # (...), int64; None: entropy and logsumexp only, logprobs are 0
    *,
    temperature: float | Tensor = 1.0,  # a number, or one for each entry of the first dimension
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = IGNORE_INDEX,
) -> TokenStats:
    """Return log-probability of the target, entropy and logsumexp of each row; see ``edge_kernels.token_stats``."""
    ignored = torch.zeros(logits.shape[:-1], dtype=torch.bool, device=logits.device)
    if targets is not None:
        ignored = targets == ignore_index
    # An ignored row is replaced before anything is computed, or 0 * NaN would reach its gradient.
    z = transform_logits(logits.masked_fill(ignored[..., None], 0), temperature, softcap, logit_scale)
    maximum = z.amax(-1, keepdim=True).detach()
    shifted = z - maximum
    exponentials = shifted.exp()
    s = exponentials.sum(-1)
    # p log p is 0 where p is 0; the mask is applied before the product, so that the gradient there is 0 too, not NaN.
    t = (exponentials * shifted.masked_fill(exponentials == 0, 0)).sum(-1)
    log_s = s.log()
    logprobs = torch.zeros_like(log_s)
    if targets is not None:
        logprobs = shifted.gather(-1, targets.masked_fill(ignored, 0)[..., None])[..., 0] - log_s
    stats = (logprobs, log_s - t / s, maximum[..., 0] + log_s)
    return TokenStats(*(value.masked_fill(ignored, 0) for value in stats))


def token_stats_backward(
    logits: Tensor,  # (..., V)
    targets: Tensor | None,  # (...)
    grad_logprobs: Tensor | None,  # (...)
    grad_entropy: Tensor | None,  # (...)
    grad_logsumexp: Tensor | None,  # (...)
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = IGNORE_INDEX,
    of_row: tuple[Tensor, Tensor, Tensor] | None = None,  # (...) each
) -> Tensor:
    """Return the gradient of the logits, in their dtype, by the closed formulas that every kernel implements.

    d logprob_y / d z_j = 1[j = y] - p_j;  d H / d z_j = -p_j (log p_j + H);  d logsumexp / d z_j = p_j. A row that is
    ignored, or whose gradients are all 0, gives 0 whatever its logits are. Where the logits are some columns of a row,
    ``of_row`` has the whole row's entropy, m = max z and sum exp(z - m), and a target outside of them is another's.
    """
    z = transform_logits(logits, temperature, softcap, logit_scale)
    maximum = z.amax(-1, keepdim=True) if of_row is None else of_row[1][..., None]
    shifted = z - maximum
    log_p = shifted - (shifted.exp().sum(-1, keepdim=True) if of_row is None else of_row[2][..., None]).log()
    p = log_p.exp()
    finite_log_p = log_p.masked_fill(p == 0, 0)
    entropy = -(p * finite_log_p).sum(-1, keepdim=True) if of_row is None else of_row[0][..., None]

    zero = torch.zeros(logits.shape[:-1], dtype=z.dtype, device=z.device)
    g_logprobs, g_entropy, g_logsumexp = (
        zero if gradient is None else gradient.to(z.dtype) for gradient in (grad_logprobs, grad_entropy, grad_logsumexp)
    )
    inactive = (g_logprobs == 0) & (g_entropy == 0) & (g_logsumexp == 0)
    gradient = (g_logsumexp - g_logprobs)[..., None] * p - g_entropy[..., None] * p * (finite_log_p + entropy)
    if targets is not None:
        ignored = targets == ignore_index
        inactive = inactive | ignored
        elsewhere = ignored if of_row is None else (targets < 0) | (targets >= logits.shape[-1])
        own = g_logprobs.masked_fill(elsewhere, 0)
        gradient = gradient.scatter_add(-1, targets.masked_fill(elsewhere, 0)[..., None], own[..., None])
    if softcap is not None:
        gradient = gradient * (1 - torch.tanh(logits.to(z.dtype) * logit_scale / softcap).square())
    gradient = gradient * (logit_scale / temperature)
    return gradient.masked_fill(inactive[..., None], 0).to(logits.dtype)


def token_entropy(
    logits: Tensor, *, temperature: float = 1.0, softcap: float | None = None, logit_scale: float = 1.0
) -> Tensor:
    """Return the entropy of each row in nats; see ``edge_kernels.token_entropy``."""
    return token_stats(logits, None, temperature=temperature, softcap=softcap, logit_scale=logit_scale).entropy


def linear_token_stats(
    hidden: Tensor,  # (..., D)
    weight: Tensor,  # (V, D)
    targets: Tensor,  # (...)
    bias: Tensor | None = None,  # (V,)
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = IGNORE_INDEX,
) -> TokenStats:
    """Return ``token_stats`` of the logits ``F.linear(hidden, weight, bias)``."""
    return token_stats(
        F.linear(hidden, weight, bias),
        targets,
        temperature=temperature,
        softcap=softcap,
        logit_scale=logit_scale,
        ignore_index=ignore_index,
    )


def group_advantages(rewards: Tensor, group_ids: Tensor, *, scale_rewards: bool | ScaleRewards = "group") -> Tensor:
    """Return A_i = (r_i - mean(r)) / (std(r) + 1e-4) over the responses of the same group, (B,).

    The standard deviation may be that of all rewards; see ``edge_kernels.group_advantages``. 0 throughout a group of
    one response, or of equal rewards.
    """
    advantages = torch.zeros_like(rewards)
    for group in group_ids.unique():
        members = group_ids == group
        r = rewards[members]
        if len(r) > 1 and not (r == r[0]).all():
            scaled_by = {"group": r, "batch": rewards}.get(scale_of(scale_rewards))
            scale = 1 if scaled_by is None else scaled_by.std(correction=1) + SCALE_EPSILON
            advantages[members] = (r - r.mean()) / scale
    return advantages


def entropy_weights(
    entropy: Tensor,  # (B, T)
    completion_mask: Tensor,  # (B, T), bool
    group_ids: Tensor,  # (B,)
    config: EDAConfig | None = None,
    *,
    advantages: Tensor | None = None,  # (B,): what preserve_scale holds the mean magnitude of
) -> Tensor:
    """Return EDA's weight 1 / P_hat of each response, detached, (B,); arXiv:2507.21848, eqs. 3 and 6."""
    config = config or EDAConfig()
    weights = torch.ones(len(entropy), dtype=stats_dtype(entropy.dtype), device=entropy.device)
    response_entropy = [row[mask].mean() for row, mask in zip(entropy.detach(), completion_mask, strict=True)]
    for i, own in enumerate(response_entropy):
        peers = [
            other
            for j, other in enumerate(response_entropy)
            if completion_mask[j].any() and (config.mean_over == "batch" or group_ids[j] == group_ids[i])
        ]
        if completion_mask[i].any():
            mean = torch.stack(peers).mean()
            ratio = torch.ones_like(own) if mean == 0 else own / mean
            weights[i] = 1 / ratio.clamp(config.min_ratio, config.max_ratio)
    if config.preserve_scale:
        if advantages is None:
            raise ValueError("preserve_scale rescales weights by the advantages' magnitude; pass advantages")
        for group in group_ids.unique():
            members = group_ids == group
            before, after = advantages[members].abs().sum(), _weighted(advantages, weights)[members].abs().sum()
            weights[members] *= before / after if after > 0 else 1.0
    return weights


def _weighted(advantages: Tensor, weights: Tensor) -> Tensor:
    """Return advantages * weights, with 0 * inf = 0: no advantage means no signal, however small the entropy."""
    return torch.where((advantages == 0) & weights.isinf(), 0, advantages * weights)


def entropy_driven_advantages(
    rewards: Tensor, entropy: Tensor, completion_mask: Tensor, group_ids: Tensor, config: EDAConfig | None = None
) -> Tensor:
    """Return the group advantage divided by the normalized entropy, (B,); arXiv:2507.21848, eq. 7."""
    config = config or EDAConfig()
    advantages = group_advantages(rewards, group_ids, scale_rewards=config.scale_rewards)
    return _weighted(advantages, entropy_weights(entropy, completion_mask, group_ids, config, advantages=advantages))


def edge_grpo_loss(
    logits: Tensor,  # (B, T, V)
    targets: Tensor,  # (B, T)
    completion_mask: Tensor,  # (B, T), bool
    *,
    advantages: Tensor | None = None,  # (B,) or (B, T)
    rewards: Tensor | None = None,  # (B,)
    group_ids: Tensor | None = None,  # (B,)
    old_logprobs: Tensor | None = None,  # (B, T); None: the current ones
    ref_logprobs: Tensor | None = None,  # (B, T)
    sampling_logprobs: Tensor | None = None,  # (B, T)
    injected_mask: Tensor | None = None,  # (B, T), bool
    truncated_mask: Tensor | None = None,  # (B,), bool
    temperature: Tensor | None = None,  # (B,); None: the configuration's
    num_items: Tensor | float | None = None,
    num_sequences: Tensor | float | None = None,
    entropy_threshold: Tensor | float | None = None,
    config: GRPOLossConfig | None = None,
) -> GRPOLossOutput:
    """Return the loss, differentiable by autograd in the logits; see ``edge_kernels.edge_grpo_loss``."""
    config = config or GRPOLossConfig()
    injected = torch.zeros_like(completion_mask) if injected_mask is None else injected_mask & completion_mask
    mask = completion_mask & ~injected if config.injected == "mask" else completion_mask
    if config.mask_truncated_completions:
        assert truncated_mask is not None
        mask = mask & ~truncated_mask[:, None]
    stats = token_stats(
        logits,
        targets.masked_fill(~mask, IGNORE_INDEX),
        temperature=config.temperature if temperature is None else temperature,
        softcap=config.softcap,
        logit_scale=config.logit_scale,
    )
    logprobs, entropy = stats.logprobs, stats.entropy
    # A token without a record (NaN) has ratio 1 to its own present value.
    old = logprobs.detach() if old_logprobs is None else old_logprobs.to(entropy.dtype)
    recorded = mask if old_logprobs is None else mask & ~old.isnan()
    if advantages is None:
        assert rewards is not None
        assert group_ids is not None
        rewards = rewards.to(entropy.dtype)
        if config.reward_kl_coef > 0:
            assert ref_logprobs is not None
            kl = kl_estimate(old, ref_logprobs.to(entropy.dtype), config.reward_kl_penalty).masked_fill(~recorded, 0)
            rewards = rewards - config.reward_kl_coef * kl.sum(-1)
        advantages = entropy_driven_advantages(rewards, entropy, mask, group_ids, config.eda)
    A = advantages.to(entropy.dtype)
    A = A[:, None] if A.dim() == 1 else A
    ratio = _importance_ratio(logprobs, old, recorded, A, mask, config)  # (B, T) or (B, 1)

    per_token = _policy_term(ratio, A, logprobs, config)
    if config.injected == "shaped":
        p = logprobs.exp()
        per_token = torch.where(injected, -A * p / (p + config.shaped_gamma), per_token)

    per_token = per_token * _factor(logprobs.detach(), old.detach(), sampling_logprobs, A, mask, config)

    # The policy term of low-entropy tokens is dropped; so is their entropy bonus below.
    acting = mask
    if config.top_entropy_quantile < 1:
        if entropy_threshold is None:
            entropy_threshold = entropy.detach()[mask].quantile(1 - config.top_entropy_quantile) if mask.any() else 0.0
        acting = mask & ~(entropy < entropy_threshold)
        per_token = per_token * acting

    if config.injected == "sft":
        per_token = torch.where(injected, -config.sft_weight * logprobs, per_token)
    if config.beta > 0:
        assert ref_logprobs is not None
        kl = k3(ref_logprobs.to(entropy.dtype), logprobs)
        per_token = per_token + config.beta * (kl * ratio if config.use_bias_correction_kl else kl)
    per_token = per_token.masked_fill(~mask, 0)

    items = mask.sum() if num_items is None else num_items
    loss = _reduced(per_token, mask, config, items, len(mask) if num_sequences is None else num_sequences)
    if config.entropy_coef:
        bonus_items = acting.sum() if num_items is None else tokens_above_quantile(items, config.top_entropy_quantile)
        loss = loss - config.entropy_coef * entropy.masked_fill(~acting, 0).sum() / max(bonus_items, 1)
    return GRPOLossOutput(loss, logprobs.detach(), entropy.detach(), advantages, {})


def _importance_ratio(
    logprobs: Tensor, old: Tensor, recorded: Tensor, A: Tensor, mask: Tensor, config: GRPOLossConfig
) -> Tensor:
    """Return the ratio of current to old probability, of a token or of its whole sequence."""
    log_ratio = (logprobs - torch.where(recorded, old, logprobs.detach())).masked_fill(~mask, 0)
    if config.loss_type == "geo_mean":  # GMPO: each is clipped on the side to which its advantage would push it
        low, high = log_ratio.clamp(min=-config.epsilon_low), log_ratio.clamp(max=config.epsilon_high)
        log_ratio = torch.where(A > 0, high, torch.where(A < 0, low, 0))
    if config.importance_sampling_level == "sequence" or config.loss_type == "geo_mean":
        # Tokens without a record take no part.
        log_ratio = log_ratio.masked_fill(~recorded, 0).sum(-1, keepdim=True)
        log_ratio = log_ratio / recorded.sum(-1, keepdim=True).clamp(min=1)
    return log_ratio.clamp(max=MAX_LOG_RATIO).exp()


def _factor(
    logprobs: Tensor, old: Tensor, sampling: Tensor | None, A: Tensor, mask: Tensor, config: GRPOLossConfig
) -> Tensor:
    """Return what the sampler and the whole sequence multiply a policy term by."""
    factor = torch.ones_like(logprobs)
    sampling = None if sampling is None else sampling.to(logprobs.dtype)
    if config.sampler_ratio_cap is not None:
        assert sampling is not None
        factor = _sampler_correction(old, sampling, mask, config)
        if config.loss_type == "geo_mean":
            factor = geometric_mean(factor, mask)
    if config.loss_type == "vespo":
        factor = gamma_weight(logprobs - old, factor, A, mask, config)
    if config.off_policy_mask_threshold is not None:
        behavior = old if sampling is None else sampling
        factor = factor * is_on_policy(logprobs, behavior, A, mask, config.off_policy_mask_threshold)
    return factor


def _policy_term(ratio: Tensor, A: Tensor, logprobs: Tensor, config: GRPOLossConfig) -> Tensor:
    """Return each token's loss before any factor, penalty or mask."""
    if config.loss_type == "cispo":
        return -ratio.clamp(max=config.epsilon_high).detach() * A * logprobs
    if config.loss_type == "vespo":
        return -A * logprobs
    if config.loss_type == "geo_mean":
        return -A * ratio
    if config.loss_type == "sapo":
        slope = torch.full_like(A, config.sapo_temperature_neg).masked_fill(A > 0, config.sapo_temperature_pos)
        return -(slope * (ratio - 1)).sigmoid() * 4 / slope * A
    clipped = ratio.clamp(1 - config.epsilon_low, 1 + config.epsilon_high)
    unclipped = ratio if config.delta is None else ratio.clamp(max=config.delta)
    return -torch.minimum(unclipped * A, clipped * A)


def _sampler_correction(old: Tensor, sampling: Tensor, mask: Tensor, config: GRPOLossConfig) -> Tensor:
    """Return the correction for a sampler whose probabilities differ from the trainer's."""
    difference = (old - sampling).masked_fill(~mask, 0).nan_to_num(nan=0.0)
    if config.sampler_ratio_mode.startswith("sequence"):
        difference = difference.sum(-1, keepdim=True)
    correction = difference.exp()
    low, high = config.sampler_ratio_floor, config.sampler_ratio_cap or math.inf
    if config.sampler_ratio_mode.endswith("truncate"):
        return correction.clamp(low, high)
    return correction.masked_fill((correction < low) | (correction > high), 0)


def _reduced(
    per_token: Tensor, mask: Tensor, config: GRPOLossConfig, items: Tensor | float, sequences: Tensor | float
) -> Tensor:
    """Return the loss of the batch from those of its tokens, 0 outside the mask."""
    if config.loss_type in ("grpo", "sapo", "geo_mean"):
        return (per_token.sum(-1) / mask.sum(-1).clamp(min=1)).sum() / max(sequences, 1)
    if config.loss_type == "luspo":
        return per_token.sum() / max(sequences, 1)
    if config.loss_type == "dr_grpo":
        assert config.max_completion_length is not None
        return per_token.sum() / (max(sequences, 1) * config.max_completion_length)
    return per_token.sum() / max(items, 1)


def linear_edge_grpo_loss(
    hidden: Tensor, weight: Tensor, targets: Tensor, completion_mask: Tensor, bias: Tensor | None = None, **options: Any
) -> GRPOLossOutput:
    """Return ``edge_grpo_loss`` of the logits ``F.linear(hidden, weight, bias)``."""
    return edge_grpo_loss(F.linear(hidden, weight, bias), targets, completion_mask, **options)


def k3(ref_logprobs: Tensor, logprobs: Tensor) -> Tensor:
    """Return the k3 estimate of the KL divergence to the reference policy: exp(d) - d - 1 with d = ref - current.

    From d = ``MAX_KL_LOG_RATIO`` on exp(d) is replaced by its tangent there.
    """
    difference = ref_logprobs - logprobs
    bounded, excess = difference.clamp(max=MAX_KL_LOG_RATIO), (difference - MAX_KL_LOG_RATIO).clamp(min=0)
    ratio = bounded.exp()
    return (ratio - bounded - 1) + (ratio - 1) * excess  # inf, not NaN, for an infinite difference


def tokens_above_quantile(num_items: Tensor | float, share: float) -> Tensor | float:
    """Return how many of ``num_items`` distinct values are at or above their linear-interpolated (1 - share) quantile.

    This is the count that the entropy bonus is a mean over, known without looking at the values: the quantile lies at
    position (n - 1)(1 - share) of the sorted values.
    """
    if share == 1:
        return num_items
    if isinstance(num_items, Tensor):
        return num_items - ((num_items.double() - 1) * (1 - share)).ceil()
    return num_items - math.ceil((num_items - 1) * (1 - share))
