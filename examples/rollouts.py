"""What every example learns from: responses that the policy samples to additions, rewarded for the right answer."""

from __future__ import annotations

import importlib.resources
import random
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

TINY = str(importlib.resources.files("edge_grpo") / "tiny")  # 685,000 parameters; any causal model's name does as well
MAX_NEW_TOKENS = 24


class Rollout(NamedTuple):
    """Prompts end where responses begin, padded on both sides: L tokens, of which the last T = L - 1 are predicted."""

    input_ids: Tensor  # (B, L), int64
    attention_mask: Tensor  # (B, L), int64
    completion_mask: Tensor  # (B, T), bool: which predictions are the policy's own
    rewards: Tensor  # (B,)
    group_ids: Tensor  # (B,): responses to one prompt form a group


def load() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(TINY, padding_side="left")
    return AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32), tokenizer


@torch.no_grad()
def sample(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, step: int, num_prompts: int = 4, group_size: int = 8
) -> Rollout:
    """Return ``group_size`` responses to each of ``num_prompts`` additions."""
    draw = random.Random(step)
    sums = [(draw.randrange(10, 50), draw.randrange(10, 50)) for _ in range(num_prompts)]
    chats = [[{"role": "user", "content": f"What is {a} + {b}?"}] for a, b in sums]
    prompts = tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
    )
    input_ids = model.generate(
        **prompts, max_new_tokens=MAX_NEW_TOKENS, num_return_sequences=group_size, do_sample=True, top_k=0
    )
    responses = input_ids[:, prompts["input_ids"].shape[1] :]
    is_end = responses == tokenizer.eos_token_id
    is_own = is_end.cumsum(1) - is_end.long() == 0  # up to the first end of sequence, which is the policy's own
    prompt_mask = prompts["attention_mask"].repeat_interleave(group_size, dim=0)
    completion_mask = torch.cat([torch.zeros_like(prompt_mask[:, 1:], dtype=torch.bool), is_own], dim=1)
    texts = tokenizer.batch_decode(responses)
    rewards = [float(f"\\boxed{{{sum(sums[i // group_size])}}}" in text) for i, text in enumerate(texts)]
    group_ids = torch.arange(len(texts)) // group_size
    attention_mask = torch.cat([prompt_mask, is_own.long()], dim=1)
    return Rollout(input_ids, attention_mask, completion_mask, torch.tensor(rewards), group_ids)
