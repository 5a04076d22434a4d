"""The examples run as their first lines say, and learn from the same loss."""

from __future__ import annotations

import functools
import importlib.util
import os
import re
import subprocess
import sys

import pytest
from paths import ROOT

EXAMPLES = ROOT / "examples"
OTHERS = ["rollouts.py", "trl_zero.py"]  # what all share, and TRL's trainer: test_trl_zero.py
LOOPS = sorted(path.name for path in EXAMPLES.glob("*.py") if path.name not in OTHERS)
STEP = re.compile(r"^step (\d+)  reward ([\d.]+)  loss ([+-][\d.]+)$", re.MULTILINE)
NEEDS = {"lora_checkpointing.py": "peft", "fabric_loop.py": "lightning_fabric", "zero.py": "deepspeed"}
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
LAUNCH = {"fsdp2.py": TORCHRUN, "zero.py": TORCHRUN}
ARGUMENTS = {"fabric_loop.py": ["--devices", "2"], "zero.py": ["--config", str(EXAMPLES / "zero3.json")]}


@functools.cache
def run(name: str, steps: int = 2) -> list[tuple[float, float]]:
    """Return the reward and the loss of each step that an example prints."""
    if name in NEEDS and importlib.util.find_spec(NEEDS[name]) is None:
        pytest.skip(f"{name} needs {NEEDS[name]}")
    command = [sys.executable, *LAUNCH.get(name, []), str(EXAMPLES / name), "--steps", str(steps)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, *ARGUMENTS.get(name, [])], env=environment, capture_output=True, text=True, check=False, timeout=400
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = STEP.findall(done.stdout)
    assert [int(number) for number, _, _ in found] == list(range(1, steps + 1))
    return [(float(reward), float(loss)) for _, reward, loss in found]


@pytest.mark.slow
@pytest.mark.parametrize("name", LOOPS)
def test_an_example_runs(name):
    steps = run(name)
    assert all(0 <= reward <= 1 for reward, _ in steps)
    assert any(loss != 0 for _, loss in steps)  # entropy-driven advantages of a group do not add up to 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("plain_loop.py", "compiled.py"),
        ("plain_loop.py", "packed.py"),
        ("fabric_loop.py", "fsdp2.py"),
        ("fsdp2.py", "zero.py"),
    ],
)
def test_two_ways_to_the_same_first_loss(one, other):
    """Compiled or not; padded or packed; on two processes, with whole parameters or with shards."""
    assert run(one)[0] == pytest.approx(run(other)[0], abs=1e-5)


@pytest.mark.parametrize("name", [*LOOPS, *OTHERS])
def test_an_example_is_short_and_names_its_command(name):
    lines = (EXAMPLES / name).read_text(encoding="utf-8").splitlines()
    assert len(lines) < 60
    if name != "rollouts.py":
        assert lines[2].strip().split()[:2] in (["python", f"examples/{name}"], ["torchrun", "--standalone"])
