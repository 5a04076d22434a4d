"""Trains as each file says on so many processes, one file after the other: what test_gpu_recipes.py starts.

python train_on_processes.py NUMBER FILE [NUMBER FILE ...]
"""

from __future__ import annotations

import sys
from functools import partial

import torch
from forked import together

from edge_grpo.config import load_config
from edge_grpo.trainer import train

if __name__ == "__main__":
    torch.set_num_threads(1)
    for number, file in zip(sys.argv[1::2], sys.argv[2::2], strict=True):
        together(int(number), partial(train, load_config(file)), seconds=1800)
