"""From responses to tensors: what one micro-batch holds, how a rollout is cut into mini- and micro-batches.

A sequence is prompt and completion, right-padded. Everything per token is aligned with the *predicted* token: position
t of ``targets`` is ``input_ids[:, t + 1]``, and ``completion_mask`` selects the positions that predict a completion.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from edge_grpo.config.seeds import derive_seed
from edge_grpo.types import Prompt, Provenance, Response, Reward
from edge_kernels import GRPOLossConfig


@dataclass
class Sample:
    """A response on its way through a step; later phases fill in what they compute.

    ``first`` is what the policy sampled, ``response`` what is trained on (the same object when nothing was corrected).
    ``logprobs`` and ``entropy`` (one entry per response token, nats) are those under the weights that begin the step.
    """

    prompt: Prompt
    group: int
    first: Response
    first_reward: Reward
    response: Response
    reward: Reward
    logprobs: Tensor | None = None  # (T,)
    entropy: Tensor | None = None  # (T,)
    ref_logprobs: Tensor | None = None  # (T,)
    advantage: float = 0.0
    weight: float = 1.0
    padding: int = 0  # positions behind the response over which its entropy is averaged too
    mean_entropy: float = math.nan  # P, eq. 3; measured beforehand where there is such padding
    reward_kl: float = 0.0  # the estimated KL divergence to the reference policy, summed over the response

    @property
    def is_truncated(self) -> bool:
        return self.response.finish_reason == "length"

    @property
    def length(self) -> int:
        return len(self.prompt.token_ids) + len(self.response.token_ids)


@dataclass(frozen=True)
class Batch:
    """A padded micro-batch of B sequences, L tokens each at most; T = L - 1 predictions."""

    input_ids: Tensor  # (B, L) int64
    attention_mask: Tensor  # (B, L) int64
    targets: Tensor  # (B, T) int64
    completion_mask: Tensor  # (B, T) bool
    injected_mask: Tensor  # (B, T) bool
    superseded_mask: Tensor  # (B, T) bool: of first attempts that a correction follows
    truncated_mask: Tensor  # (B,) bool: the length limit cut the response off
    advantages: Tensor  # (B,) float32
    logprobs: Tensor | None  # (B, T) float32, 0 outside of completion_mask; the same for the two below
    ref_logprobs: Tensor | None
    sampling_logprobs: Tensor  # NaN where the engine left no record


def pad(samples: Sequence[Sample], pad_token_id: int, device: torch.device | str = "cpu") -> Batch:
    """Return the samples as one right-padded batch on ``device``."""
    longest = max(sample.length + sample.padding for sample in samples)
    input_ids = torch.full((len(samples), longest), pad_token_id, dtype=torch.int64)
    attention_mask = torch.zeros_like(input_ids)
    completion_mask = torch.zeros(len(samples), longest - 1, dtype=torch.bool)
    injected_mask, superseded_mask = torch.zeros_like(completion_mask), torch.zeros_like(completion_mask)
    for row, sample in enumerate(samples):
        start, stop = len(sample.prompt.token_ids), sample.length
        input_ids[row, :stop] = torch.tensor(sample.prompt.token_ids + sample.response.token_ids)
        attention_mask[row, : stop + sample.padding] = 1  # it is predicted after, so it is read
        completion_mask[row, start - 1 : stop - 1] = True
        injected_mask[row, start - 1 : stop - 1] = torch.tensor(
            [provenance == Provenance.INJECTED for provenance in sample.response.provenance], dtype=torch.bool
        )
        superseded_mask[row, start - 1 : stop - 1] = torch.tensor(sample.response.superseded, dtype=torch.bool)

    def per_token(values: Sequence[Tensor | None]) -> Tensor | None:
        if any(value is None for value in values):
            return None
        out = torch.zeros(completion_mask.shape)
        out[completion_mask] = torch.cat([value.float().cpu() for value in values if value is not None])
        return out.to(device)

    sampling = per_token([torch.tensor(sample.response.logprobs) for sample in samples])
    assert sampling is not None
    return Batch(
        input_ids=input_ids.to(device),
        attention_mask=attention_mask.to(device),
        targets=input_ids[:, 1:].to(device),
        completion_mask=completion_mask.to(device),
        injected_mask=injected_mask.to(device),
        superseded_mask=superseded_mask.to(device),
        truncated_mask=torch.tensor([sample.is_truncated for sample in samples], device=device),
        advantages=torch.tensor([sample.advantage for sample in samples], dtype=torch.float32, device=device),
        logprobs=per_token([sample.logprobs for sample in samples]),
        ref_logprobs=per_token([sample.ref_logprobs for sample in samples]),
        sampling_logprobs=sampling,
    )


def counted_tokens(response: Response, loss: GRPOLossConfig) -> list[bool]:
    """Return which tokens have a loss and count in the response's entropy: all that the loss does not mask.

    It may mask injected tokens, and responses that were cut off.
    """
    if loss.mask_truncated_completions and response.finish_reason == "length":
        return [False] * len(response.provenance)
    return [not (loss.injected == "mask" and mark == Provenance.INJECTED) for mark in response.provenance]


def unpad(values: Tensor, batch: Batch) -> list[Tensor]:
    """Return the completion entries of ``values`` (B, T) as one CPU tensor per sequence: the inverse of padding.

    Each has memory of its own: a view is pickled with the whole batch's, and processes exchange their samples.
    """
    lengths = batch.completion_mask.sum(1).tolist()
    return [part.clone() for part in values[batch.completion_mask].float().cpu().split(lengths)]


def micro_batches(samples: Sequence[Sample], size: int) -> Iterator[list[Sample]]:
    """Cut into batches of at most ``size`` sequences of like length, so that little is padding.

    The loss is normalized by totals over the whole optimizer step, so the order and the cut do not change the gradient.
    """
    ordered = sorted(samples, key=lambda sample: sample.length, reverse=True)
    for start in range(0, len(ordered), size):
        yield ordered[start : start + size]


def minibatches(samples: Sequence[Sample], count: int, *, seed: int) -> list[list[Sample]]:
    """Deal the samples' groups into ``count`` parts of equal group number, by ``seed``; groups stay whole.

    Of ``count`` groups in a row each part gets one. So a part has the same groups on any number of processes that each
    hold a multiple of ``count`` groups in a row.
    """
    if count == 1:
        return [list(samples)]
    groups = sorted({sample.group for sample in samples})
    if len(groups) % count:
        raise ValueError(f"{len(groups)} groups cannot be split into {count} minibatches; choose a divisor")
    part: dict[int, int] = {}
    for start in range(0, len(groups), count):
        row = groups[start : start + count]
        randomness = torch.Generator().manual_seed(derive_seed(seed, "deal", row[0]))
        part |= zip(row, torch.randperm(count, generator=randomness).tolist(), strict=True)
    return [[sample for sample in samples if part[sample.group] == number] for number in range(count)]
