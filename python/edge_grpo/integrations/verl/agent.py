"""Guided error correction as an agent loop of verl: a group of sessions that wait for each other, and one session."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable, Mapping
from contextvars import ContextVar
from dataclasses import replace
from typing import Any
from uuid import uuid4

import numpy as np
from verl.experimental.agent_loop.agent_loop import AgentLoopOutput, register
from verl.experimental.agent_loop.single_turn_agent_loop import SingleTurnAgentLoop
from verl.utils.profiler import simple_timer

from edge_grpo.config.seeds import derive_seed
from edge_grpo.correction import CorrectionPlan, Corrector
from edge_grpo.integrations.verl.settings import AGENT, EdgeSettings
from edge_grpo.types import Example, Outcome, Prompt, Provenance, Response, Reward

GROUP: ContextVar[Group | None] = ContextVar("edge_group", default=None)  # of the prompt whose session runs

Judge = Callable[[AgentLoopOutput, dict[str, Any]], Awaitable[None]]  # puts the reward into an output


class Group:
    """The sessions of one prompt. Correction depends on all of them, so each waits for the last first attempt."""

    def __init__(
        self,
        row: Mapping[str, Any],
        size: int,
        *,
        corrector: Corrector,
        settings: EdgeSettings,
        judge: Judge,
        decode: Callable[[list[int]], str],
    ) -> None:
        """``row`` is the prompt's row of the dataset, ``size`` the number of its sessions."""
        self.row = row
        self.size = size
        self.corrector = corrector
        self.settings = settings
        self.judge = judge
        self.decode = decode
        self._firsts: dict[int, tuple[Prompt, Response, Reward]] = {}
        self._plan: asyncio.Future[CorrectionPlan | None] = asyncio.get_running_loop().create_future()

    async def plan_for(self, session: int, output: AgentLoopOutput, columns: dict[str, Any]) -> CorrectionPlan | None:
        """Return the plan for this session's response alone once all sessions are here; None if one has failed.

        ``output`` is the first attempt, which gets its reward here; ``columns`` are what reward functions receive.
        """
        await self.judge(output, columns)
        self._firsts[session] = (self._prompt(output), self._response(output), self._reward(output))
        if len(self._firsts) == self.size and not self._plan.done():
            self._plan.set_result(self._make_plan())
        plan = await self._plan
        return None if plan is None else _of_one(plan, sorted(self._firsts).index(session))

    def was_correct(self, session: int) -> bool:
        return self._firsts[session][2].correct

    def abandon(self) -> None:
        """Let those go who wait: a session has failed, and verl drops the group."""
        if not self._plan.done():
            self._plan.set_result(None)

    def _make_plan(self) -> CorrectionPlan:
        sessions = sorted(self._firsts)
        prompts, responses, rewards = zip(*(self._firsts[session] for session in sessions), strict=True)
        return self.corrector.plan(
            prompts,
            responses,
            rewards,
            [0] * len(sessions),
            seed=derive_seed(self.settings.seed, "correction", int(self.row["global_steps"])),
            keys=[f"{self.row['index']}-{session}" for session in sessions],
        )

    def _prompt(self, output: AgentLoopOutput) -> Prompt:
        answer, solution = (_entry(self.row, key) for key in (self.settings.answer_key, self.settings.solution_key))
        return Prompt(Example(0, "", answer, solution), self.decode(output.prompt_ids), tuple(output.prompt_ids))

    def _response(self, output: AgentLoopOutput) -> Response:
        eos = self.corrector.eos_token_ids
        response = response_of(output.response_ids, output.response_logprobs, eos)
        marks = [Provenance.SAMPLED if mark else Provenance.INJECTED for mark in output.response_mask]
        return replace(response, provenance=tuple(marks))

    def _reward(self, output: AgentLoopOutput) -> Reward:
        if output.reward_score is None:
            raise ValueError("correction needs the reward of a first attempt; got none; set edge.gec=false")
        key, extra = self.settings.accuracy_key, output.extra_fields.get("reward_extra_info") or {}
        if key is not None and key not in extra:
            raise ValueError(
                f"edge.accuracy_key must be in what the reward function returns: {', '.join(extra) or 'a number'}; "
                f"got {key!r}"
            )
        total = float(output.reward_score)
        value = total if key is None else float(extra[key])
        outcome: Outcome = "correct" if value >= self.settings.accuracy_threshold else "wrong"
        return Reward(total, {}, outcome, skipped=math.isnan(value) or math.isnan(total))


def _of_one(plan: CorrectionPlan, position: int) -> CorrectionPlan:
    """The part of a plan that concerns one response."""
    wanted = tuple(replace(one, position=0) for one in plan.continuations if one.position == position)
    return replace(plan, written=(plan.written[position],), continuations=wanted)


def _entry(row: Mapping[str, Any], place: str) -> str | None:
    """What lies at a dotted place of a row, as text, the first of several; None where it has no such entry."""
    value: Any = row
    for name in place.split("."):
        value = value.get(name) if isinstance(value, Mapping) else None
    if isinstance(value, (list, tuple, np.ndarray)):
        value = next(iter(value), None)
    if isinstance(value, Mapping):
        raise ValueError(
            f"edge.answer_key and edge.solution_key must lead to a text or a number; {place} holds {', '.join(value)}; "
            "name one of these after a dot"
        )
    return None if value is None else str(value)


def response_of(token_ids: list[int], logprobs: list[float] | None, eos_token_ids: tuple[int, ...]) -> Response:
    """Return what verl sampled as a response of ours; NaN where the sampler keeps no log-probabilities."""
    unknown = (math.nan,) * len(token_ids)
    return Response(
        tuple(token_ids),
        tuple(logprobs) if logprobs else unknown,
        unknown,
        (Provenance.SAMPLED,) * len(token_ids),
        "stop" if token_ids and token_ids[-1] in eos_token_ids else "length",
    )


@register(AGENT)
class EdgeAgentLoop(SingleTurnAgentLoop):
    """SingleTurnAgentLoop that corrects its response if ``Corrector.plan`` says so. Validation is verl's.

    Token ids are kept: what the policy sampled is never decoded and encoded again. Tokens that the policy did not
    sample have ``response_mask`` 0 with ``edge.injected=mask`` and 1 with credit, and 0.0 as their log-probability.
    """

    async def run(self, sampling_params: dict[str, Any], priority: int = 0, **kwargs: Any) -> AgentLoopOutput:
        group = GROUP.get()
        if group is None:
            output: AgentLoopOutput = await super().run(sampling_params, priority=priority, **kwargs)
            return output
        limit = group.corrector.max_tokens
        first = await super().run({**sampling_params, "max_tokens": limit}, priority=priority, **kwargs)
        if first.multi_modal_data:
            raise ValueError("correction works with text; got images, videos or audio; set edge.gec=false")
        first = _cut(first, limit)  # not every engine reads max_tokens
        session = int(kwargs["session_id"])
        plan = await group.plan_for(session, first, kwargs)
        if plan is None:
            return first
        metrics: dict[str, Any] = {}
        more = []
        with simple_timer("generate_sequences", metrics):
            for wanted in plan.continuations:
                sampled = await self.server_manager.generate(
                    request_id=uuid4().hex,
                    prompt_ids=list(wanted.token_ids),
                    sampling_params={**sampling_params, "max_tokens": plan.max_tokens},
                    priority=int(priority),
                )
                more.append(response_of(sampled.token_ids, sampled.log_probs, group.corrector.eos_token_ids))
                first.extra_fields["max_global_steps"] = sampled.extra_fields.get("max_global_steps")
        (final,) = group.corrector.apply(plan, more)
        first.metrics.generate_sequences += metrics["generate_sequences"]
        injected = [mark == Provenance.INJECTED for mark in final.provenance]
        first.extra_fields |= {
            "edge_correction": final.correction,
            "edge_was_correct": group.was_correct(session),
            "edge_injected_share": sum(injected) / max(len(injected), 1),
        }
        return first if final.correction is None else self._corrected(first, final, injected)

    def _corrected(self, first: AgentLoopOutput, final: Response, injected: list[bool]) -> AgentLoopOutput:
        group = GROUP.get()
        assert group is not None
        masks = group.settings.injected == "mask"
        # Tokens that verl itself has put into the first attempt stay masked, where it is still there.
        theirs = [] if final.correction == "solution" else [not mark for mark in first.response_mask]
        theirs += [False] * (len(injected) - len(theirs))
        logprobs = [0.0 if math.isnan(value) else value for value in final.logprobs]
        extra = {name: value for name, value in first.extra_fields.items() if name != "reward_extra_info"}
        corrected: AgentLoopOutput = first.model_copy(
            update={
                "response_ids": list(final.token_ids),
                "response_mask": [
                    int(not (mark and (masks or verls))) for mark, verls in zip(injected, theirs, strict=False)
                ],
                "response_logprobs": logprobs if first.response_logprobs is not None else None,
                "reward_score": None,  # verl computes it again
                "extra_fields": extra,
            }
        )
        return corrected


def _cut(output: AgentLoopOutput, limit: int) -> AgentLoopOutput:
    logprobs = output.response_logprobs
    output.response_ids = output.response_ids[:limit]
    output.response_mask = output.response_mask[:limit]
    output.response_logprobs = None if logprobs is None else logprobs[:limit]
    return output
