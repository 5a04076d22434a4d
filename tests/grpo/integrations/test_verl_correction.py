"""Guided error correction in verl's rollout worker: the plan of ``Corrector``, carried out by concurrent sessions."""

from __future__ import annotations

import asyncio
import math
from collections import Counter

import numpy as np
import pytest

pytest.importorskip("tensordict", reason="verl's requirements: make test-verl")
pytest.importorskip("verl.trainer.ppo.v1", reason="verl's requirements: make test-verl")

from omegaconf import DictConfig
from verl.experimental.agent_loop.agent_loop import register
from verl.experimental.agent_loop.single_turn_agent_loop import SingleTurnAgentLoop
from verl.trainer.ppo.v1 import agent_loop_tq
from verl.utils.reward_score import gsm8k
from verl_runs import Queue, RewardWorker, Server, compose_config

from edge_grpo.config.seeds import derive_seed
from edge_grpo.integrations.verl import EdgeAgentLoopWorker
from edge_grpo.integrations.verl.agent import response_of
from edge_grpo.integrations.verl.settings import read_settings, route_rollouts
from edge_grpo.types import Example, Prompt, Provenance, Reward

SIZE = 4
SAMPLING = {"temperature": 1.0, "top_p": 1.0, "top_k": -1, "repetition_penalty": 1.0, "logprobs": True}
ROW = {
    "raw_prompt": [{"role": "user", "content": "3 + 4 = "}],
    "uid": "u",
    "index": 5,
    "global_steps": 2,
    "data_source": "sums",
    "reward_model": {"ground_truth": "7"},
    "extra_info": {"solution": "3 + 4 = 7, so \\boxed{7}."},
}


class Rollout:
    """A worker, its server and its rewards, and what a prompt has left in the queue."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, rights: tuple[int, ...], *overrides: str) -> None:
        """``rights`` are the sessions, in the order in which the server is asked, whose first answer is right."""
        self.queue = Queue()
        monkeypatch.setattr(agent_loop_tq, "tq", self.queue)
        self.config: DictConfig = compose_config(*overrides)
        self.settings = read_settings(self.config)
        route_rollouts(self.config, self.settings)
        self.server = Server(self.answer)
        self.judge = RewardWorker(self.score)
        self.worker = EdgeAgentLoopWorker(self.config, llm_client=self.server, reward_loop_worker_handles=[self.judge])
        self.tokenizer, self.rights, self.prompt_ids = self.worker.tokenizer, rights, None

    def answer(self, prompt_ids: list[int]) -> list[int]:
        if self.prompt_ids is None:
            self.prompt_ids = list(prompt_ids)
        number = len(self.server.asked) - 1
        is_first = prompt_ids == self.prompt_ids
        text = f"try {number}: \\boxed{{{7 if is_first and number in self.rights else number + 10}}}"
        return [*self.encode(text), self.worker.corrector.eos_token_ids[0]]

    def encode(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=False))

    def score(self, token_ids: list[int]) -> float:
        return float("\\boxed{7}" in self.tokenizer.decode(token_ids))

    def run(self, *, validate: bool = False, **columns: object) -> list[dict]:
        """Run one prompt through verl's worker; the stored rows in the order of sessions."""
        agent = self.config.actor_rollout_ref.rollout.agent.default_agent_loop
        prompt = {**ROW, "agent_name": agent, **columns}
        trajectory = {"step": 2, "sample_index": 5, "rollout_n": 0, "validate": validate}
        asyncio.run(asyncio.wait_for(self.worker._run_prompt(prompt, dict(SAMPLING), trajectory), timeout=60))
        return [self.queue.rows[key] for key in sorted(self.queue.rows)]

    def expected(self):
        """What ``Corrector`` itself makes of the first attempts, given the server's answers."""
        corrector = self.worker.corrector
        # The server was asked by sessions in order; a continuation's prompt is longer.
        firsts = [
            response_of(ids, [-0.5] * len(ids), corrector.eos_token_ids)
            for ids in (self.judge.judged[session] for session in range(SIZE))
        ]
        text = self.tokenizer.decode(self.prompt_ids)
        example = Example(0, "", "7", ROW["extra_info"]["solution"])
        rewards = [self.score(list(one.token_ids)) for one in firsts]
        plan = corrector.plan(
            [Prompt(example, text, tuple(self.prompt_ids))] * SIZE,
            firsts,
            [Reward(reward, {}, "correct" if reward else "wrong") for reward in rewards],
            ["any"] * SIZE,
            seed=derive_seed(self.settings.seed, "correction", 2),
            keys=[f"5-{session}" for session in range(SIZE)],
        )
        return plan, firsts


def planned_kinds(plan) -> list[str | None]:
    reflected = {one.position for one in plan.continuations}
    return ["reflect" if place in reflected else one.correction for place, one in enumerate(plan.written)]


def test_verls_rows_are_the_plans_responses(monkeypatch):
    """Both kinds of injected text and reflections: one group of four wrong responses for each seed."""
    kinds: Counter[str | None] = Counter()
    for seed in (0, 1, 2):
        run = Rollout(monkeypatch, (), f"+edge.seed={seed}", "+edge.injected=mask")
        rows = run.run()
        plan, firsts = run.expected()
        assert run.queue.tags["u"] == {"status": "finished"}
        asked = {tuple(prompt): params for prompt, params in run.server.asked[SIZE:]}
        assert set(asked) == {one.token_ids for one in plan.continuations}
        assert all(params["max_tokens"] == plan.max_tokens for params in asked.values())
        assert all(params["max_tokens"] == 32 for _, params in run.server.asked[:SIZE])
        kinds_planned = planned_kinds(plan)
        for position, (row, written) in enumerate(zip(rows, plan.written, strict=True)):
            ids = row["responses"].tolist()
            assert tuple(ids[: len(written.token_ids)]) == written.token_ids
            injected = [mark == Provenance.INJECTED for mark in written.provenance]
            more = len(ids) - len(injected)
            assert row["response_mask"].tolist() == [int(not mark) for mark in injected] + [1] * more
            assert (more > 0) == (kinds_planned[position] == "reflect")
            logprobs = [0.0 if math.isnan(value) else value for value in written.logprobs] + [-0.5] * more
            assert row["rollout_log_probs"].tolist() == logprobs
            assert row["input_ids"].tolist() == run.prompt_ids + ids
            assert row["rm_scores"].sum().item() == run.score(ids) == row["rm_scores"][-1].item()
            assert row["extra_fields"]["edge_correction"] == kinds_planned[position]
            assert row["extra_fields"]["edge_was_correct"] is False
            assert written is not firsts[position]
            kinds[kinds_planned[position]] += 1
    assert set(kinds) == {"reflect", "answer", "solution"}


def test_credited_tokens_keep_their_mask_and_right_responses_stay(monkeypatch):
    run = Rollout(monkeypatch, (1, 2), "+edge.correction.mix={answer: 1.0}")
    rows = run.run()
    assert [row["extra_fields"]["edge_correction"] for row in rows] == ["answer", None, None, "answer"]
    assert [row["extra_fields"]["edge_was_correct"] for row in rows] == [False, True, True, False]
    assert all(row["response_mask"].all() for row in rows)
    assert [row["rm_scores"].sum().item() for row in rows] == [1.0] * 4
    text = run.tokenizer.decode(rows[0]["responses"], skip_special_tokens=True)
    assert text == "try 0: \\boxed{10} Wait! Something is wrong here. The correct answer is \\boxed{7}."
    # each response is judged once, corrected ones again
    assert len(run.judge.judged) == SIZE + 2
    assert len(run.server.asked) == SIZE


@pytest.mark.parametrize("kind", ["answer", "solution"])  # keeps the first attempt, replaces it
def test_tokens_that_verl_puts_in_itself_stay_masked(monkeypatch, kind):
    """For some model families verl inserts tokens between prompt and response; nobody credits those."""
    run = Rollout(monkeypatch, (), f"+edge.correction.mix={{{kind}: 1.0}}")
    plain = SingleTurnAgentLoop.run

    async def inserting(self, sampling_params, priority=0, **columns):
        output = await plain(self, sampling_params, priority=priority, **columns)
        output.response_mask = [0, *output.response_mask[1:]]
        return output

    monkeypatch.setattr(SingleTurnAgentLoop, "run", inserting)
    for row in run.run():
        assert row["response_mask"].tolist() == [int(kind == "solution"), *[1] * (len(row["responses"]) - 1)]


@pytest.mark.parametrize(
    ("scope", "rights", "corrected"),
    [
        ("all", (), 4),
        ("all", (0, 3), 2),
        ("collapsed", (), 4),  # all rewards equal
        ("collapsed", (0,), 0),
        ("one", (), 1),
        ("one", (2,), 0),
    ],
)
def test_scope_looks_at_the_whole_group(monkeypatch, scope, rights, corrected):
    run = Rollout(monkeypatch, rights, f"+edge.correction.scope={scope}")
    rows = run.run()
    assert sum(row["extra_fields"]["edge_correction"] is not None for row in rows) == corrected
    plan, firsts = run.expected()
    assert [row["extra_fields"]["edge_correction"] for row in rows] == planned_kinds(plan)
    assert sum(new is not old for new, old in zip(plan.written, firsts, strict=True)) == corrected


def test_the_reward_that_decides_can_be_named(monkeypatch):
    run = Rollout(monkeypatch, (0,), "+edge.accuracy_key=acc", "+edge.accuracy_threshold=0.5")
    rows = run.run()
    assert [row["extra_fields"]["edge_was_correct"] for row in rows] == [True, False, False, False]
    wrong = Rollout(monkeypatch, (0,), "+edge.accuracy_key=accuracy")
    assert wrong.run() == []
    assert wrong.queue.tags["u"] == {"status": "failure"}


@pytest.mark.parametrize("truth", [["7", "7.0"], np.array(["7"], dtype=object), 7], ids=["list", "array", "number"])
def test_answers_of_every_form_are_written(monkeypatch, truth):
    run = Rollout(monkeypatch, (), "+edge.correction.mix={answer: 1.0}")
    rows = run.run(reward_model={"ground_truth": truth})
    assert [row["rm_scores"].sum().item() for row in rows] == [1.0] * SIZE


def test_an_answer_that_is_no_text_is_refused(monkeypatch, caplog):
    run = Rollout(monkeypatch, ())
    assert run.run(reward_model={"ground_truth": {"target": "7"}}) == []
    assert "reward_model.ground_truth holds target; name one of these after a dot" in caplog.text


def test_corrections_for_gsm8k_are_right_to_verls_own_reward(monkeypatch):
    """With the settings of docs/verl.md; by default an answer stands in a box, which that reward does not read."""
    settings = ["+edge.correction.answer_text=' #### {answer}'", "+edge.solution_key=extra_info.answer"]
    for kind in ("answer", "solution"):
        run = Rollout(monkeypatch, (), *settings, f"+edge.correction.mix={{{kind}: 1.0}}")
        run.judge.score = lambda ids, decode=run.tokenizer.decode: gsm8k.compute_score(decode(ids), "7")
        rows = run.run(extra_info={"answer": "Three and four are seven.\n#### 7"})
        assert [row["extra_fields"]["edge_correction"] for row in rows] == [kind] * SIZE
        assert [row["rm_scores"].sum().item() for row in rows] == [1.0] * SIZE


def test_an_agent_loop_that_the_dataset_names(monkeypatch):
    """verl's plain one is ours; any other runs as it is, and that is said."""
    rows = Rollout(monkeypatch, (), "+edge.correction.mix={answer: 1.0}").run(agent_name="single_turn_agent")
    assert [row["extra_fields"]["edge_correction"] for row in rows] == ["answer"] * SIZE
    register("of_the_user")(SingleTurnAgentLoop)
    other = Rollout(monkeypatch, ())
    monkeypatch.setattr(other.server, "generate", _unlimited(other.server))
    with pytest.warns(UserWarning, match="the agent loop of_the_user are not corrected"):
        rows = other.run(agent_name="of_the_user")
    assert len(rows) == SIZE
    assert all("edge_correction" not in row["extra_fields"] for row in rows)


def test_a_session_that_fails_holds_up_no_other(monkeypatch, caplog):
    """verl drops the group; the sessions that wait for the failed one must end."""
    run = Rollout(monkeypatch, ())
    answer = run.server.answer

    def fails_third(prompt_ids):
        if len(run.server.asked) == 3:
            raise RuntimeError("the engine is gone")
        return answer(prompt_ids)

    run.server.answer = fails_third
    rows = run.run()
    assert run.queue.tags["u"] == {"status": "failure"}
    assert len(rows) == 3
    assert "the engine is gone" in caplog.text


@pytest.mark.parametrize("overrides", [[], ["+edge.gec=false"]], ids=["validation", "switched off"])
def test_nothing_is_corrected(monkeypatch, overrides):
    run = Rollout(monkeypatch, (), *overrides)
    run.server.answer = lambda prompt_ids: run.encode("no" * 48)
    monkeypatch.setattr(run.server, "generate", _unlimited(run.server))
    rows = run.run(validate=not overrides)
    assert all("edge_correction" not in row["extra_fields"] for row in rows)
    assert all("max_tokens" not in params for _, params in run.server.asked)


def _unlimited(server: Server):
    generate = server.generate

    async def call(request_id, *, sampling_params, **options):
        output = await generate(request_id, sampling_params={"max_tokens": 96}, **options)
        server.asked[-1] = (server.asked[-1][0], dict(sampling_params))
        return output

    return call


def test_a_first_attempt_that_is_too_long_is_cut(monkeypatch):
    """An engine that reads no max_tokens: the corrected response must fit verl's limit all the same."""
    run = Rollout(monkeypatch, ())
    generate = run.server.generate

    async def ignores_the_limit(request_id, *, sampling_params, **options):
        return await generate(request_id, sampling_params={**sampling_params, "max_tokens": 96}, **options)

    run.server.answer = lambda prompt_ids: run.encode("wrong " * 40)
    run.server.generate = ignores_the_limit
    rows = run.run()
    assert max(len(row["responses"]) for row in rows) <= 96
    assert all(len(ids) == 32 for ids in run.judge.judged[:SIZE])
