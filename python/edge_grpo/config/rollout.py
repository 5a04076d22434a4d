"""The section ``rollout``: what generates, how much, and where vLLM's servers are."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Literal

from edge_grpo.config.checks import real, refuse, whole

Engine = Literal["transformers", "vllm", "vllm-server"]

# Arguments of vLLM that a user cannot set, and where their values come from.
_FIXED_IN_VLLM = {
    "model": "is model.path",
    "max_model_len": "follows from data.max_prompt_length, rollout.max_completion_length and correction.max_length",
    "max_num_seqs": "is rollout.batch_size",
    "logprobs_mode": "must be what the loss recomputes",
    "generation_config": "would change the distribution that is sampled",
    "skip_tokenizer_init": "is set, since only token ids are exchanged",
    "disable_log_stats": "is set",
    "host": "is part of rollout.server",
    "port": "is part of rollout.server",
}


def splits_over(devices: int, heads: int, key_value_heads: int) -> bool:
    """Whether vLLM can split attention over devices; key-value heads that are fewer are held several times."""
    return heads % devices == 0 and (key_value_heads % devices == 0 or devices % key_value_heads == 0)


@dataclass(frozen=True)
class RolloutConfig:
    engine: Engine = "transformers"  # what generates
    num_prompts: int = 8  # prompts per step, over all processes
    num_generations: int = 8  # responses per prompt: the group size G
    temperature: float = 1.0  # sampling temperature; the loss uses the same
    max_completion_length: int = 256  # tokens of one response before correction; dr_grpo divides by it
    batch_size: int = 64  # sequences generated at once per process, by vllm-server per server
    # dynamic sampling: rounds a step in which groups whose rewards, after correction, are all equal are dropped and
    # other prompts sampled in their place
    resample: int = 0
    # vLLM's own arguments: dtype: bfloat16; with tensor_parallel_size k, k devices hold an engine together: with engine
    # vllm those of k processes, of which there must be a multiple
    vllm: dict[str, bool | int | float | str] = field(default_factory=dict)
    # address of vllm-server, on which edge-grpo serve listens; a list, or several with commas, shares the work
    server: str | tuple[str, ...] = "127.0.0.1:8000"
    server_folder: str | None = None  # a folder shared with vllm-server, for the weights; null sends them by NCCL
    ahead: int = 0  # with vllm-server, 1 samples each step's responses while the step before is learnt from
    timeout: float = 600.0  # seconds that vllm-server may take to start, for a request, or for new weights

    def __post_init__(self) -> None:
        problems = whole(
            1,
            num_prompts=self.num_prompts,
            max_completion_length=self.max_completion_length,
            batch_size=self.batch_size,
        )
        problems += whole(0, resample=self.resample) + real("(0, 1e6]", timeout=self.timeout)
        problems += self._server_problems()
        if self.ahead not in (0, 1):
            problems.append(f"ahead must be 0 or 1; got {self.ahead!r}")
        elif self.ahead and self.engine != "vllm-server":
            problems.append(
                f"ahead = 1 needs an engine that samples while the policy learns; got engine = {self.engine}; set "
                "engine to vllm-server, or ahead to 0"
            )
        for name in sorted(name for name in self.vllm if "-" in name):
            problems.append(f"vllm takes its arguments with underscores; got {name!r}")
        for name in sorted(_FIXED_IN_VLLM.keys() & self.vllm.keys()):
            problems.append(f"vllm must not set {name}, which {_FIXED_IN_VLLM[name]}")
        if problem := whole(1, tensor_parallel_size=self.vllm.get("tensor_parallel_size", 1)):
            problems.append(f"vllm is wrong: {problem[0]}")
        if problem := real("> 0", temperature=self.temperature):
            problems.append(f"{problem[0]}; greedy responses of a group would all be equal and teach nothing")
        if problem := whole(2, num_generations=self.num_generations):
            problems.append(f"{problem[0]}; an advantage compares the responses of a group")
        refuse(problems)

    @property
    def servers(self) -> tuple[str, ...]:
        """The addresses in ``server``."""
        given = self.server.split(",") if isinstance(self.server, str) else self.server
        return tuple(address.strip() for address in given)

    @property
    def tensor_parallel_size(self) -> int:
        """Devices that hold an engine of vLLM together."""
        return int(self.vllm.get("tensor_parallel_size", 1))

    def _server_problems(self) -> list[str]:
        if not self.servers:
            return ["server must name at least one HOST:PORT; got an empty list"]
        problems = []
        for address in dict.fromkeys(self.servers):
            match = re.fullmatch(r"[^/\s:,]+:(\d{1,5})", address)
            if not match or not 0 < int(match[1]) < 65536:
                problems.append(f"server must read HOST:PORT; got {address!r}")
            if (times := self.servers.count(address)) > 1:
                problems.append(f"server must name each address once; got {address} {times} times")
        return problems
