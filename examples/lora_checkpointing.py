"""The same with PEFT: LoRA on every linear layer, activations recomputed in the backward pass.

python examples/lora_checkpointing.py --steps 20
"""

from __future__ import annotations

import argparse

import torch
from peft import LoraConfig, get_peft_model
from rollouts import load, sample

from edge_kernels import linear_edge_grpo_loss


def main(steps: int) -> None:
    model, tokenizer = load()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    adapted = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"))
    optimizer = torch.optim.AdamW((p for p in adapted.parameters() if p.requires_grad), lr=3e-3)
    base, head = adapted.get_base_model().model, adapted.get_base_model().lm_head
    for step in range(steps):
        adapted.eval()
        batch = sample(adapted, tokenizer, step)
        adapted.train()
        hidden = base(batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).last_hidden_state
        out = linear_edge_grpo_loss(
            hidden[:, :-1],
            head.weight,  # frozen: its gradient is not computed
            batch.input_ids[:, 1:],
            batch.completion_mask,
            rewards=batch.rewards,
            group_ids=batch.group_ids,
        )
        out.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step + 1}  reward {batch.rewards.mean():.3f}  loss {out.loss:+.6f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=20)
    main(parser.parse_args().steps)
