"""Checkpoints appear whole or not at all, and old ones go."""

from __future__ import annotations

import pytest
import torch
from accelerate import Accelerator

from edge_grpo.run import checkpoint


@pytest.fixture
def prepared():
    accelerator = Accelerator(cpu=True)
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model, optimizer = accelerator.prepare(model, optimizer)
    return accelerator, model, optimizer


def train_once(model, optimizer):
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def test_a_loaded_checkpoint_continues_like_the_saved_run(tmp_path, prepared):
    accelerator, model, optimizer = prepared
    train_once(model, optimizer)
    checkpoint.save(accelerator, tmp_path, 1, keep=2)
    train_once(model, optimizer)
    expected = model.weight.detach().clone()
    train_once(model, optimizer)  # away from it
    assert checkpoint.load_latest(accelerator, tmp_path) == 1
    train_once(model, optimizer)
    assert torch.equal(model.weight, expected)


def test_only_the_newest_are_kept(tmp_path, prepared):
    accelerator, *_ = prepared
    for step in (1, 2, 3):
        checkpoint.save(accelerator, tmp_path, step, keep=2)
    assert checkpoint.steps(tmp_path) == [2, 3]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000002", "step-000003"]


def test_an_unfinished_checkpoint_is_never_loaded(tmp_path, prepared, monkeypatch):
    accelerator, *_ = prepared
    checkpoint.save(accelerator, tmp_path, 1, keep=2)

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(checkpoint.os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        checkpoint.save(accelerator, tmp_path, 2, keep=2)
    assert checkpoint.steps(tmp_path) == [1]
    assert checkpoint.load_latest(accelerator, tmp_path) == 1
    monkeypatch.undo()
    checkpoint.save(accelerator, tmp_path, 2, keep=2)  # what was left half-written is no obstacle
    assert checkpoint.steps(tmp_path) == [1, 2]


def test_nothing_to_resume_is_said(tmp_path, prepared):
    with pytest.raises(FileNotFoundError, match="nothing to resume"):
        checkpoint.load_latest(prepared[0], tmp_path / "absent")
