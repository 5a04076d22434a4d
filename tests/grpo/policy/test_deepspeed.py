"""PolicyModel under DeepSpeed: what a trainer of one's own gets from the fused loss under ZeRO with our recipes."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from paths import ROOT


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs DeepSpeed: make test-deepspeed")
def test_two_processes_make_the_step_that_one_makes():
    """Tied and own heads: ZeRO-3 gathers the weight as the loss reads it, which no module's forward does."""
    script = [str(Path(__file__).with_name("deepspeed_gradients.py")), str(ROOT / "examples")]
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *script],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    (found,) = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"ZeRO')]
    for name, value in found.items():
        print(name, value)
        assert value["held"] == pytest.approx(0.5 if name.startswith("ZeRO-3") else 1, abs=0.01), name
        assert value["gradient"] <= 2e-6, name
        assert value["norm"] <= 1e-6, name
        assert value["weights"] <= 1e-6, name  # of steps of 1e-3 at most
