"""Rollouts with vLLM in each trainer process, and vLLM's NCCL transfer of weights: the only file that imports vLLM.

The engine samples continuously batched; it reports no entropy, so the trainer scores every response. Written for vLLM
0.32. On a CPU everything here is tested but NCCL and sleeping, which need GPUs.
"""

from __future__ import annotations

import contextlib
import os
import socket
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
from accelerate import PartialState
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from edge_grpo.config import TrainConfig
from edge_grpo.config.rollout import splits_over
from edge_grpo.policy.adapters import merged_shapes, merged_weights
from edge_grpo.policy.loading import eos_token_ids
from edge_grpo.policy.model import unwrap
from edge_grpo.policy.sharding import read_to_the_end
from edge_grpo.policy.together import together
from edge_grpo.rollout.group import EngineGroup, check_processes
from edge_grpo.rollout.wire import (
    INSTALL,
    Completion,
    Request,
    engine_arguments,
    export,
    key_value_heads,
    max_length_of,
    requests_of,
    response_of,
    verify,
)
from edge_grpo.types import Response, RolloutError, Sampling

_GPU_SHARE = 0.4  # of the device's memory, vLLM's weights and cache; the trainer needs the rest


class VLLMEngine:
    """Samples with a vLLM engine in this process, which holds its own copy of the weights.

    ``update_weights`` loads the policy's parameters into it through vLLM's ``reload_weights``, without another copy in
    memory or a file, and clears the prefix cache. ``sleep`` frees the device memory of vLLM's weights and cache where
    vLLM supports it (CUDA, ROCm); on a CPU it does nothing.

    A response depends on the seed and the prompt's place, up to rounding, which in vLLM depends on what
    else is in a batch.

    In a distributed run every process has an engine of its own, on its own device, and samples its own prompts. With
    ``rollout.vllm.tensor_parallel_size`` k, each k processes that follow each other share an engine, of which each
    holds a part; a prompt is sampled by all of them (``group``). All processes construct the engine and call
    ``update_weights``, ``sleep`` and ``close`` together, and where one of these fails on one process, all raise. Split
    parameters are gathered one tensor at a time; every process loads of each what its engine holds.

    ``generate`` may fail on one process alone, so call it within ``phase``, and that within ``together``. Processes
    that do not share an engine do not wait for each other before ``together`` ends.
    """

    def __init__(self, config: TrainConfig, model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> None:
        policy = unwrap(model)
        processes = PartialState().num_processes
        check_processes(config.rollout, processes)
        check_heads(policy.config.get_text_config(), config.rollout.tensor_parallel_size)
        self._eos_token_ids = eos_token_ids(policy, tokenizer)
        self._max_length = max_length_of(config, policy)
        self._max_n = config.rollout.batch_size
        # Read when vLLM is first imported. One process, so that weights are handed over and not copied.
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # the cores are the trainer's as well
        vllm = together(_import)
        self._can_sleep = bool(vllm.platforms.current_platform.is_sleep_mode_available())
        arguments = engine_arguments(config, policy) | {"load_format": "dummy"}  # the weights are loaded below
        if self._can_sleep:
            arguments = {"gpu_memory_utilization": _GPU_SHARE, "enable_sleep_mode": True} | arguments
        self._is_alone = processes == 1
        if not self._is_alone:
            # Takes process group, rank and device from the launcher; as many neighbours as there are tensor-parallel
            # devices become one engine.
            arguments["distributed_executor_backend"] = "external_launcher"
        if config.rollout.tensor_parallel_size > 1 and vllm.platforms.current_platform.is_cpu():
            _use_gloo()
        self._sampling_params = vllm.SamplingParams
        with tempfile.TemporaryDirectory(prefix="edge-grpo-vllm-") as folder, _unchanged_process():
            together(lambda: export(policy, tokenizer, Path(folder)))
            # Not within ``together``: here vLLM's processes communicate. One that fails alone ends the run as it exits.
            self._llm: Any = vllm.LLM(folder, skip_tokenizer_init=True, disable_log_stats=True, **arguments)
        self._asleep = False
        self._group = EngineGroup(config.rollout, self._run) if config.rollout.tensor_parallel_size > 1 else None
        self.update_weights(policy)
        verify(self, model, seed=config.seed)

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, *, seed: int, places: Sequence[int] | None = None
    ) -> list[Response]:
        """Return one response per prompt, in order; see ``RolloutEngine``. Entropy is not known."""
        if self._asleep:
            raise RuntimeError("the engine is asleep and has no weights; call update_weights first")
        eos = self._eos_token_ids
        requests = requests_of(
            prompts,
            sampling,
            seed=seed,
            places=places,
            eos_token_ids=eos,
            max_length=self._max_length,
            max_n=self._max_n,
        )
        if not requests:
            return []
        answers = self._run(requests) if self._group is None else self._group.ask(requests)
        return [
            response_of(*completion, sampling=sampling, eos_token_ids=eos)
            for answer in answers
            for completion in answer
        ]

    def phase(self) -> AbstractContextManager[None]:
        """Surround all calls of ``generate`` until the next weights; see ``RolloutEngine``."""
        return nullcontext() if self._group is None else self._group.phase()

    def _run(self, requests: Sequence[Request]) -> list[list[Completion]]:
        """Return the completions of each request."""
        with torch.random.fork_rng(devices=[]):  # it draws from the global generator even where all seeds are given
            outputs = self._llm.generate(
                [{"prompt_token_ids": list(request.prompt)} for request in requests],
                [self._sampling_params(**request.sampling_params) for request in requests],
                use_tqdm=False,
            )
        answers = []
        for request, output in zip(requests, outputs, strict=True):
            completions = sorted(output.outputs, key=lambda completion: completion.index)
            if len(completions) != request.n:
                raise RolloutError(f"vLLM returned {len(completions)} completions where {request.n} were asked for")
            answers.append([_completion_of(completion) for completion in completions])
        return answers

    def update_weights(self, model: nn.Module) -> None:
        """Load ``model``'s parameters into the engine; wakes it."""
        together(lambda: self._load(unwrap(model)))

    def _load(self, policy: PreTrainedModel) -> None:
        with read_to_the_end(merged_weights(policy)) as weights:
            if self._asleep:
                self._llm.wake_up(tags=["weights"])
            self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
        if self._asleep:
            self._llm.wake_up(tags=["kv_cache"])
            self._asleep = False
        self._llm.reset_prefix_cache()

    def sleep(self) -> None:
        """Free the memory of weights and cache, where vLLM supports it."""
        if self._can_sleep and not self._asleep:
            together(lambda: self._llm.sleep(level=2))  # the weights are not kept: newer ones come
            self._asleep = True

    def close(self) -> None:
        """Stop the engine and clean up after it; a second call does nothing."""
        if self._llm is None:
            return
        from vllm.distributed import parallel_state

        engine, self._llm = self._llm.llm_engine, None
        if self._group is not None:
            self._group.close()
        if self._is_alone:
            engine.engine_core.shutdown()
            parallel_state.cleanup_dist_env_and_memory()
            return
        from vllm.v1.engine import core

        # Both would end the process group with the engine's own groups. It is the trainer's.
        cleanup, core.cleanup_dist_env_and_memory = (
            core.cleanup_dist_env_and_memory,
            parallel_state.destroy_model_parallel,
        )
        try:
            engine.engine_core.shutdown()
        finally:
            core.cleanup_dist_env_and_memory = cleanup


def _completion_of(completion: Any) -> Completion:
    """Return vLLM's record of a completion as ours."""
    ids = tuple(completion.token_ids)
    logprobs = tuple(step[token].logprob for step, token in zip(completion.logprobs, ids, strict=True))
    return Completion(ids, logprobs, completion.finish_reason)


def check_heads(config: PretrainedConfig, size: int) -> None:
    """Raise ValueError where the attention of a model cannot be split over ``size`` devices as vLLM splits it."""
    heads = config.num_attention_heads
    pairs = key_value_heads(config)
    if not splits_over(size, heads, pairs):
        raise ValueError(
            f"rollout.vllm.tensor_parallel_size must divide the model's attention heads, and divide its key-value "
            f"heads or be a multiple of them; got {size} for {heads} and {pairs} heads"
        )


def _import() -> Any:
    try:
        import vllm
        import vllm.platforms
    except ImportError as error:
        raise ValueError(f"rollout.engine='vllm' could not import vLLM: {error}; {INSTALL}") from error
    return vllm


def _use_gloo() -> None:
    """Keep vLLM's processes on a CPU from shared memory, which it has where there is AVX-512.

    Under ``external_launcher`` it has one name for all runs on a machine, and stays when a process is killed.
    """
    from vllm.distributed.device_communicators.cpu_communicator import CpuCommunicator

    CpuCommunicator._all_group_ranks_share_shm_group_name = lambda _: False


@contextlib.contextmanager
def _unchanged_process() -> Iterator[None]:
    """Restore what starting vLLM changes in its process: seeds, the number of threads, and how that number is set."""
    set_num_threads, threads = torch.set_num_threads, torch.get_num_threads()
    with torch.random.fork_rng(devices=[]):
        try:
            yield
        finally:
            torch.set_num_threads = set_num_threads
            torch.set_num_threads(threads)


class NCCLChannel:
    """Sends weights from this process's GPU to a server's through vLLM's NCCL weight-transfer engine.

    The server must have been started with ``--weight-transfer-config '{"backend": "nccl"}'`` and in development mode.
    Written against vLLM 0.32. Tests run it with a stand-in of vLLM's part; NCCL itself needs two GPUs.
    """

    def __init__(self, url: str, model: PreTrainedModel, *, world_size: int, timeout: float) -> None:
        """``world_size`` is the number of the server's workers."""
        try:
            from vllm.distributed.weight_transfer import (
                HTTPVLLMWeightSyncClient,
                ModuleSource,
                ParamMeta,
                WeightTransferTrainerFactory,
            )
            from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo
        except ImportError as error:
            raise ValueError(f"sending weights by NCCL could not import vLLM: {error}; {INSTALL}") from error

        class Source(ModuleSource):
            """The weights of one transfer, under their checkpoint names."""

            weights: Iterator[tuple[str, torch.Tensor]]

            def metadata(self) -> list[Any]:  # asked of this process alone
                return [ParamMeta(name, value.dtype, tuple(value.shape)) for name, value in merged_shapes(model)]

            def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
                return self.weights

        self._source = Source(model)
        address, port = _own_address(url)
        self._transfer = WeightTransferTrainerFactory.trainer_init(
            NCCLTrainerInitInfo(master_address=address, master_port=port, world_size=world_size + 1, rank=0),
            client=HTTPVLLMWeightSyncClient(url, timeout=timeout),
            source=self._source,
        )

    def send(self, weights: Iterator[tuple[str, torch.Tensor]]) -> None:
        """Replace the server's weights by the model's ``merged_weights``; returns when they are all in use.

        Where it fails it may leave some of them unread.
        """
        self._source.weights = weights
        self._transfer.send_weights()

    def close(self) -> None:
        self._transfer.shutdown()


def _own_address(url: str) -> tuple[str, int]:
    """Return this machine's address as the server sees it, and a free port."""
    server = urlsplit(url)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((server.hostname, server.port or 80))  # sends nothing
        address = probe.getsockname()[0]
    with socket.socket() as listener:
        listener.bind((address, 0))
        return address, listener.getsockname()[1]
