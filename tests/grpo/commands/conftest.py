"""The fixture ``trainer``: commands that train get a ``FakeTrainer``, in an empty working directory."""

from __future__ import annotations

import sys
import types
from pathlib import Path

import pytest
from fake_trainer import FakeTrainer


@pytest.fixture
def trainer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FakeTrainer:
    fake = FakeTrainer()
    module = types.ModuleType("edge_grpo.trainer")
    module.train = fake.train  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "edge_grpo.trainer", module)
    monkeypatch.chdir(tmp_path)
    return fake
