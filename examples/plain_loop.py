"""A training loop of one's own: a Hugging Face model, plain PyTorch, and the fused loss with entropy-driven advantages.

python examples/plain_loop.py --steps 20
"""

from __future__ import annotations

import argparse

import torch
from rollouts import load, sample

from edge_kernels import GRPOLossConfig, linear_edge_grpo_loss


def main(steps: int) -> None:
    model, tokenizer = load()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4)
    for step in range(steps):
        batch = sample(model, tokenizer, step)
        # The base model, without its head: hidden states instead of logits, which would take V / D times the memory.
        hidden = model.model(batch.input_ids, attention_mask=batch.attention_mask).last_hidden_state
        out = linear_edge_grpo_loss(
            hidden[:, :-1],  # the state at a token predicts the next one
            model.lm_head.weight,
            batch.input_ids[:, 1:],
            batch.completion_mask,
            rewards=batch.rewards,
            group_ids=batch.group_ids,
            config=GRPOLossConfig(),
        )
        out.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step + 1}  reward {batch.rewards.mean():.3f}  loss {out.loss:+.6f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=20)
    main(parser.parse_args().steps)
