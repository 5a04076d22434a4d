"""One of two processes fails, over gloo: both raise, what it began is removed, and the next attempt succeeds.

What the processes do and compare is in failing_processes.py; a process that waits for the other is killed there. Other
ways in which one fails: test_colocated.py, test_shared_servers.py.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow


def run(*arguments: str | Path) -> None:
    script = str(Path(__file__).with_name("failing_processes.py"))
    result = subprocess.run(
        [sys.executable, script, *map(str, arguments)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-6000:]


def test_weights_arrive_at_all_servers_or_both_processes_raise(tmp_path):
    """By NCCL's stand-in and by a folder, whole and split, with and without adapters, for one server and two."""
    run("pushes", tmp_path)


def test_a_checkpoint_is_whole_or_both_processes_raise(tmp_path):
    """Each process in turn may write no more; and process 1 does not see yet what process 0 has written."""
    run("checkpoints", tmp_path)
