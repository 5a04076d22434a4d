"""The same with FSDP2: parameters sharded layer by layer, the loss inside the root's forward, where its head is whole.

torchrun --standalone --nproc-per-node 2 examples/fsdp2.py --steps 20
"""

from __future__ import annotations

import argparse

import torch
import torch.distributed as dist
from rollouts import Rollout, load, sample
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from edge_kernels import linear_edge_grpo_loss


class Policy(nn.Module):
    """Head, embedding and norm are the root's own parameters: gathered during its forward and not outside of it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Rollout, num_items: Tensor) -> Tensor:
        hidden = self.model.model(batch.input_ids, attention_mask=batch.attention_mask).last_hidden_state[:, :-1]
        inputs = (hidden, self.model.lm_head.weight, batch.input_ids[:, 1:], batch.completion_mask)
        advantages = {"rewards": batch.rewards, "group_ids": batch.group_ids}
        return linear_edge_grpo_loss(*inputs, **advantages, num_items=num_items).loss


def main(steps: int) -> None:
    dist.init_process_group("gloo")  # nccl, where there are GPUs
    world, rank = dist.get_world_size(), dist.get_rank()
    (model, tokenizer), (sampler, _) = load(), load()  # whoever samples needs whole weights: an engine of its own
    for layer in model.model.layers:
        fully_shard(layer)
    optimizer = torch.optim.AdamW((policy := fully_shard(Policy(model))).parameters(), lr=3e-4)
    for step in range(steps):
        torch.manual_seed(step * world + rank)
        batch = sample(sampler, tokenizer, step * world + rank, num_prompts=2)
        dist.all_reduce(num_items := batch.completion_mask.sum())  # of all processes, so that their losses add up
        loss = policy(batch, num_items)
        (loss * world).backward()  # gradients are averaged over processes
        optimizer.step()
        optimizer.zero_grad()
        for own, sharded in zip(sampler.parameters(), model.parameters(), strict=True):
            own.data.copy_(sharded.full_tensor())  # one at a time
        dist.all_reduce(report := torch.stack([batch.rewards.mean() / world, loss.detach()]))
        if rank == 0:
            print(f"step {step + 1}  reward {report[0]:.3f}  loss {report[1]:+.6f}")
    dist.destroy_process_group()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=20)
    main(parser.parse_args().steps)
