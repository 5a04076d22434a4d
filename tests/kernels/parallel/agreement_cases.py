"""Arguments that are wrong on one process alone, or differ, which no process may wait for or take for right."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from grpo_batch import V, config_of, inputs_for, make_batch
from sequence_cases import shards
from traffic import refuses, without_reading

from edge_kernels import parallel


def wrong_for_split_responses(group: Any) -> None:
    is_wrong = dist.get_rank(group) == 0
    world, is_everyone = dist.get_world_size(), dist.get_world_size(group) == dist.get_world_size()
    alone = [dist.new_group([rank]) for rank in range(world)][dist.get_rank()] if is_everyone else None
    for change, words in (
        ("target", ("targets must lie", "right on every rank")),
        ("advantages", ("advantages must be finite", "right on every rank")),
        ("dtype", ("targets must be int64", "right on every rank")),
        ("rewards", ("same rewards or advantages",)),
        ("groups", ("same group_ids",)),
        ("config", ("same config",)),
        ("optional", ("same config and optional",)),
        ("responses", ("number of responses",)),
    ):
        for shard in shards(group)[:2]:  # in both the first process has tokens
            batch = make_batch()
            inputs = shard.inputs(inputs_for(batch, config_of("grpo")))
            targets, mask, hidden = shard(batch.targets), shard(batch.mask), shard(batch.hidden)
            if change in ("rewards", "groups"):
                inputs |= {"advantages": None, "rewards": batch.rewards, "group_ids": batch.groups}
            if change == "advantages":
                inputs["advantages"] = torch.ones(targets.shape, dtype=torch.float64)
            if change == "advantages" and mask.dim() == 1:  # not to be taken for one of each response
                inputs["advantages"] = inputs["advantages"][None]
            if is_wrong and change == "target":
                targets = targets.masked_fill(mask, V)
            elif is_wrong and change == "advantages":
                inputs["advantages"][mask.view(inputs["advantages"].shape)] = torch.nan
            elif is_wrong and change == "dtype":
                targets = targets.int()
            elif is_wrong and change == "rewards":
                inputs["rewards"] = batch.rewards + torch.tensor([0, 0.1, 0, 0])
            elif is_wrong and change == "groups":
                inputs["group_ids"] = batch.groups.flip(0) * torch.tensor([1, 1, 1, 2])
            elif is_wrong and change == "config":
                inputs["config"] = config_of("geo_mean")
            elif is_wrong and change == "optional":
                inputs["ref_logprobs"] = shard(batch.ref)
            elif is_wrong and change == "responses":
                more = torch.zeros_like(inputs["advantages"][:1])
                inputs["advantages"] = torch.cat([inputs["advantages"], more])
                inputs["truncated_mask"] = torch.zeros(5, dtype=torch.bool)
                if "cu_seqlens" in inputs:
                    inputs["cu_seqlens"] = torch.cat([inputs["cu_seqlens"], inputs["cu_seqlens"][-1:]])
                else:
                    hidden, targets, mask = (torch.cat([x, x[:1]]) for x in (hidden, targets, mask))
                    for name in ("old_logprobs", "injected_mask"):
                        inputs[name] = torch.cat([inputs[name], inputs[name][:1]])
            said = words[0] if is_wrong else words[-1]
            logits = hidden @ batch.weight.t()
            places = {"sequence_group": group}
            refuses(said, parallel.linear_edge_grpo_loss, hidden, batch.weight, targets, mask, **inputs, **places)
            refuses(said, parallel.edge_grpo_loss, logits, targets, mask, **inputs, **places)
            if alone is not None and len(words) == 2:  # the other group's agreement is passed on
                places["group"] = alone
                refuses(said, parallel.edge_grpo_loss, logits, targets, mask, **inputs, **places)
    entropy = torch.ones(4 + is_wrong, 2)
    refuses("number of responses", parallel.response_entropy, entropy, entropy > 0, sequence_group=group)
    names = inputs_for(batch := make_batch(), config_of()) | {"advantages": None, "rewards": batch.rewards}
    shard = shards(group)[0]
    names = shard.inputs(names | {"group_ids": batch.groups * (dist.get_rank(group) + 1) + 7})  # the same groups
    parallel.linear_edge_grpo_loss(
        shard(batch.hidden), batch.weight, shard(batch.targets), shard(batch.mask), **names, sequence_group=group
    )


def wrong_for_a_split_vocabulary(group: Any) -> None:
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    logits, targets, sizes = torch.randn(4, 3), torch.tensor([0, 1, 2, 1]), [3] * world
    is_wrong = rank == 0
    batch = make_batch()
    for places in ({"group": group}, {"group": group, "vocab_sizes": sizes}):
        other = targets.clone()
        other[2] = 3 * world if is_wrong else 2
        refuses("same targets", parallel.token_stats, logits, other, **places)
        other[2] = 0 if is_wrong else 2
        refuses("same targets", parallel.token_stats, logits, other, **places)
        refuses("same targets", parallel.linear_token_stats, torch.ones(4, 5), torch.ones(3, 5), other, **places)
        rows = 4 - is_wrong
        refuses("same rows", parallel.token_stats, logits[:rows], targets[:rows], **places)
        said = "targets must be int64" if is_wrong else "right on every rank"
        refuses(said, parallel.token_stats, logits, targets.int() if is_wrong else targets, **places)
        temperature = torch.tensor([1.0, 2, 3, -1.0 if is_wrong else 4])
        said = "temperature must" if is_wrong else "right on every rank"
        refuses(said, parallel.token_stats, logits, targets, temperature=temperature, **places)
        wrong = batch.targets.masked_fill(batch.mask, 99) if is_wrong else batch.targets
        shard = torch.zeros(4, 6, 3)
        arguments = {"advantages": batch.advantages, **places}
        refuses("same targets", parallel.edge_grpo_loss, shard, wrong, batch.mask, **arguments)
        head = (torch.zeros(4, 6, 5), torch.zeros(3, 5))
        refuses("same targets", parallel.linear_edge_grpo_loss, *head, wrong, batch.mask, **arguments)
    disagreeing = [*sizes[:-1], 3]
    disagreeing[(rank + 1) % world] = 4  # each is right about its own
    refuses("same vocab_sizes", parallel.token_stats, logits, targets, group=group, vocab_sizes=disagreeing)
    said = "vocab_sizes must have" if is_wrong else "right on every rank"
    wrong_sizes = [4, *sizes[1:]] if is_wrong else sizes
    refuses(said, parallel.token_stats, logits, targets, group=group, vocab_sizes=wrong_sizes)
    with without_reading():
        places = {"group": group, "vocab_sizes": sizes}
        assert parallel.token_stats(logits, targets, **places).logprobs.isfinite().all()
        for name, options, given in (
            ("sizes", places | {"vocab_sizes": disagreeing}, targets),
            ("targets", places, targets + is_wrong),
        ):
            stats = parallel.token_stats(logits, given, **options)
            assert all(value.isnan().all() for value in stats), name


CASES = (wrong_for_split_responses, wrong_for_a_split_vocabulary)
