"""The same under torch.compile: model and loss as one graph, which serves every length.

python examples/compiled.py --steps 20
"""

from __future__ import annotations

import argparse

import torch
from rollouts import Rollout, load, sample
from torch import Tensor

from edge_kernels import GRPOLossConfig, linear_edge_grpo_loss


def main(steps: int) -> None:
    model, tokenizer = load()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4)
    config = GRPOLossConfig()

    @torch.compile(dynamic=True)
    def loss_of(batch: Rollout) -> Tensor:
        hidden = model.model(batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).last_hidden_state
        return linear_edge_grpo_loss(
            hidden[:, :-1],
            model.lm_head.weight,
            batch.input_ids[:, 1:],
            batch.completion_mask,
            rewards=batch.rewards,
            group_ids=batch.group_ids,
            config=config,
        ).loss

    for step in range(steps):
        batch = sample(model, tokenizer, step)
        loss = loss_of(batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step + 1}  reward {batch.rewards.mean():.3f}  loss {loss:+.6f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=20)
    main(parser.parse_args().steps)
