"""A step on a local Ray cluster: TransferQueue, reward workers, our manager and its actor, advantages."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("tensordict", reason="verl's requirements: make test-verl")
pytest.importorskip("verl.trainer.ppo.v1", reason="verl's requirements: make test-verl")

from verl_runs import environment


@pytest.mark.slow
def test_a_collapsed_group_is_corrected_and_the_other_weighted(tmp_path):
    script = Path(__file__).with_name("verl_cluster.py")
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path)],
        env=environment(tmp_path),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (line,) = (line for line in done.stdout.splitlines() if line.startswith('{"uids"'))
    found = json.loads(line)
    assert sorted(found["uids"]) == ["first"] * 4 + ["second"] * 4
    for place, uid in enumerate(found["uids"]):
        is_corrected = uid == "first"  # all four were wrong; of the second group's, one was right
        assert found["kinds"][place] == ("answer" if is_corrected else None)
        assert (found["masked"][place] > 0) == is_corrected
        if is_corrected:
            assert (found["rewards"][place], found["advantages"][place]) == (1, 0)
    second = [place for place, uid in enumerate(found["uids"]) if uid == "second"]
    assert sorted(found["rewards"][place] for place in second) == [0, 0, 0, 1]
    for place in second:  # (r - 1/4) / (1/2 + 1e-6), times the weight
        expected = (found["rewards"][place] - 0.25) / 0.5 * found["weights"][place]
        assert found["advantages"][place] == pytest.approx(expected, rel=1e-5)
    assert found["metrics"] == {
        "correction/answer": 4,
        "accuracy/before": 1 / 8,
        "eda/weight_max": pytest.approx(max(found["weights"]), rel=1e-5),
    }
