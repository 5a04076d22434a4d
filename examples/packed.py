"""A loop of one's own without padding: all sequences in one row, which attention and the loss keep apart.

python examples/packed.py --steps 20
"""

from __future__ import annotations

import argparse

import torch
from rollouts import load, sample

from edge_kernels import GRPOLossConfig, cumulative_lengths, linear_edge_grpo_loss


def main(steps: int) -> None:
    model, tokenizer = load()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4)
    for step in range(steps):
        batch = sample(model, tokenizer, step)
        real = batch.attention_mask.bool()
        positions = batch.attention_mask.cumsum(1) - 1
        predicts = torch.nn.functional.pad(batch.completion_mask, (0, 1))  # a row's last position predicts nothing
        input_ids, position_ids, mask = (value[real][None] for value in (batch.input_ids, positions, predicts))
        # transformers makes a block-diagonal mask of positions that start again, but not where it has a cache to fill:
        # there sequences would see each other, without an error.
        hidden = model.model(input_ids, position_ids=position_ids, use_cache=False).last_hidden_state  # (1, N, D)
        out = linear_edge_grpo_loss(
            hidden,
            model.lm_head.weight,
            input_ids.roll(-1, dims=1),  # past the end of a sequence: the next one's first token, which is masked
            mask & (position_ids.roll(-1, dims=1) > 0),
            rewards=batch.rewards,
            group_ids=batch.group_ids,
            cu_seqlens=cumulative_lengths(position_ids),
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
