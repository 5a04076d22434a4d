"""The arguments of the losses: checked, and brought into the form of a ``Batch`` (batch.py)."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from edge_kernels._checks import IGNORE_INDEX, check_finite, check_like, check_temperature, describe, stats_dtype
from edge_kernels.backends.plain import sampler_correction
from edge_kernels.config import GRPOLossConfig
from edge_kernels.contract import LossRule
from edge_kernels.ops.batch import Batch, Total, counted, scalar
from edge_kernels.ops.head_checks import LowRank
from edge_kernels.ops.linear_token_stats import at_temperatures
from edge_kernels.sequences import Sequences, Tokens, tokens_of

_LEAVE_OUT = "leave the response out of completion_mask"


def _check_credit(advantages: Tensor | None, rewards: Tensor | None, group_ids: Tensor | None, tokens: Tokens) -> None:
    """Require either advantages, or rewards with their groups."""
    like, B = tokens.values, tokens.sequences.num_responses
    if (advantages is None) == (rewards is None):
        raise ValueError(
            f"exactly one of advantages and rewards must be given; got {'neither' if rewards is None else 'both'}; "
            "pass advantages, or rewards with group_ids for entropy-driven advantages"
        )
    if advantages is not None:
        remedy = "pass one advantage per response or per token"
        check_like("advantages", advantages, {"(B,)": (B,), **tokens.shapes}, "floating point", like, remedy=remedy)
        if group_ids is not None:
            raise ValueError("group_ids belongs to rewards; got it with advantages; leave it out")
    else:
        check_like("rewards", rewards, {"(B,)": (B,)}, "floating point", like, remedy="pass one reward per response")
        remedy = "pass one group number per response; responses to the same prompt share it"
        check_like("group_ids", group_ids, {"(B,)": (B,)}, "int64", like, remedy=remedy)


def _check_total(name: str, total: Total) -> None:
    """Require a positive number, or a scalar tensor, whose value is not read: that might wait for its device."""
    if isinstance(total, Tensor):
        if total.dim():
            raise ValueError(f"{name} must be a number or a scalar tensor; got {describe(total)}; pass its sum")
    elif total is not None and (isinstance(total, bool) or not total > 0):
        raise ValueError(f"{name} must be greater than 0; got {total!r}; pass the count over everything that is summed")


def _check_needs(
    config: GRPOLossConfig,
    ref_logprobs: Tensor | None,
    sampling_logprobs: Tensor | None,
    truncated_mask: Tensor | None,
    rewards: Tensor | None,
) -> None:
    """Require what the configuration has a use for."""
    if config.beta > 0 and ref_logprobs is None:
        raise ValueError(
            f"beta = {config.beta} needs ref_logprobs; got None; score the reference policy, or set beta=0"
        )
    if config.sampler_ratio_cap is not None and sampling_logprobs is None:
        raise ValueError(
            f"sampler_ratio_cap = {config.sampler_ratio_cap} needs sampling_logprobs; got None; "
            "pass the sampler's log-probabilities, or set sampler_ratio_cap=None"
        )
    if config.mask_truncated_completions and truncated_mask is None:
        raise ValueError(
            "mask_truncated_completions=True needs truncated_mask; got None; pass which responses the length limit cut "
            "off, or set mask_truncated_completions=False"
        )
    if config.reward_kl_coef > 0 and (rewards is None or ref_logprobs is None):
        raise ValueError(
            f"reward_kl_coef = {config.reward_kl_coef} needs rewards and ref_logprobs; got "
            f"{'advantages' if rewards is None else 'no ref_logprobs'}; pass both, or form the advantages of "
            "kl_penalized_rewards(...) and set reward_kl_coef=0"
        )


def _masks(
    config: GRPOLossConfig,
    completion_mask: Tensor,
    injected_mask: Tensor | None,
    truncated_mask: Tensor | None,
    sequences: Sequences,
) -> tuple[Tensor, Tensor | None]:
    """Return where a loss is taken, (B, T), and the tokens of truncated responses that it leaves out."""
    if truncated_mask is not None:
        remedy = "pass which responses the length limit cut off"
        shapes = {"(B,)": (sequences.num_responses,)}
        check_like("truncated_mask", truncated_mask, shapes, "bool", completion_mask, remedy=remedy)
    mask, cut = completion_mask, None
    if config.injected == "mask" and injected_mask is not None:
        mask = mask & ~injected_mask
    if config.mask_truncated_completions and truncated_mask is not None:
        is_cut = sequences.spread(truncated_mask)
        mask, cut = mask & ~is_cut, mask & is_cut
    return mask, cut


def temperature_of_rows(temperature: Tensor, sequences: Sequences) -> Tensor:
    """Return the checked temperature of each response, (B,), for its row of (B, T, ...) or for its packed tokens."""
    temperature = check_temperature(temperature, sequences.num_responses)
    return temperature if sequences.number is None else temperature[sequences.number.to(temperature.device)]


def prepared_hidden(
    hidden: Tensor,
    low_rank: LowRank | None,
    bias: Tensor | None,
    temperature: Tensor | None,
    config: GRPOLossConfig | None,
    cu_seqlens: Tensor | None,
    group: object = None,
) -> tuple[Tokens, LowRank | None, float | None]:
    """Return hidden states and those of a low-rank part, divided by the temperatures of their responses.

    The last is the temperature that is left to take: 1 if there was one for each response.
    """
    tokens = tokens_of("hidden", hidden, cu_seqlens, group, feature="D")
    is_pair = isinstance(low_rank, tuple) and len(low_rank) == 2 and isinstance(low_rank[0], Tensor)
    if low_rank is not None and is_pair and cu_seqlens is not None:
        low_rank = low_rank[0].flatten(0, -2), low_rank[1]
    if temperature is None:
        return tokens, low_rank, None
    temperature = temperature_of_rows(temperature, tokens.sequences)
    softcap = (config or GRPOLossConfig()).softcap
    tokens = tokens._replace(values=at_temperatures(tokens.values, bias, temperature, softcap))
    if low_rank is not None and is_pair:
        low_rank = at_temperatures(low_rank[0], bias, temperature, softcap), low_rank[1]
    return tokens, low_rank, 1.0


def _of_tokens(name: str, value: Tensor, dtype: str, tokens: Tokens, remedy: str) -> Tensor:
    """Return a checked tensor per token as (B, T) or (N,)."""
    check_like(name, value, tokens.shapes, dtype, tokens.values, remedy=remedy)
    return value if tokens.sequences.number is None else value.flatten()


class Draft(NamedTuple):
    """A batch whose sums over responses are not made yet, so that its processes can first agree that it is right."""

    batch: Batch  # without ``lengths``, ``sampler_ratio`` and ``masked``
    is_per_token: bool  # the advantages
    cut: Tensor | None  # (B, T): what ``mask_truncated_completions`` leaves out
    truncated: Tensor | None  # (B,)


def check_arguments(
    tokens: Tokens,  # logits or hidden states
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
    truncated_mask: Tensor | None,
    temperature: Tensor | float | None,  # what ``temperature_of_rows`` or ``prepared_hidden`` returns
    num_items: Total,
    num_sequences: Total,
    entropy_threshold: Total,
) -> Draft:
    """Return the checked arguments, without a word to other processes."""
    if config is not None and not isinstance(config, GRPOLossConfig):
        raise TypeError(f"config must be a GRPOLossConfig; got {type(config).__name__}")
    config, sequences = config or GRPOLossConfig(), tokens.sequences
    shape = tuple(targets.shape)
    targets = _of_tokens("targets", targets, "int64", tokens, "pass one token id per position of the completion")
    remedy = "pass the mask that batching returned"
    completion_mask = _of_tokens("completion_mask", completion_mask, "bool", tokens, remedy)
    _check_credit(advantages, rewards, group_ids, tokens)
    per_token = {"old_logprobs": old_logprobs, "ref_logprobs": ref_logprobs, "sampling_logprobs": sampling_logprobs}
    for name, value in per_token.items():
        if value is not None:
            value = _of_tokens(name, value, "floating point", tokens, "pass one log-probability per token")
            per_token[name] = value.detach().to(stats_dtype(dtype))
    if injected_mask is not None:
        remedy = "pass the mask of tokens that the policy did not sample"
        injected_mask = _of_tokens("injected_mask", injected_mask, "bool", tokens, remedy)
    _check_needs(config, ref_logprobs, sampling_logprobs, truncated_mask, rewards)
    _check_total("num_items", num_items)
    _check_total("num_sequences", num_sequences)
    if isinstance(entropy_threshold, Tensor) and entropy_threshold.dim():
        raise ValueError(f"entropy_threshold must be a number or a scalar tensor; got {describe(entropy_threshold)}")

    mask, cut = _masks(config, completion_mask, injected_mask, truncated_mask, sequences)
    is_per_token = advantages is not None and advantages.shape != (sequences.num_responses,)
    if advantages is not None and is_per_token:
        check_finite("advantages", advantages, mask.view(advantages.shape), remedy=_LEAVE_OUT)
    if rewards is not None:
        check_finite("rewards", rewards, remedy="leave the response out, or give it a number")
    behavior = None
    if config.off_policy_mask_threshold is not None:
        behavior = per_token["sampling_logprobs"]
        behavior = per_token["old_logprobs"] if behavior is None else behavior
    if entropy_threshold is not None:
        entropy_threshold = scalar(entropy_threshold, stats_dtype(dtype), mask.device).detach()
    batch = Batch(
        config=config,
        dtype=stats_dtype(dtype),
        sequences=sequences,
        shape=shape,
        lengths=mask.new_empty(0, dtype=torch.int64),
        targets=targets.masked_fill(~mask, IGNORE_INDEX),
        mask=mask,
        advantages=None if advantages is None else advantages.detach(),
        rewards=rewards,
        group_ids=group_ids,
        old_logprobs=per_token["old_logprobs"],
        ref_logprobs=per_token["ref_logprobs"],
        sampler_ratio=None,
        sampling_logprobs=None if config.sampler_ratio_cap is None else per_token["sampling_logprobs"],
        injected=injected_mask if config.injected in ("sft", "shaped") else None,
        temperature=float(config.temperature) if temperature is None else temperature,
        behavior_logprobs=behavior,
        masked={},
        num_items=num_items,
        num_sequences=num_sequences,
        entropy_threshold=entropy_threshold if config.top_entropy_quantile < 1 else None,
    )
    return Draft(batch, is_per_token, cut, truncated_mask)


def batch_of(draft: Draft) -> Batch:
    """Return the batch with what is summed over whole responses: of all processes, where their tokens are split."""
    batch, config = draft.batch, draft.batch.config
    sequences, mask = batch.sequences, batch.mask
    masked = {} if draft.cut is None else counted("truncated", draft.cut, batch.dtype, sequences)
    if config.off_policy_mask_threshold is not None:  # to be replaced where there is something to compare with
        zero = torch.zeros((), dtype=batch.dtype, device=mask.device)
        masked |= {"off_policy_tokens": zero, "off_policy_sequences": zero}
    (lengths,) = sequences.sums(mask)
    if batch.advantages is not None and not draft.is_per_token:
        check_finite("advantages", batch.advantages, lengths > 0, remedy=_LEAVE_OUT)
    batch = batch._replace(lengths=lengths, masked=masked)
    old, sampling = batch.old_logprobs, batch.sampling_logprobs
    if old is None or sampling is None:
        return batch
    ratio = sampler_correction(old, sampling, mask, LossRule.of(config), sequences)
    return batch._replace(sampler_ratio=ratio, sampling_logprobs=None)


def check_batch(tokens: Tokens, dtype: torch.dtype, *arguments: Any, **options: Any) -> Batch:
    """Return the batch of ``check_arguments``'s arguments."""
    return batch_of(check_arguments(tokens, dtype, *arguments, **options))
