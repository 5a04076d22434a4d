"""Forward passes in step: every process makes the same number of them, whatever it has to learn from.

A gradient is reduced, and split parameters are gathered, by all processes together. One that is short of samples passes
a stand-in through the model, which has no token to learn from.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from accelerate import Accelerator
from torch import Tensor

from edge_grpo.batching import Sample
from edge_grpo.types import Example, Prompt, Response, Reward


def in_step(chunks: Sequence[list[Sample]], accelerator: Accelerator, *, pad_token_id: int) -> list[list[Sample]]:
    """Return this process's micro-batches and then stand-ins, as many as the process with most has micro-batches."""
    number = torch.tensor([len(chunks)], dtype=torch.int64, device=accelerator.device)
    most = int(accelerator.gather(number).max())
    return [*chunks, *([stand_in(pad_token_id)] for _ in range(most - len(chunks)))]


def stand_in(pad_token_id: int) -> Sample:
    """Return a sample without a response, of a prompt of two padding tokens."""
    prompt = Prompt(Example(-1, ""), "", (pad_token_id, pad_token_id))
    response = Response((), (), (), (), "stop")
    reward = Reward(0.0, {}, "wrong", skipped=True)
    none: Tensor = torch.zeros(0)
    return Sample(prompt, -1, response, reward, response, reward, none, none, none)


def stands_in(chunk: Sequence[Sample]) -> bool:
    return chunk[0].group < 0
