"""One of two processes fails, over gloo: both raise, what it began is removed, and the next attempt succeeds.

What the processes do and compare is in failing_processes.py; a process that waits for the other is killed there. Other
ways in which one fails: test_colocated.py, test_shared_servers.py.
"""

from __future__ import annotations

import pytest
from forked import run_program

pytestmark = pytest.mark.slow


def test_weights_arrive_at_all_servers_or_both_processes_raise(tmp_path):
    """By NCCL's stand-in and by a folder, whole and split, with and without adapters, for one server and two."""
    run_program("failing_processes.py", "pushes", tmp_path)


def test_a_model_is_on_both_processes_or_both_raise(tmp_path):
    """Weights that are not finite, a path that one process does not have, and two models under one path."""
    run_program("failing_processes.py", "models", tmp_path)


def test_a_checkpoint_is_whole_or_both_processes_raise(tmp_path):
    """Each process in turn may write no more; and process 1 does not see yet what process 0 has written."""
    run_program("failing_processes.py", "checkpoints", tmp_path)
