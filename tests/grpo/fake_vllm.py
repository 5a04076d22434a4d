"""A stand-in of the module vllm as an engine in the trainer's process uses it, which samples with transformers."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from transformers import AutoConfig, AutoModelForCausalLM

from edge_grpo.rollout.transformers import TransformersEngine
from edge_grpo.types import Sampling

events: list[str] = []  # what engines of this process were told, in order


class LLM:
    """Has random weights until it is given others, and none while it sleeps.

    Processes that share it hold all of it. They must ask for the same, as if each computed a part.
    """

    def __init__(self, folder: str, *, tensor_parallel_size: int = 1, **arguments: Any) -> None:
        events.append(f"start {arguments.get('distributed_executor_backend', 'alone')}")
        self.group = dist.new_subgroups(tensor_parallel_size)[0] if tensor_parallel_size > 1 else None
        self.model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder)).eval()
        self.llm_engine = SimpleNamespace(engine_core=self)

    @torch.no_grad()
    def collective_rpc(self, method: str, kwargs: dict[str, Any]) -> None:
        assert method == "reload_weights"
        events.append("load")
        missing = self.model.state_dict()
        for name, value in kwargs["weights_iterator"]:
            missing.pop(name).copy_(value)
        assert not missing

    def generate(
        self, prompts: Sequence[dict[str, list[int]]], sampling_params: Sequence[SimpleNamespace], *, use_tqdm: bool
    ) -> list[SimpleNamespace]:
        events.append("generate")
        if self.group is not None:
            asked: list[Any] = [None] * dist.get_world_size(self.group)
            dist.all_gather_object(asked, (prompts, sampling_params), group=self.group)
            assert all(one == asked[0] for one in asked)
        return [
            SimpleNamespace(outputs=self._completions(prompt["prompt_token_ids"], params))
            for prompt, params in zip(prompts, sampling_params, strict=True)
        ]

    def _completions(self, prompt: list[int], params: SimpleNamespace) -> list[SimpleNamespace]:
        engine = TransformersEngine(self.model, eos_token_ids=params.stop_token_ids, pad_token_id=0, batch_size=64)
        # vLLM adds a completion's number to the seed.
        places = [params.seed + number for number in range(params.n)]
        sampling = Sampling(max_tokens=params.max_tokens, temperature=params.temperature)
        return [
            SimpleNamespace(
                index=index,
                token_ids=response.token_ids,
                logprobs=[
                    {token: SimpleNamespace(logprob=value)}
                    for token, value in zip(response.token_ids, response.logprobs, strict=True)
                ],
                finish_reason=response.finish_reason,
            )
            for index, response in enumerate(engine.generate([prompt] * params.n, sampling, seed=0, places=places))
        ]

    @torch.no_grad()
    def sleep(self, level: int) -> None:
        events.append(f"sleep {level}")
        for value in self.model.parameters():
            value.fill_(float("nan"))

    def wake_up(self, tags: list[str]) -> None:
        events.append(f"wake {' '.join(tags)}")

    def reset_prefix_cache(self) -> None:
        events.append("reset cache")

    def shutdown(self) -> None:
        events.append("shutdown")
        core.cleanup_dist_env_and_memory()


core = ModuleType("vllm.v1.engine.core")
vars(core).update(cleanup_dist_env_and_memory=lambda: events.append("end process group"))


def install() -> None:
    """Make ``import vllm`` give the stand-in in this process."""
    vllm, platforms, distributed = ModuleType("vllm"), ModuleType("vllm.platforms"), ModuleType("vllm.distributed")
    state = SimpleNamespace(
        cleanup_dist_env_and_memory=lambda: events.append("end process group"),
        destroy_model_parallel=lambda: events.append("end engine's groups"),
    )
    vars(vllm).update(LLM=LLM, SamplingParams=SimpleNamespace, platforms=platforms, distributed=distributed)
    vars(platforms).update(current_platform=SimpleNamespace(is_sleep_mode_available=lambda: True, is_cpu=lambda: False))
    vars(distributed).update(parallel_state=state)
    v1, engine = ModuleType("vllm.v1"), ModuleType("vllm.v1.engine")
    vars(engine).update(core=core)
    modules = (vllm, platforms, distributed, v1, engine, core)
    sys.modules |= {module.__name__: module for module in modules}
