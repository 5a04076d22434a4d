"""Processes that share one engine: each asks it when it likes, and all of them run it for whoever asks.

A tensor-parallel engine computes on all of its processes at once, each with a part of the weights, so all must ask it
for the same at the same time. Nothing here knows vLLM.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch.distributed as dist

from edge_grpo.config import RolloutConfig
from edge_grpo.policy.together import patience
from edge_grpo.rollout.wire import Completion, Request
from edge_grpo.types import BrokenEngineError, RolloutError


def check_processes(rollout: RolloutConfig, processes: int) -> None:
    """Raise ValueError unless a run's processes can share engines as ``rollout.vllm`` says."""
    size = rollout.tensor_parallel_size
    if size > 1 and rollout.engine == "transformers":
        raise ValueError(
            f"rollout.vllm.tensor_parallel_size = {size} has no effect with rollout.engine transformers, which samples "
            "with each process's own policy; set rollout.engine to vllm or vllm-server, or leave it at 1"
        )
    if rollout.engine == "vllm" and processes % size:
        raise ValueError(
            f"rollout.vllm.tensor_parallel_size = {size} needs a multiple of {size} processes, {size} for each engine; "
            f"got {processes}; launch as many with torchrun or accelerate, or set it to "
            f"{'1' if processes == 1 else f'1 or another divisor of {processes}'}"
        )


class EngineGroup:
    """The processes ``size * i`` to ``size * i + size - 1`` of a run, for the i-th engine.

    A process calls ``ask`` within ``phase``, any number of times, or never. Each call of one is a round of all: they
    exchange their requests, run the engine on all of these in the order of processes, and keep their own answers. A
    process that has left the block, or failed in it, takes part in rounds until all have.

    ``run`` returns the completions of each request, computed on all processes at once. Where it fails on one of them,
    others may wait within it: ``ask`` and the block raise ``BrokenEngineError``.
    """

    def __init__(self, rollout: RolloutConfig, run: Callable[[Sequence[Request]], list[list[Completion]]]) -> None:
        """All processes of the run call it, a multiple of ``rollout.tensor_parallel_size``."""
        self._run = run
        # gloo: objects are exchanged without a device.
        group, _ = dist.new_subgroups(rollout.tensor_parallel_size, timeout=patience(rollout), backend="gloo")
        self._group: dist.ProcessGroup | None = group
        self._rank = dist.get_rank(group)
        self._is_open = False
        self._last = 0  # a hash of the tokens of the last round

    @contextmanager
    def phase(self) -> Iterator[None]:
        """Within it this process may ask. All processes of the group enter and leave it equally often."""
        self._is_open = True
        try:
            yield
        except BrokenEngineError:
            raise
        except Exception:
            self._serve()
            raise
        finally:
            self._is_open = False
        self._serve()

    def ask(self, requests: Sequence[Request]) -> list[list[Completion]]:
        """Return the answers to ``requests``, in order; of none without a round."""
        if not self._is_open:
            raise RuntimeError("an engine that processes share is asked within its phase(); there is none here")
        if not requests:
            return []
        answers = self._round(requests)
        assert answers is not None
        return answers

    def close(self) -> None:
        """End the group; a second call does nothing."""
        if self._group is not None:
            dist.destroy_process_group(self._group)
            self._group = None

    def _serve(self) -> None:
        while self._round([]) is not None:
            pass

    def _round(self, requests: Sequence[Request]) -> list[list[Completion]] | None:
        """Run the engine for all processes and return this one's answers, None once none of them asks for any more."""
        said: list[tuple[int, Sequence[Request]]] = [(0, ())] * dist.get_world_size(self._group)
        dist.all_gather_object(said, (self._last, list(requests)), group=self._group)
        self._last = 0
        if len({last for last, _ in said}) > 1:
            raise RolloutError(
                "the processes that share an engine got different answers from it: they no longer compute the same; "
                "set rollout.vllm.tensor_parallel_size to 1, or use vllm-server"
            )
        if not any(asked for _, asked in said):
            return None
        start = sum(len(asked) for _, asked in said[: self._rank])
        try:
            answers = self._run([request for _, asked in said for request in asked])
        except Exception as error:
            raise BrokenEngineError(
                f"the engine of {len(said)} processes failed: {type(error).__name__}: {error}"
            ) from error
        self._last = hash(tuple(completion.token_ids for answer in answers for completion in answer))
        return answers[start : start + len(requests)]
