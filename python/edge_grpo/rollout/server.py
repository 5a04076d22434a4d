"""Rollouts with a `vllm serve` process on another GPU or machine: token ids over HTTP, weights by NCCL or a folder.

The server is an ordinary one in development mode (``VLLM_SERVER_DEV_MODE=1``), whose routes for reinforcement learning
take the weights. Here is the trainer's side; ``serve`` starts the server. Nothing here imports vLLM.
"""

from __future__ import annotations

import copy
import shutil
import sys
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import chain
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from edge_grpo.config import TrainConfig
from edge_grpo.policy.adapters import merged_weights
from edge_grpo.policy.loading import eos_token_ids
from edge_grpo.policy.model import unwrap
from edge_grpo.policy.sharding import is_sharded, read_to_the_end
from edge_grpo.policy.together import together
from edge_grpo.rollout.connection import Connection, reason_of
from edge_grpo.rollout.serve import log_path
from edge_grpo.rollout.spread import Spread, each
from edge_grpo.rollout.wire import (
    Request,
    compare,
    host_weights,
    max_length_of,
    probe,
    requests_of,
    response_of,
    save_weights,
)
from edge_grpo.types import Response, RolloutError, Sampling


class ServerEngine:
    """Samples at the servers of ``rollout.server`` and sends them the policy's weights.

    Weights go by vLLM's NCCL transfer from GPU to GPU, or as a file through ``rollout.server_folder``, written once and
    read by all servers at the same time. Each push has a version of its own, and every token must have been sampled
    under the latest one: a server that was restarted, or that takes weights from another trainer, is noticed before
    anything is trained on.

    In a distributed run every process generates its own prompts, and the first one sends the weights. Then
    ``update_weights`` ends on no process before every server has them, and fails on all if it fails there. ``generate``
    communicates with no other process; it may fail on one alone, so call it within ``together``.
    """

    def __init__(self, config: TrainConfig, model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> None:
        policy = unwrap(model)
        self._rollout = config.rollout
        self._eos_token_ids = eos_token_ids(policy, tokenizer)
        self._max_length = max_length_of(config, policy)
        self._process = PartialState()
        self._channels: list[Any] = []
        self._version = ""
        if config.rollout.server_folder is None and policy.device.type == "cpu":
            raise ValueError(
                "rollout.server_folder is null, so weights would go by NCCL, but the policy is on the CPU; "
                "name a folder that trainer and server both see"
            )
        self.servers = [
            Connection(address, timeout=config.rollout.timeout, log=log_path(config, number))
            for number, address in enumerate(config.rollout.servers)
        ]
        self._spread = Spread(self.servers, first=self._process.process_index)
        together(self._await_start)
        together(lambda: self._prepare(policy))
        self.update_weights(policy)
        self._verify(model, config.seed)

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
        answers = self._spread.ask("/inference/v1/generate", requests)
        return [
            response
            for request, (server, answer) in zip(requests, answers, strict=True)
            for response in self._responses(server, request, answer, sampling)
        ]

    def phase(self) -> AbstractContextManager[None]:
        """Return a context that does nothing: a server answers whoever asks."""
        return nullcontext()

    def update_weights(self, model: nn.Module) -> None:
        """Make the servers sample with ``model``'s parameters. All processes call it, and none may be generating."""
        [version] = broadcast_object_list([f"edge-grpo-{uuid.uuid4().hex}"])
        policy = unwrap(model)
        together(lambda: self._send(policy, version))
        self._version = version

    def sleep(self) -> None:
        """Do nothing: the servers do not share the trainer's memory."""

    def close(self) -> None:
        """End what is being generated, in whatever thread, and the connections for weights."""
        self._spread.close()
        while self._channels:
            self._channels.pop().close()

    # ------------------------------------------------------------------ start

    def _await_start(self) -> None:
        """Return once all servers are up; every process asks, since every process will generate."""
        deadline = time.monotonic() + self._rollout.timeout
        told = not self._process.is_main_process
        while missing := [
            server
            for server, is_healthy in zip(self.servers, each(Connection.is_healthy, self.servers), strict=True)
            if not is_healthy
        ]:
            if not told:
                several = "s" * (len(missing) > 1)
                urls = ", ".join(server.url for server in missing)
                print(f"waiting for the vLLM server{several} at {urls}", file=sys.stderr)
                told = True
            if time.monotonic() > deadline:
                raise missing[0].failure(
                    f"did not come up within {self._rollout.timeout:g} s (rollout.timeout)",
                    "Start it with the same configuration (edge-grpo serve), then repeat the command",
                )
            time.sleep(1)

    def _prepare(self, policy: PreTrainedModel) -> None:
        """Check that the servers hold the run's sequences, and open the channels for its weights, on process 0."""
        if not self._process.is_main_process:
            return
        for server in self.servers:
            holds = int(server.ask("/v1/models")["data"][0]["max_model_len"])
            if holds < self._max_length:
                raise ValueError(
                    f"the vLLM server at {server.url} holds sequences of {holds} tokens, but this run makes up to "
                    f"{self._max_length}; start it with --max-model-len {self._max_length}"
                )
        if self._rollout.server_folder is None:
            from edge_grpo.rollout.vllm import NCCLChannel

            for server in self.servers:
                server.ask("/shutdown_weight_transfer_engine", {})  # of an earlier run
                world_size = int(server.ask("/get_world_size")["world_size"])
                channel = NCCLChannel(server.url, policy, world_size=world_size, timeout=self._rollout.timeout)
                self._channels.append(channel)

    def _verify(self, model: nn.Module, seed: int) -> None:
        """Compare the logprobs of each server by itself, which process 0 asks, with those of ``model``."""
        [responses] = broadcast_object_list([together(lambda: self._probe(unwrap(model), seed))])
        for server, response in zip(self.servers, responses, strict=True):
            with _naming(server):
                compare(response, model)

    def _probe(self, policy: PreTrainedModel, seed: int) -> list[Response]:
        responses = []
        for server in self.servers if self._process.is_main_process else ():
            alone = copy.copy(self)
            alone._spread = Spread([server])
            with _naming(server):
                responses.append(probe(alone, policy, seed=seed))
        return responses

    # ------------------------------------------------------------------ weights

    def _send(self, policy: PreTrainedModel, version: str) -> None:
        """Send the weights to all servers and name them ``version`` there, on process 0.

        It reads them once for a folder, and by NCCL once for each server. If they are split, the other processes read
        along, one tensor after the other, also where it fails.
        """
        is_main = self._process.is_main_process
        if self._rollout.server_folder is None:
            self._send_by_nccl(policy)
        else:
            tensors = host_weights(policy, keep=is_main)
            if is_main:
                self._send_by_folder(tensors, Path(self._rollout.server_folder).resolve() / f"weights-{version}")

        def use(server: Connection) -> None:
            server.ask("/reset_prefix_cache", {})
            server.ask("/update_weight_version", {"new_version": version})

        each(use, self.servers if is_main else ())

    def _send_by_nccl(self, policy: PreTrainedModel) -> None:
        readings = [merged_weights(policy) for _ in self.servers]
        with read_to_the_end(chain.from_iterable(readings if is_sharded(policy) else ())):
            # One after the other: it is this process's GPU that sends. Only process 0 has channels.
            for server, channel, weights in zip(self.servers, self._channels, readings, strict=False):
                try:
                    channel.send(weights)
                except Exception as error:
                    raise server.failure(f"did not take the new weights by NCCL ({reason_of(error)})") from error

    def _send_by_folder(self, tensors: Mapping[str, Tensor], folder: Path) -> None:
        """``folder`` has a new name each time, which no cache of a network file system holds."""
        reload = {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}}
        try:
            save_weights(tensors, folder)
            each(lambda server: server.ask("/collective_rpc", reload), self.servers)
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    # ------------------------------------------------------------------ responses

    def _responses(self, server: Connection, request: Request, answer: Any, sampling: Sampling) -> Iterator[Response]:
        choices = sorted(answer["choices"], key=lambda choice: choice["index"])
        if len(choices) != request.n:
            raise server.failure(f"returned {len(choices)} completions where {request.n} were asked for")
        for choice in choices:
            versions = {span["version"] for span in choice["weight_versions"] or ()}
            if versions != {self._version}:
                raise server.failure(
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


@contextmanager
def _naming(server: Connection) -> Iterator[None]:
    """Say in a RolloutError which server it is about."""
    try:
        yield
    except RolloutError as error:
        raise RolloutError(f"the server at {server.url}: {error}") from error
