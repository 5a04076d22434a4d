"""Responses whose tokens are split over processes: the cases that processes.py runs beside those of the vocabulary.

Each compares with the op on all tokens, in one process: loss, results, metrics and gradients.
"""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from grpo_batch import LOSS_TYPES, B, T, config_of, inputs_for, make_batch, variant_of
from torch import Tensor
from traffic import close, counted, refuses

import edge_kernels
from edge_kernels import EDAConfig, parallel

PER_TOKEN = ("old_logprobs", "ref_logprobs", "sampling_logprobs", "injected_mask")

# Which columns of (B, T) each process has: uneven and out of order, as ring attention deals them; one without any.
COLUMNS = {3: ([1, 4], [0, 2, 3, 5], []), 2: ([5, 0, 3], [1, 2, 4])}
# Spans of the packed tokens (14, of responses with 6, 5, 0 and 3): cut within the first and the second response, at a
# response's end, so that one lies wholly on one process, and with nothing for the first.
SPANS = {3: [(0, 4, 9, 14), (0, 0, 11, 14)], 2: [(0, 8, 14), (0, 14, 14)]}
CU_SEQLENS = torch.tensor([0, 6, 11, 11, 14])
KEPT = torch.arange(T) < CU_SEQLENS.diff()[:, None]


class Shard:
    """This process's tokens of a batch: some columns, or a span of the packed row."""

    def __init__(self, columns: list[int] | None, span: tuple[int, int] = (0, 0)) -> None:
        self.columns, self.span = columns, span

    def __call__(self, value: Tensor) -> Tensor:
        if self.columns is not None:
            return value[:, self.columns]
        return value[KEPT][slice(*self.span)]

    @property
    def options(self) -> dict[str, Any]:
        start, stop = self.span
        return {} if self.columns is not None else {"cu_seqlens": (CU_SEQLENS - start).clamp(0, stop - start)}

    def inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        changed = {name: self(inputs[name]) for name in PER_TOKEN if inputs.get(name) is not None}
        return inputs | changed | self.options


def shards(group: Any) -> list[Shard]:
    world, rank = dist.get_world_size(group), dist.get_rank(group)
    spans = [Shard(None, ends[rank : rank + 2]) for ends in SPANS[world]]
    return [Shard(COLUMNS[world][rank]), *spans]


def compare(batch: SimpleNamespace, group: Any, shard: Shard, name: str, **inputs: Any) -> None:
    leaves = [x.detach().clone().requires_grad_() for x in (batch.hidden, batch.weight, batch.bias)]
    wanted = edge_kernels.linear_edge_grpo_loss(leaves[0], leaves[1], batch.targets, batch.mask, leaves[2], **inputs)
    expected = torch.autograd.grad(3 * wanted.loss, leaves)
    logits = F.linear(*leaves).detach().requires_grad_()
    (d_logits,) = torch.autograd.grad(
        3 * edge_kernels.edge_grpo_loss(logits, batch.targets, batch.mask, **inputs).loss, logits
    )
    own = [shard(leaves[0]).detach().requires_grad_(), *(x.detach().clone().requires_grad_() for x in leaves[1:])]
    own_logits, tokens = shard(logits).detach().requires_grad_(), (shard(batch.targets), shard(batch.mask))
    given = shard.inputs(inputs) | {"sequence_group": group}
    out = parallel.linear_edge_grpo_loss(own[0], own[1], *tokens, own[2], **given)
    from_logits = parallel.edge_grpo_loss(own_logits, *tokens, **given)
    with counted():  # every collective is in the forward pass
        gradients = [*torch.autograd.grad(3 * out.loss, own)]
        (own_gradient,) = torch.autograd.grad(3 * from_logits.loss, own_logits)
    for part in gradients[1:]:
        dist.all_reduce(part, group=group)
    close(own_gradient, shard(d_logits), f"{name}: gradient of logits")
    close(gradients[0], shard(expected[0]), f"{name}: gradient of hidden")
    close(gradients[1], expected[1], f"{name}: gradient of weight")
    close(gradients[2], expected[2], f"{name}: gradient of bias")
    for result in (out, from_logits):
        close(result.loss, wanted.loss, f"{name}: loss")
        close(result.advantages, wanted.advantages, f"{name}: advantages")
        close(result.entropy, shard(wanted.entropy), f"{name}: entropy")
        assert result.metrics.keys() == wanted.metrics.keys()
        for key, value in wanted.metrics.items():
            close(result.metrics[key], value, f"{name}: {key}")


def every_loss_of_split_responses(group: Any) -> None:
    batch = make_batch()
    for loss_type, variant in itertools.product(LOSS_TYPES, range(4)):
        config = variant_of(
            loss_type,
            variant,
            sampler_ratio_mode="token_mask" if loss_type == "vespo" or variant < 1 else "sequence_truncate",
        )
        kinds = shards(group)
        inputs = inputs_for(batch, config, with_old=variant != 3)
        compare(batch, group, kinds[variant % len(kinds)], f"{loss_type} {variant}", **inputs)


def advantages_of_split_responses(group: Any) -> None:
    """Entropy-driven advantages, from rewards, with and without a KL penalty in them; the means for a trainer."""
    batch = make_batch()
    for shard, coef in itertools.product(shards(group), (0.0, 0.3)):
        config = config_of("grpo", reward_kl_coef=coef, eda=EDAConfig(preserve_scale=True), entropy_coef=0.02)
        rewards = {"rewards": batch.rewards, "group_ids": batch.groups, "ref_logprobs": batch.ref}
        compare(batch, group, shard, f"rewards {coef}", **rewards, config=config)
        entropy = batch.ref.abs()
        means = parallel.response_entropy(shard(entropy), shard(batch.mask), **shard.options, sequence_group=group)
        close(means, edge_kernels.response_entropy(entropy, batch.mask), "means")


def temperatures_and_totals_of_split_responses(group: Any) -> None:
    batch = make_batch()
    batch.bias = torch.zeros_like(batch.bias)  # a temperature for each response takes none
    for shard in shards(group):
        config = config_of("luspo", importance_sampling_level="sequence", top_entropy_quantile=0.5)
        inputs = inputs_for(batch, config) | {"num_items": 40, "num_sequences": 9, "entropy_threshold": 1.5}
        compare(batch, group, shard, "totals", **inputs)
        masked = SimpleNamespace(**vars(batch) | {"mask": torch.zeros_like(batch.mask)})
        compare(masked, group, shard, "masked", **inputs_for(batch, config))
        whole = edge_kernels.edge_grpo_loss(
            F.linear(batch.hidden, batch.weight), batch.targets, batch.mask, **inputs, temperature=TEMPERATURES
        )
        own = parallel.linear_edge_grpo_loss(
            shard(batch.hidden), batch.weight, shard(batch.targets), shard(batch.mask), **shard.inputs(inputs),
            temperature=TEMPERATURES, sequence_group=group,
        )  # fmt: skip
        close(own.loss, whole.loss, "temperatures")


TEMPERATURES = torch.tensor([0.5, 2.0, 1.0, 0.7], dtype=torch.float64)


def vocabulary_and_responses_split(group: Any) -> None:
    """Both at once: the columns of the vocabulary on a group of one, tokens on the others, and the reverse."""
    world = dist.get_world_size()
    if dist.get_world_size(group) != world:
        return
    alone = [dist.new_group([rank]) for rank in range(world)][dist.get_rank()]
    batch = make_batch()
    inputs = inputs_for(batch, config_of("geo_mean", beta=0.04))
    wanted = edge_kernels.linear_edge_grpo_loss(
        batch.hidden, batch.weight, batch.targets, batch.mask, batch.bias, **inputs
    )
    (expected,) = torch.autograd.grad(wanted.loss, batch.hidden)
    shard, vocab = shards(group)[1], len(batch.weight)
    columns = slice(*(vocab * end // world for end in (dist.get_rank(), dist.get_rank() + 1)))
    for cut, rows, groups in (
        (shard, slice(None), {"group": alone, "sequence_group": group}),
        (lambda x: x, columns, {"group": group, "sequence_group": alone}),
    ):
        hidden = cut(batch.hidden).detach().requires_grad_()
        given = shard.inputs(inputs) if cut is shard else inputs
        out = parallel.linear_edge_grpo_loss(
            hidden, batch.weight[rows], cut(batch.targets), cut(batch.mask), batch.bias[rows], **given, **groups
        )
        close(out.loss, wanted.loss, "both: loss")
        close(torch.autograd.grad(out.loss, hidden)[0], cut(expected), "both: gradient")


def traffic_of_split_responses(group: Any) -> None:
    """The lengths, then what the loss sums, then the loss itself with its metrics; nothing of size V or D."""
    batch, world = make_batch(), dist.get_world_size(group)
    shard = shards(group)[0]
    agreed, lengths, whole = ("allgather_", 8 * 6 * world), ("allreduce_", 8 * B), ("allgather_", 8 * 12 * world)
    entropy = ("allreduce_", 2 * 8 * B)
    ratio = [("allreduce_", 2 * 8 * B), ("allreduce_", 8 * B)]  # log ratios and lengths; the loss's slope by each ratio
    rewards = {"advantages": None, "rewards": batch.rewards, "group_ids": batch.groups}
    for options, more, expected in (
        ({}, {}, [lengths, whole]),
        ({"importance_sampling_level": "sequence"}, {}, [lengths, *ratio, whole]),
        ({"loss_type": "geo_mean"}, rewards, [lengths, entropy, *ratio, whole]),
        ({"loss_type": "vespo"}, rewards, [lengths, entropy, lengths, whole]),
    ):
        inputs = shard.inputs(inputs_for(batch, config_of(**options)) | more)
        tokens = (shard(batch.targets), shard(batch.mask), batch.bias)
        with counted(agreed, *expected):
            parallel.linear_edge_grpo_loss(
                shard(batch.hidden), batch.weight, *tokens, **inputs, sequence_group=group
            ).loss.backward()
    with counted(("allgather_", 8 * 2 * world), entropy):
        parallel.response_entropy(shard(batch.ref), shard(batch.mask), sequence_group=group)


def errors_of_split_responses(group: Any) -> None:
    """Values of a whole response are refused on every process, also on one without a token of it."""
    batch, shard = make_batch(), shards(group)[0]
    batch.advantages[1] = torch.nan
    inputs = shard.inputs(inputs_for(batch, config_of()))
    tokens = (shard(batch.targets), shard(batch.mask))
    arguments = (shard(batch.hidden), batch.weight, *tokens)
    refuses("advantages must be finite", parallel.linear_edge_grpo_loss, *arguments, **inputs, sequence_group=group)
    options = {"advantages": torch.ones(B), "cu_seqlens": CU_SEQLENS, "sequence_group": group}
    refuses("(N, V)", parallel.edge_grpo_loss, torch.zeros(2, 3, 4), *tokens, **options)


CASES = (
    every_loss_of_split_responses,
    advantages_of_split_responses,
    temperatures_and_totals_of_split_responses,
    vocabulary_and_responses_split,
    traffic_of_split_responses,
    errors_of_split_responses,
)
