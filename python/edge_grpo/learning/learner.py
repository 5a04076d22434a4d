"""The policy that learns, with its reference, optimizer and schedule: scoring a rollout, its loss, its update.

Samples come from ``collect`` and have their advantages from ``credit``; the losses are ``edge_kernels``.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from statistics import fmean

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor, nn
from transformers import PreTrainedModel

from edge_grpo.batching import Batch, Sample, counted_tokens, micro_batches, minibatches, pack, pad, unpad
from edge_grpo.config import TrainConfig
from edge_grpo.config.seeds import derive_seed
from edge_grpo.learning.distribution import place
from edge_grpo.learning.entropy import EntropyTerm, add_padding, entropy_mask, loss_by_entropy, mean_over
from edge_grpo.learning.rounds import in_step, stands_in
from edge_grpo.learning.schedule import learning_rate_factor
from edge_grpo.learning.totals import LossTotals, Normalizers
from edge_grpo.metrics import Recomputed, drift_metrics
from edge_grpo.policy.adapters import adds_nothing, disabled
from edge_grpo.policy.head import LMHead
from edge_grpo.policy.model import PolicyModel, check_packing, lm_head
from edge_grpo.policy.sharding import is_empty, is_sharded, own_part, release, set_synchronized, whole
from edge_grpo.policy.together import together
from edge_grpo.types import Response
from edge_kernels import GRPOLossOutput, TokenStats, linear_edge_grpo_loss, linear_token_stats

_IGNORE_INDEX = -100
_MAX_SKIPPED = 3  # optimizer steps in a row
_LARGEST_WEIGHT = math.sqrt(torch.finfo(torch.float32).max)


class Learner:
    """One process's part of learning. All processes call the same methods in the same order."""

    def __init__(
        self, config: TrainConfig, model: PreTrainedModel, accelerator: Accelerator, *, pad_token_id: int
    ) -> None:
        self.optim, self.seed = config.optim, config.seed
        self.accelerator = accelerator
        self.model = model
        self.pad_token_id = pad_token_id
        self.averages_padding = config.use_eda and config.published.padding_entropy
        self.learns_entropy = config.use_eda and config.published.entropy_gradient
        self.masks_superseded = config.use_gec and config.correction.superseded == "mask"
        holds_weights = not is_empty(model)  # the first process does; what follows from them is its word
        if config.optim.packing:
            together(lambda: check_packing(model) if holds_weights else None)
        head = lm_head(model)
        self.loss = replace(config.loss_config, softcap=head.softcap, logit_scale=head.logit_scale)
        self.reference: PolicyModel | None = None
        self.needs_reference = bool(config.loss.beta or config.reward.kl_coef)
        if self.needs_reference and not broadcast_object_list([holds_weights and adds_nothing(model)])[0]:
            frozen = copy.deepcopy(model).requires_grad_(False).eval()
            self.reference = PolicyModel(frozen)
            place(self.reference, config.model, accelerator)
        policy = PolicyModel(model)
        place(policy, config.model, accelerator)
        self.is_sharded = is_sharded(policy)
        trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=config.optim.learning_rate, weight_decay=config.optim.weight_decay)
        self.policy: nn.Module = policy if self.is_sharded else accelerator.prepare_model(policy)
        self.optimizer = accelerator.prepare_optimizer(optimizer)
        self.skipped_in_a_row = 0
        self.num_updates = config.steps * config.optim.epochs * config.optim.minibatches

    @property
    def unwrapped(self) -> PolicyModel:
        """The policy without distributed hooks: scoring runs a different number of batches on each process."""
        return self.accelerator.unwrap_model(self.policy)

    @torch.no_grad()
    def score(self, samples: Sequence[Sample]) -> None:
        """Fill logprobs and entropy: from the sampler's record, or from a forward pass over what has no record.

        Correcting for a mismatch between sampler and trainer needs the trainer's own logprobs, so then everything is
        scored. Reference logprobs, when the loss or the reward has a KL term, are always scored.
        """
        score_all = self.loss.sampler_ratio_cap is not None
        unscored = []
        for sample in samples:
            if score_all or not sample.response.is_recorded:
                unscored.append(sample)
            else:
                sample.logprobs = torch.tensor(sample.response.logprobs)
                sample.entropy = torch.tensor(sample.response.entropy)
        self.model.eval()
        for chunk in self._passes(unscored):
            for sample, logprobs, entropy in zip(chunk, *self.token_stats(self.unwrapped, chunk), strict=True):
                sample.logprobs, sample.entropy = logprobs, entropy
        if self.averages_padding:
            add_padding(samples)
            for chunk in self._passes(samples):
                for sample, mean in zip(chunk, self._mean_entropies(chunk).tolist(), strict=True):
                    sample.mean_entropy = mean
        if self.needs_reference:
            self._score_by_reference(samples)

    def _score_by_reference(self, samples: Sequence[Sample]) -> None:
        """Fill the logprobs of the policy as training began: of a copy, or of the base model under fresh adapters."""
        model = self.unwrapped if self.reference is None else self.reference
        with contextlib.nullcontext() if self.reference else disabled(self.model):
            for chunk in self._passes(samples):
                for sample, logprobs in zip(chunk, self.token_stats(model, chunk)[0], strict=True):
                    sample.ref_logprobs = logprobs

    def _passes(self, samples: Sequence[Sample]) -> list[list[Sample]]:
        """Micro-batches to pass through the model without a gradient: by all processes together if it is sharded."""
        return self._in_step(samples) if self.is_sharded else self._micro_batches(samples)

    def _in_step(self, samples: Sequence[Sample]) -> list[list[Sample]]:
        """Micro-batches, as many on every process; none where no process has a sample."""
        return in_step(self._micro_batches(samples), self.accelerator, pad_token_id=self.pad_token_id)

    def update(self, samples: Sequence[Sample], step: int) -> dict[str, float]:
        """Learn from the rollout, ``epochs`` passes of ``minibatches`` optimizer steps each, and return its metrics.

        An optimizer step whose loss or gradient norm is not finite on any process is skipped on all. Raises
        FloatingPointError after ``_MAX_SKIPPED`` of them in a row.
        """
        optim = self.optim
        totals = LossTotals()
        norms: list[float] = []
        num_skipped = 0
        drift: list[tuple[Sample, Recomputed, Recomputed]] = []
        self.model.train()
        for epoch in range(optim.epochs):
            seed = derive_seed(self.seed, "minibatches", step, epoch)
            for number, part in enumerate(minibatches(samples, optim.minibatches, seed=seed)):
                own = LossTotals()
                pairs = self.accumulate_gradient(part, own)
                if epoch == number == 0:  # the weights are still those that the step began with
                    drift = pairs
                norm = float(whole(self.accelerator.clip_grad_norm_(self.policy.parameters(), optim.max_grad_norm)))
                learning_rate = self._set_learning_rate(
                    ((step - 1) * optim.epochs + epoch) * optim.minibatches + number
                )
                if self._everywhere(math.isfinite(own.loss) and math.isfinite(norm)):
                    self.optimizer.step()
                    self.skipped_in_a_row = 0
                    norms.append(norm)
                    totals.merge(own)
                else:
                    self._skip(step)
                    num_skipped += 1
                self.optimizer.zero_grad()
        drifts = drift_metrics(gather_object(drift))
        return (
            totals.metrics(len(norms))
            | drifts
            | {
                "grad/norm": fmean(norms) if norms else math.nan,
                "optim/lr": learning_rate,
                "optim/skipped": float(num_skipped),
            }
        )

    @torch.no_grad()
    def check_finite(self, samples: Sequence[Sample]) -> None:
        """Raise FloatingPointError unless the weights, their squares and the entropy of some samples are finite.

        All processes call it. Where the squares overflow, a model with RMS norms predicts the same for every prompt.
        """
        finite = all(_is_bounded(own_part(value)) for value in self.model.parameters())
        self.model.eval()
        for chunk in self._passes(samples[: self.optim.micro_batch_size]):
            entropies = self.token_stats(self.unwrapped, chunk)[1]
            finite = finite and all(bool(entropy.isfinite().all()) for entropy in entropies)
        if not self._everywhere(finite):
            raise FloatingPointError("the weights, their squares, or the logits are not finite; training diverged")

    def _everywhere(self, condition: bool) -> bool:
        """Return whether the condition holds on all processes; all of them call it."""
        holds = torch.tensor([int(condition)], device=self.accelerator.device)
        return int(self.accelerator.reduce(holds, reduction="sum")) == self.accelerator.num_processes

    def _skip(self, step: int) -> None:
        self.skipped_in_a_row += 1
        if self.skipped_in_a_row == _MAX_SKIPPED:
            raise FloatingPointError(
                f"the loss or the gradient norm was not finite in {_MAX_SKIPPED} optimizer steps in a row, the last of "
                f"them in step {step}; training diverged"
            )

    def accumulate_gradient(
        self, part: Sequence[Sample], totals: LossTotals
    ) -> list[tuple[Sample, Recomputed, Recomputed]]:
        """Add the gradient of one optimizer step's loss, the same however ``part`` is cut into micro-batches.

        Returns the samples that took part with their recomputed logprobs and entropies.
        """
        normalizers = self._normalizers(part)
        # Gradients are averaged over processes, while the normalizers are already global.
        scale = self.accelerator.num_processes
        chunks = self._in_step(self._contributing(part))
        if not chunks:  # on no process; the metrics still want a response
            chunks = self._in_step(self._first_of_all(part))
        pairs: list[tuple[Sample, Recomputed, Recomputed]] = []
        for position, chunk in enumerate(chunks):
            batch = self._batch(chunk)
            with self._reducing(is_last=position == len(chunks) - 1):
                out = self._loss_of(batch, normalizers, self._entropy_term(chunk, batch, normalizers))
                self.accelerator.backward(out.loss * scale)
            if stands_in(chunk):
                continue
            totals.add(out)
            for sample, logprobs, entropy in zip(
                chunk, unpad(out.logprobs, batch), unpad(out.entropy, batch), strict=True
            ):
                pairs.append((sample, self._computed(sample, logprobs), self._computed(sample, entropy)))
        return pairs

    def _reducing(self, *, is_last: bool) -> AbstractContextManager[None]:
        """Within it the backward pass of a micro-batch reduces the gradient, or leaves that to a later one."""
        if self.is_sharded:
            set_synchronized(self.policy, is_last or self.optim.reduce_each_micro_batch)
            return contextlib.nullcontext()
        no_sync: AbstractContextManager[None] = self.accelerator.no_sync(self.policy)
        return contextlib.nullcontext() if is_last else no_sync

    def _computed(self, sample: Sample, values: Tensor) -> Recomputed:
        """The loss's value of each token; None of superseded tokens that it does not read."""
        if not self.masks_superseded:
            return values.tolist()
        flags = zip(values.tolist(), sample.response.superseded, strict=True)
        return [None if superseded else value for value, superseded in flags]

    def _has_loss(self, response: Response) -> list[bool]:
        """Of each token, whether a loss is taken of it: it counts, and ``correction.superseded`` does not mask it."""
        counted = counted_tokens(response, self.loss)
        if not self.masks_superseded:
            return counted
        return [counts and not old for counts, old in zip(counted, response.superseded, strict=True)]

    def token_stats(self, model: PolicyModel, chunk: Sequence[Sample]) -> tuple[list[Tensor], list[Tensor]]:
        """Return the logprobs and the entropies of each sample's response tokens, by a forward pass."""
        batch = self._batch(chunk)
        stats = self._stats_of(model, batch, batch.completion_mask)
        return unpad(stats.logprobs, batch), unpad(stats.entropy, batch)

    def _mean_entropies(self, chunk: Sequence[Sample]) -> Tensor:
        """Return the mean entropy of each sample by a forward pass, over its padding too, (B,)."""
        batch = self._batch(chunk)
        mask = entropy_mask(chunk, self.loss, batch.targets)
        return mean_over(self._stats_of(self.unwrapped, batch, mask).entropy, mask)

    def _stats_of(self, model: PolicyModel, batch: Batch, mask: Tensor) -> TokenStats:
        with self.accelerator.autocast():
            inputs = (batch.input_ids, batch.attention_mask)
            stats = model(*inputs, lambda hidden, head: self._stats(hidden, head, batch, mask), batch.position_ids)
        release(model)
        return stats

    def _stats(self, hidden: Tensor, head: LMHead, batch: Batch, mask: Tensor) -> TokenStats:
        """Return the statistics of the predictions that ``mask`` selects, 0 elsewhere, from hidden states (B, L, D)."""
        return linear_token_stats(
            hidden[:, :-1],
            head.weight,
            batch.targets.masked_fill(~mask, _IGNORE_INDEX),
            head.bias,
            temperature=self.loss.temperature,
            softcap=self.loss.softcap,
            logit_scale=self.loss.logit_scale,
            ignore_index=_IGNORE_INDEX,
            low_rank=head.low_rank(hidden[:, :-1]),
        )

    def _entropy_term(self, chunk: Sequence[Sample], batch: Batch, normalizers: Normalizers) -> EntropyTerm | None:
        if not self.learns_entropy:
            return None
        num_tokens = [sum(self._has_loss(sample.response)) for sample in chunk]
        slopes = loss_by_entropy(chunk, num_tokens, self.loss, normalizers)
        return EntropyTerm(entropy_mask(chunk, self.loss, batch.targets), slopes.to(batch.targets.device))

    def _set_learning_rate(self, update: int) -> float:
        """Set and return the rate of an optimizer step (0-based) of the run: no state, so nothing to save."""
        rate = self.optim.learning_rate * learning_rate_factor(update, self.optim, self.num_updates)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        return rate

    def _loss_of(self, batch: Batch, normalizers: Normalizers, term: EntropyTerm | None = None) -> GRPOLossOutput:
        corrects_sampler = self.loss.sampler_ratio_cap is not None
        reads_sampler = corrects_sampler or self.loss.off_policy_mask_threshold is not None
        off_policy = self.optim.epochs * self.optim.minibatches > 1 or corrects_sampler

        mask = batch.completion_mask
        if self.masks_superseded:
            mask = mask & ~batch.superseded_mask

        def loss(hidden: Tensor, head: LMHead) -> GRPOLossOutput:
            out = linear_edge_grpo_loss(
                hidden[:, :-1],
                head.weight,
                batch.targets,
                mask,
                head.bias,
                advantages=batch.advantages,
                # With one optimizer step per rollout the ratio's denominator is the current logprob, detached.
                old_logprobs=batch.logprobs if off_policy else None,
                ref_logprobs=batch.ref_logprobs,
                sampling_logprobs=batch.sampling_logprobs if reads_sampler else None,
                injected_mask=batch.injected_mask,
                truncated_mask=batch.truncated_mask,
                cu_seqlens=batch.cu_seqlens,
                **normalizers._asdict(),
                config=self.loss,
                low_rank=head.low_rank(hidden[:, :-1]),
            )
            return out if term is None else term.added_to(out, self._stats(hidden, head, batch, term.mask).entropy)

        with self.accelerator.autocast():
            return self.policy(batch.input_ids, batch.attention_mask, loss, batch.position_ids)

    def _normalizers(self, part: Sequence[Sample]) -> Normalizers:
        """Return the totals over all processes that make micro-batch losses add up to the whole step's loss."""
        part = [sample for sample in part if not sample.reward.skipped]
        tokens = sum(sum(self._has_loss(sample.response)) for sample in part)
        counts = torch.tensor([tokens, len(part)], dtype=torch.int64, device=self.accelerator.device)
        tokens, sequences = self.accelerator.reduce(counts, reduction="sum").tolist()
        threshold = None
        if self.loss.top_entropy_quantile < 1:
            entropies = gather_object(
                [
                    value
                    for sample in part
                    if sample.entropy is not None
                    for value, counts in zip(sample.entropy, self._has_loss(sample.response), strict=True)
                    if counts
                ]
            )
            if entropies:
                threshold = float(np.quantile(torch.stack(entropies).numpy(), 1 - self.loss.top_entropy_quantile))
        return Normalizers(max(tokens, 1), max(sequences, 1), threshold)

    def _contributing(self, part: Sequence[Sample]) -> Sequence[Sample]:
        """Return the samples whose gradient is not exactly zero: a collapsed group need not pass through the model.

        The others still count in the normalizers, unless they are skipped.
        """
        all_contribute = self.loss.beta or self.loss.entropy_coef or self.loss.injected == "sft"
        masks_truncated = self.loss.mask_truncated_completions
        return [
            sample
            for sample in part
            if not sample.reward.skipped
            and (all_contribute or sample.advantage != 0)
            and not (masks_truncated and sample.is_truncated)
        ]

    def _first_of_all(self, part: Sequence[Sample]) -> Sequence[Sample]:
        """Return one response of the first group that is not skipped, on the process that has it."""
        active = sorted((sample for sample in part if not sample.reward.skipped), key=lambda sample: sample.group)[:1]
        groups = gather_object([sample.group for sample in active])
        return [sample for sample in active if sample.group == min(groups)]

    def _batch(self, samples: Sequence[Sample]) -> Batch:
        if self.optim.packing:
            return pack(samples, self.accelerator.device)
        return pad(samples, self.pad_token_id, self.accelerator.device)

    def _micro_batches(self, samples: Sequence[Sample]) -> list[list[Sample]]:
        limits, is_packed = (self.optim.micro_batch_size, self.optim.micro_batch_tokens), self.optim.packing
        return list(micro_batches(samples, *limits, packed=is_packed))


def _is_bounded(weight: Tensor) -> bool:
    if not weight.numel():
        return True
    low, high = weight.aminmax()
    return float(low) >= -_LARGEST_WEIGHT and float(high) <= _LARGEST_WEIGHT  # false for NaN
