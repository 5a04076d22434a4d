"""verl's rollout workers with groups: the sessions of a prompt meet before their responses are stored."""

from __future__ import annotations

import warnings
from typing import Any

import ray
from verl.experimental.agent_loop.agent_loop import AgentLoopOutput
from verl.trainer.ppo.v1 import AgentLoopManagerTQ, AgentLoopWorkerTQ

from edge_grpo.correction import Corrector
from edge_grpo.integrations.verl.agent import GROUP, Group
from edge_grpo.integrations.verl.guard import plain_class
from edge_grpo.integrations.verl.settings import AGENT, PLAIN_AGENT, first_attempt_length, read_settings
from edge_grpo.policy.encoding import TextEncoder
from edge_grpo.policy.loading import ending_token_ids

_Worker: Any = plain_class(AgentLoopWorkerTQ)


class EdgeAgentLoopWorker(_Worker):
    """AgentLoopWorkerTQ that opens a ``Group`` for each training prompt. Not yet an actor: see the manager."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.edge = read_settings(self.config)
        tokenizer = self.tokenizer
        if self.processor is not None:
            raise ValueError("correction works with models of text; got one with a processor; set edge.gec=false")
        self.corrector = Corrector(
            self.edge.correction,
            encode=lambda text: tokenizer.encode(text, add_special_tokens=False),
            decode=self._decode,
            encode_data=TextEncoder(tokenizer),
            eos_token_ids=ending_token_ids(tokenizer, self.model_config.generation_config),
            max_tokens=first_attempt_length(self.config, self.edge),
            reasoning=self.edge.reasoning,
        )

    async def _run_prompt(
        self, prompt: dict[str, Any], sampling_params: dict[str, Any], trajectory: dict[str, Any], trace: bool = False
    ) -> None:
        if prompt.get("agent_name") == PLAIN_AGENT and self.edge.gec:
            prompt = {**prompt, "agent_name": AGENT}  # a column of the dataset stands above the default
        is_ours = prompt.get("agent_name") == AGENT
        if not is_ours and self.edge.gec:
            warnings.warn(f"responses of the agent loop {prompt.get('agent_name')} are not corrected", stacklevel=1)
        if trajectory["validate"] or not (is_ours and self.edge.gec):
            await super()._run_prompt(prompt, sampling_params, trajectory, trace)
            return
        group = Group(
            dict(prompt),
            int(prompt.get("__rollout_n__", self.config.actor_rollout_ref.rollout.n)),
            corrector=self.corrector,
            settings=self.edge,
            judge=self._judge,
            decode=self._decode,
        )
        # The tasks of the sessions start with a copy of this context, so that none needs an argument that verl would
        # store with its response.
        token = GROUP.set(group)
        try:
            await super()._run_prompt(prompt, sampling_params, trajectory, trace)
        finally:
            GROUP.reset(token)

    async def _run_agent_loop(self, sampling_params: dict[str, Any], trajectory: dict[str, Any], **kwargs: Any) -> Any:
        try:
            return await super()._run_agent_loop(sampling_params, trajectory, **kwargs)
        except BaseException:
            if (group := GROUP.get()) is not None:
                group.abandon()
            raise

    async def _judge(self, output: AgentLoopOutput, columns: dict[str, Any]) -> None:
        await self._compute_score([output], kwargs=columns)

    def _decode(self, token_ids: Any) -> str:
        return str(self.tokenizer.decode(list(token_ids), skip_special_tokens=False))


class EdgeAgentLoopManager(AgentLoopManagerTQ):
    """AgentLoopManagerTQ with our workers: ``actor_rollout_ref.rollout.agent.agent_loop_manager_class``."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.agent_loop_workers_class = ray.remote(EdgeAgentLoopWorker)
