"""What the tests of the training loop share: the configuration of a very small run."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from edge_grpo.config import DataConfig, OptimConfig, RolloutConfig, TrainConfig


@pytest.fixture
def one_thread() -> Iterator[None]:
    """The tensors are small: waking a second thread costs more than it does, and more yet on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def config(tmp_path: Path) -> TrainConfig:
    """Two groups of four short responses: small, yet with right and wrong answers and several micro-batches."""
    return TrainConfig(
        output=str(tmp_path / "run"),
        steps=2,
        save_every=0,
        data=DataConfig(train="arithmetic:1,2"),
        rollout=RolloutConfig(num_prompts=2, num_generations=4, max_completion_length=24),
        optim=OptimConfig(learning_rate=1e-3, micro_batch_size=3),
    )
