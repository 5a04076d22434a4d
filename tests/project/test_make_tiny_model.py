"""The script that makes the shipped model, from start to end with one step of training each phase."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from paths import ROOT

import edge_grpo
from edge_grpo.config import ModelConfig
from edge_grpo.data.arithmetic import LEVELS
from edge_grpo.policy.loading import load_model

pytestmark = pytest.mark.slow


SHIPPED = Path(edge_grpo.__path__[0]) / "tiny"


def test_a_step_of_each_phase_gives_a_model_that_loads(tmp_path: Path) -> None:
    script = [ROOT / "scripts" / "make_tiny_model.py", "--steps", "1", "1", "--problems", "1", "--output", tmp_path]
    done = subprocess.run(
        [sys.executable, *script],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    model, tokenizer = load_model(ModelConfig(path=str(tmp_path)))
    shipped, _ = load_model(ModelConfig(path=str(SHIPPED)))
    assert tokenizer.encode("1 + 1") != []
    shapes = {name: value.shape for name, value in model.state_dict().items()}
    assert shapes == {name: value.shape for name, value in shipped.state_dict().items()}
    assert all(value.isfinite().all() for value in model.state_dict().values())
    assert not torch.equal(model.lm_head.weight, shipped.lm_head.weight)
    # What does not depend on the training is what is shipped, to the byte.
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (tmp_path / name).read_bytes() == (SHIPPED / name).read_bytes(), name
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "Accuracy on 1 held-out problems per level" in card
    levels = re.findall(r"^\| (\w+) \|(?: \d+ % \|){5}$", card, re.MULTILINE)
    assert levels == [*map(str, LEVELS), "all"]
