"""The same under Lightning Fabric: devices, precision and gradient reduction are Fabric's.

python examples/fabric_loop.py --steps 20 --devices 2
"""

from __future__ import annotations

import argparse

import torch
from lightning_fabric import Fabric
from rollouts import load, sample
from torch import Tensor, nn

from edge_kernels import linear_edge_grpo_loss


class HiddenStates(nn.Module):
    """What Fabric wraps: its own forward must be called, or gradients would not be reduced."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.model.model(input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state


def main(steps: int, devices: int) -> None:
    fabric = Fabric(accelerator="auto", devices=devices)
    fabric.launch()
    model, tokenizer = load()
    policy, optimizer = fabric.setup(HiddenStates(model), torch.optim.AdamW(model.parameters(), lr=3e-4))
    for step in range(steps):
        torch.manual_seed(step * devices + fabric.global_rank)
        batch = sample(model, tokenizer, step * devices + fabric.global_rank, num_prompts=2)
        count = fabric.all_reduce(batch.completion_mask.sum(), reduce_op="sum")
        out = linear_edge_grpo_loss(
            policy(batch.input_ids, batch.attention_mask)[:, :-1],
            model.lm_head.weight,
            batch.input_ids[:, 1:],
            batch.completion_mask,
            rewards=batch.rewards,
            group_ids=batch.group_ids,
            num_items=count,  # of all processes, so that their losses add up
        )
        fabric.backward(out.loss * devices)  # gradients are averaged over processes
        optimizer.step()
        optimizer.zero_grad()
        reward = fabric.all_reduce(batch.rewards.mean(), reduce_op="mean")
        loss = fabric.all_reduce(out.loss.detach(), reduce_op="sum")
        fabric.print(f"step {step + 1}  reward {reward:.3f}  loss {loss:+.6f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--devices", type=int, default=1)
    main(**vars(parser.parse_args()))
