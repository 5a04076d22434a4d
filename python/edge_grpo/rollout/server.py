"""Rollouts with a `vllm serve` process on another GPU or machine: token ids over HTTP, weights by NCCL or a folder.

The server is an ordinary one in development mode (``VLLM_SERVER_DEV_MODE=1``), whose routes for reinforcement learning
take the weights. Here is the trainer's side; ``serve`` starts the server. Nothing here imports vLLM.
"""

from __future__ import annotations

import http.client
import json
import os
import shutil
import sys
import threading
import time
import urllib.error
import urllib.request
import uuid
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from accelerate import PartialState
from torch import nn
from transformers import PreTrainedTokenizerBase

from edge_grpo.config import TrainConfig
from edge_grpo.policy.loading import eos_token_ids
from edge_grpo.policy.model import unwrap
from edge_grpo.rollout.serve import log_path
from edge_grpo.rollout.wire import Request, max_length_of, requests_of, response_of, save_weights, verify
from edge_grpo.types import Response, RolloutError, Sampling

_ATTEMPTS = 3  # of a request that fails for want of a connection or by the server's fault
_PAUSE = 1.0  # seconds before the second attempt, twice as long before the third
_HEALTH_EVERY = 5.0  # seconds between health checks while the server generates, and the time limit of each
_HEALTH_MISSES = 3  # failed checks in a row after which it counts as dead
_CONNECTIONS = 64
_LOG_LINES = 20


class _UnavailableError(Exception):
    """The server was not reached, did not answer in time, or failed; another attempt may succeed."""


class ServerEngine:
    """Samples at ``rollout.server`` and sends it the policy's weights.

    Weights go by vLLM's NCCL transfer from GPU to GPU, or as a file through ``rollout.server_folder``. Each push has a
    version of its own, and every token must have been sampled under the latest one: a server that was restarted, or
    that takes weights from another trainer, is noticed before anything is trained on.

    A request is attempted three times. While the server samples its health is checked, so that a dead one is noticed
    within half a minute even where no connection breaks. In a distributed run every process generates its own prompts
    and the first one sends the weights.
    """

    def __init__(self, config: TrainConfig, model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> None:
        policy = unwrap(model)
        self._rollout = config.rollout
        self._url = f"http://{config.rollout.server}"
        self._log = log_path(config)
        self._eos_token_ids = eos_token_ids(policy, tokenizer)
        self._max_length = max_length_of(config, policy)
        self._process = PartialState()
        self._channel: Any = None
        self._version = ""
        if config.rollout.server_folder is None and policy.device.type == "cpu":
            raise ValueError(
                "rollout.server_folder is null, so weights would go by NCCL, but the policy is on the CPU; "
                "name a folder that trainer and server both see"
            )
        self._await_start()
        holds = int(self._ask("/v1/models")["data"][0]["max_model_len"])
        if holds < self._max_length:
            raise ValueError(
                f"the vLLM server at {self._url} holds sequences of {holds} tokens, but this run makes up to "
                f"{self._max_length}; start it with --max-model-len {self._max_length}"
            )
        if self._process.is_main_process and self._rollout.server_folder is None:
            from edge_grpo.rollout.vllm import NCCLChannel

            self._ask("/shutdown_weight_transfer_engine", {})  # of an earlier run
            world_size = int(self._ask("/get_world_size")["world_size"])
            self._channel = NCCLChannel(self._url, policy, world_size=world_size, timeout=self._rollout.timeout)
        self.update_weights(policy)
        if self._process.is_main_process:
            verify(self, policy, seed=config.seed)

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, *, seed: int, places: Sequence[int] | None = None
    ) -> list[Response]:
        """Return one response per prompt, in order; see ``RolloutEngine``. Entropy is not known."""
        requests = requests_of(
            prompts,
            sampling,
            seed=seed,
            places=places,
            eos_token_ids=self._eos_token_ids,
            max_length=self._max_length,
            max_n=self._rollout.batch_size,
        )
        answers = self._ask_all(requests)
        return [
            response
            for request, answer in zip(requests, answers, strict=True)
            for response in self._responses(request, answer, sampling)
        ]

    def update_weights(self, model: nn.Module) -> None:
        """Make the server sample with ``model``'s parameters. All processes call it."""
        if self._process.is_main_process:
            self._version = f"edge-grpo-{uuid.uuid4().hex}"
            if self._channel is None:
                self._send_by_folder(model)
            else:
                try:
                    self._channel.send()
                except Exception as error:
                    raise self._failure(f"did not take the new weights by NCCL ({_reason(error)})") from error
            self._ask("/reset_prefix_cache", {})
            self._ask("/update_weight_version", {"new_version": self._version})
        self._process.wait_for_everyone()
        if not self._process.is_main_process:
            self._version = self._ask("/weight_info")["weight_version"]

    def sleep(self) -> None:
        """Do nothing: the server does not share the trainer's memory."""

    def close(self) -> None:
        if self._channel is not None:
            self._channel.close()
            self._channel = None

    # ------------------------------------------------------------------ weights

    def _send_by_folder(self, model: nn.Module) -> None:
        # A new name each time, which no cache of a network file system holds.
        folder = Path(str(self._rollout.server_folder)).resolve() / f"weights-{self._version}"
        try:
            save_weights(unwrap(model), folder)
            self._ask("/collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}})
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    # ------------------------------------------------------------------ generation

    def _ask_all(self, requests: Sequence[Request]) -> list[Any]:
        """Return the answers to all requests, in order; raise where one fails for good or the server is dead."""
        answers: list[Any] = [None] * len(requests)
        waiting = deque(enumerate(requests))
        errors: list[Exception] = []
        stop = threading.Event()
        progress = threading.Condition()
        done = 0

        def work() -> None:
            nonlocal done
            while not stop.is_set():
                try:
                    place, request = waiting.popleft()
                except IndexError:
                    return
                body = {"token_ids": list(request.prompt), "sampling_params": dict(request.sampling_params)}
                try:
                    answers[place] = self._ask("/inference/v1/generate", body, stop=stop)
                except Exception as error:
                    errors.append(error)
                with progress:
                    done += 1
                    progress.notify()

        # Daemons, so that a process which gives up does not wait for a dead connection.
        for _ in range(min(len(requests), _CONNECTIONS)):
            threading.Thread(target=work, daemon=True).start()
        misses = 0
        try:
            while True:
                with progress:
                    is_over = progress.wait_for(lambda: errors or done == len(requests), timeout=_HEALTH_EVERY)
                if errors:  # also where the last request failed and nothing is left to wait for
                    raise errors[0]
                if is_over:
                    return answers
                misses = 0 if self._is_healthy() else misses + 1
                if misses == _HEALTH_MISSES:
                    raise self._failure(f"failed {misses} health checks in a row")
        finally:
            stop.set()

    def _responses(self, request: Request, answer: Any, sampling: Sampling) -> Iterator[Response]:
        choices = sorted(answer["choices"], key=lambda choice: choice["index"])
        if len(choices) != request.n:
            raise self._failure(f"returned {len(choices)} completions where {request.n} were asked for")
        for choice in choices:
            versions = {span["version"] for span in choice["weight_versions"] or ()}
            if versions != {self._version}:
                raise self._failure(
                    f"sampled with weights of version {', '.join(sorted(versions)) or 'unknown'} instead of "
                    f"{self._version}, which it was sent; it was restarted, or another trainer uses it"
                )
            content = (choice["logprobs"] or {}).get("content") or ()
            yield response_of(
                choice["token_ids"],
                [token["logprob"] for token in content],
                choice["finish_reason"],
                sampling=sampling,
                eos_token_ids=self._eos_token_ids,
            )

    # ------------------------------------------------------------------ HTTP

    def _await_start(self) -> None:
        deadline = time.monotonic() + self._rollout.timeout
        if not self._is_healthy() and self._process.is_main_process:
            print(f"waiting for the vLLM server at {self._url}", file=sys.stderr)
        while not self._is_healthy():
            if time.monotonic() > deadline:
                raise self._failure(
                    f"did not come up within {self._rollout.timeout:g} s (rollout.timeout)",
                    "Start it with the same configuration (edge-grpo serve), then repeat the command",
                )
            time.sleep(1)

    def _is_healthy(self) -> bool:
        try:
            self._ask_once("/health", None, _HEALTH_EVERY)
        except (_UnavailableError, RolloutError):
            return False
        return True

    def _ask(self, path: str, body: Any = None, *, stop: threading.Event | None = None) -> Any:
        """Return the answer to a request, attempted up to three times; GET without a body, else POST."""
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                return self._ask_once(path, body, self._rollout.timeout)
            except _UnavailableError as error:
                if attempt == _ATTEMPTS:
                    raise self._failure(f"failed {attempt} times to answer {path} ({error})") from error
                pause = _PAUSE * 2 ** (attempt - 1)
                if (stop or threading.Event()).wait(pause):
                    raise self._failure(f"was abandoned before it answered {path}") from error
        raise AssertionError("unreachable")

    def _ask_once(self, path: str, body: Any, timeout: float) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self._url + path, data, {"Content-Type": "application/json"})
        try:
            with _OPENER.open(request, timeout=timeout) as answer:
                text = answer.read()
            return json.loads(text) if text else None
        except urllib.error.HTTPError as error:
            with error:
                reason = f"HTTP {error.code}: {error.read(2000).decode(errors='replace').strip()}"
            if error.code >= 500 or error.code == 429:
                raise _UnavailableError(reason) from error
            remedy = "; was it started by `edge-grpo serve`, in development mode?" if error.code in (403, 404) else ""
            raise RolloutError(f"the vLLM server at {self._url} refused {path} with {reason}{remedy}") from error
        except (OSError, http.client.HTTPException, json.JSONDecodeError) as error:
            raise _UnavailableError(_reason(error)) from error

    def _failure(self, what: str, remedy: str | None = None) -> RolloutError:
        """The error to raise: what happened, what to do, and the last lines of the server's log."""
        remedy = remedy or (
            "Nothing of this step was trained on. Start the server again (edge-grpo serve, with the run's "
            "configuration), then continue the run with --resume"
        )
        lines = _last_lines(self._log)
        log = f"the last lines of {self._log}:\n{lines}" if lines else f"there is no log at {self._log}"
        return RolloutError(f"the vLLM server at {self._url} {what}. {remedy}; {log}")


# Ignores the environment's proxies: the server is in the local network.
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def _reason(error: Exception) -> str:
    cause = error.reason if isinstance(error, urllib.error.URLError) else error
    return f"{type(cause).__name__}: {cause}" if isinstance(cause, Exception) else str(cause)


def _last_lines(path: Path) -> str:
    try:
        with path.open("rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(0, file.tell() - 100 * 1024))
            text = file.read().decode(errors="replace")
    except OSError:
        return ""
    return "\n".join(f"  {line}" for line in text.splitlines()[-_LOG_LINES:])
