"""From responses to tensors: what one micro-batch holds, how a rollout is cut into mini- and micro-batches.

A sequence is prompt and completion, right-padded, or packed behind the one before it. Everything per token is aligned
with the *predicted* token: position t of ``targets`` is ``input_ids[:, t + 1]``, and ``completion_mask`` selects the
positions that predict a completion.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

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
    """A micro-batch of B sequences: padded, L tokens each at most, or packed into one row; T = L - 1 predictions.

    Packed, what has (B, L) or (B, T) below has (1, L) or (1, T) with L the number of all tokens. The last position of a
    sequence then predicts the first token of the next; ``completion_mask`` is False there.
    """

    input_ids: Tensor  # (B, L) int64
    attention_mask: Tensor | None  # (B, L) int64; None: packed
    position_ids: Tensor | None  # (1, L) int64, from 0 in each sequence; None: padded
    cu_seqlens: Tensor | None  # (B + 1,) int32: where the predictions of each sequence begin and end; None: padded
    num_tokens: list[int]  # of each sequence's completion
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
    attention_mask = torch.zeros(len(samples), longest, dtype=torch.int64)
    for row, sample in enumerate(samples):
        attention_mask[row, : sample.length + sample.padding] = 1  # it is predicted after, so it is read
    places = [(row, 0) for row in range(len(samples))]
    fields = {"attention_mask": attention_mask.to(device), "position_ids": None, "cu_seqlens": None}
    return _filled(samples, torch.full_like(attention_mask, pad_token_id), places, fields, device)


def pack(samples: Sequence[Sample], device: torch.device | str = "cpu") -> Batch:
    """Return the samples as one row without padding on ``device``."""
    ends = list(itertools.accumulate(sample.length for sample in samples))
    starts = [0, *ends[:-1]]
    position_ids = torch.cat([torch.arange(sample.length) for sample in samples])[None]
    predictions = torch.tensor([*starts, ends[-1] - 1], dtype=torch.int32)  # the last token predicts nothing
    fields = {"attention_mask": None, "position_ids": position_ids.to(device), "cu_seqlens": predictions.to(device)}
    return _filled(samples, torch.zeros_like(position_ids), [(0, start) for start in starts], fields, device)


def _filled(
    samples: Sequence[Sample],
    input_ids: Tensor,  # (B, L) or (1, L), to be filled in
    places: Sequence[tuple[int, int]],  # the row and the column at which each sequence starts
    fields: dict[str, Any],  # of the batch, known already
    device: torch.device | str,
) -> Batch:
    completion_mask = torch.zeros(len(input_ids), input_ids.shape[1] - 1, dtype=torch.bool)
    injected_mask, superseded_mask = torch.zeros_like(completion_mask), torch.zeros_like(completion_mask)
    for (row, offset), sample in zip(places, samples, strict=True):
        stop = offset + sample.length
        input_ids[row, offset:stop] = torch.tensor(sample.prompt.token_ids + sample.response.token_ids)
        predicting = slice(offset + len(sample.prompt.token_ids) - 1, stop - 1)
        completion_mask[row, predicting] = True
        injected_mask[row, predicting] = torch.tensor(
            [provenance == Provenance.INJECTED for provenance in sample.response.provenance], dtype=torch.bool
        )
        superseded_mask[row, predicting] = torch.tensor(sample.response.superseded, dtype=torch.bool)

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
        num_tokens=[len(sample.response.token_ids) for sample in samples],
        targets=input_ids[:, 1:].to(device),
        completion_mask=completion_mask.to(device),
        injected_mask=injected_mask.to(device),
        superseded_mask=superseded_mask.to(device),
        truncated_mask=torch.tensor([sample.is_truncated for sample in samples], device=device),
        advantages=torch.tensor([sample.advantage for sample in samples], dtype=torch.float32, device=device),
        logprobs=per_token([sample.logprobs for sample in samples]),
        ref_logprobs=per_token([sample.ref_logprobs for sample in samples]),
        sampling_logprobs=sampling,
        **fields,
    )


def counted_tokens(response: Response, loss: GRPOLossConfig) -> list[bool]:
    """Return which tokens have a loss and count in the response's entropy: all that the loss does not mask.

    It may mask injected tokens, and responses that were cut off.
    """
    if loss.mask_truncated_completions and response.finish_reason == "length":
        return [False] * len(response.provenance)
    return [not (loss.injected == "mask" and mark == Provenance.INJECTED) for mark in response.provenance]


def unpad(values: Tensor, batch: Batch) -> list[Tensor]:
    """Return the completion entries of ``values``, (B, T) or (1, T), as one CPU tensor per sequence.

    Each has memory of its own: a view is pickled with the whole batch's, and processes exchange their samples.
    """
    return [part.clone() for part in values[batch.completion_mask].float().cpu().split(batch.num_tokens)]


def micro_batches(
    samples: Sequence[Sample], size: int, max_tokens: int = 0, *, packed: bool = False
) -> Iterator[list[Sample]]:
    """Cut into batches of at most ``size`` sequences and ``max_tokens`` tokens (0: any), of like length.

    Padding counts as tokens unless ``packed``; a sequence that is longer is alone. The loss is normalized by totals
    over the whole optimizer step, so the order and the cut do not change the gradient.
    """
    chunk: list[Sample] = []
    tokens = 0
    for sample in sorted(samples, key=lambda sample: sample.length, reverse=True):
        more = sample.length if packed or not chunk else chunk[0].length
        if chunk and (len(chunk) == size or (max_tokens and tokens + more > max_tokens)):
            yield chunk
            chunk, tokens, more = [], 0, sample.length
        chunk.append(sample)
        tokens += more
    if chunk:
        yield chunk


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
