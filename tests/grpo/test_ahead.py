"""``rollout.ahead``: a step is sampled while the one before is learnt from; which weights, which loss, what is resumed.

The server is a thread of the test that samples from the weights it is sent.
"""

from __future__ import annotations

import copy
import itertools
import json
import math
import os
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from corrections import ScriptedEngine
from fake_servers import ModelServer, running
from test_collect import collector, step
from training import assign, flat_gradient, gradient, records

from edge_grpo.batching import Sample
from edge_grpo.config import EvalConfig, ModelConfig, TrainConfig
from edge_grpo.policy.loading import eos_token_ids, load_model
from edge_grpo.rollout.ahead import Rollouts
from edge_grpo.rollout.collected import Collected, from_plain, to_plain
from edge_grpo.run.stop import Stopped
from edge_grpo.trainer import Trainer, plan, train
from edge_grpo.types import Provenance, RolloutError
from edge_kernels import GRPOLossConfig

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore:.*use_reentrant.*")]


@pytest.fixture
def server() -> Iterator[ModelServer]:
    model, tokenizer = load_model(ModelConfig())
    with running(ModelServer(model, eos_token_ids(model, tokenizer), tokenizer.pad_token_id)) as fake:
        yield fake


@pytest.fixture
def ahead(config: TrainConfig, server: ModelServer, tmp_path: Path) -> Iterator[TrainConfig]:
    """Runs that sample ahead; none of them may leave a thread behind."""
    rollout = replace(config.rollout, engine="vllm-server", server=server.address, server_folder=str(tmp_path), ahead=1)
    before = set(threading.enumerate())
    loss = GRPOLossConfig(entropy_coef=0.1)  # a gradient also where corrections have made all responses right
    yield replace(config, steps=4, loss=loss, rollout=replace(rollout, timeout=60.0))
    for thread in set(threading.enumerate()) - before:
        thread.join(60)
        assert not thread.is_alive(), thread


def comparable(folder: Path) -> list[Mapping[str, float]]:
    timing = ("time/", "throughput/", "memory/")
    return [{k: v for k, v in record.items() if not k.startswith(timing)} for record in records(folder)]


# ---- Which weights, and when ---------------------------------------------------------------------------------------


def test_a_step_samples_while_the_one_before_learns(ahead, server, monkeypatch):
    """Order, not time: no step but the last learns before its successor has begun to sample, from the same weights."""
    initialize = Trainer.__init__
    learnt: list[str] = []

    def init(self: Trainer, config: TrainConfig) -> None:
        initialize(self, config)
        inner = self.learner.update

        def after_the_next_has_begun(samples: Sequence[Sample], number: int) -> dict[str, float]:
            if number < config.steps:
                assert began.acquire(timeout=60), f"step {number + 1} does not sample while step {number} learns"
            learnt.append(server.version)
            return inner(samples, number)

        self.learner.update = after_the_next_has_begun  # type: ignore[method-assign]

    began = threading.Semaphore(0)
    answer = server.answer
    groups = itertools.count(1)

    def note(path: str, body: dict) -> dict:
        if path == "/inference/v1/generate" and body["sampling_params"]["n"] == 4:
            number = next(groups)  # of each step there are two; the first one's are sampled before it learns
            if number > 2 and number % 2:
                began.release()
        return answer(path, body)

    monkeypatch.setattr(Trainer, "__init__", init)
    monkeypatch.setattr(server, "answer", note)
    train(replace(ahead, method="grpo"))
    versions = [event[1] for event in server.events if event[0] == "version"]
    assert len(versions) == len(set(versions)) == 5  # at the start, and after each step
    begun = [[event for event in server.events if event == ("begin", version)] for version in versions]
    # One request of ``verify`` and two of each step: steps 1 and 2 from the first weights, the last two are never used.
    assert [len(requests) for requests in begun] == [1 + 2 + 2, 2, 2, 0, 0]
    assert learnt == versions[:4]  # step s learns while the server has the weights after s - 1 steps
    in_flight = 0
    for event in server.events:
        in_flight += {"begin": 1, "end": -1}.get(event[0], 0)
        assert not (in_flight and event[0] in ("weights", "version"))


def test_the_loss_corrects_for_the_weights_of_the_sampler(ahead):
    """Step 2 by hand: -sum(A * min(p_1 / p_0, cap) * d log p_1) / tokens, p_s by a plain forward pass after s steps."""
    trainer = Trainer(replace(ahead, loss=replace(ahead.loss, sampler_ratio_cap=1.02)))
    model = trainer.learner.model
    before = copy.deepcopy(model)
    trainer.step(1)
    trainer.learner.loss = replace(trainer.learner.loss, entropy_coef=0.0)
    samples = trainer.rollouts.take(2).samples
    trainer.learner.score(samples)
    assign(trainer, samples)
    for number, sample in enumerate(samples):
        sample.advantage = float(number) - 3.5
    ours = gradient(trainer.learner, samples)

    def logprobs(policy: torch.nn.Module, sample: Sample) -> torch.Tensor:
        ids = torch.tensor([sample.prompt.token_ids + sample.response.token_ids])
        values = policy(input_ids=ids).logits[0, :-1].log_softmax(-1)
        return values.gather(1, ids[0, 1:, None])[len(sample.prompt.token_ids) - 1 :, 0]

    trainer.learner.policy.zero_grad()
    tokens = sum(len(sample.response.token_ids) for sample in samples)
    total = torch.zeros(())
    truncated = kept = 0
    for sample in samples:
        own = logprobs(model, sample)
        with torch.no_grad():
            recorded = torch.tensor(sample.response.logprobs)
            stale = logprobs(before, sample)
            injected = torch.tensor([mark == Provenance.INJECTED for mark in sample.response.provenance])
            # Continuations too: everything of a step is sampled with the same weights.
            torch.testing.assert_close(recorded[~injected], stale[~injected], rtol=0, atol=1e-4)
            ratio = (own - stale).exp().masked_fill(injected, 1.0)
            truncated, kept = truncated + int((ratio > 1.02).sum()), kept + int((ratio < 1.02).sum())
        total = total - (sample.advantage * ratio.clamp(max=1.02) * own).sum() / tokens
    total.backward()
    plain = flat_gradient(trainer.learner)
    trainer.close()
    assert truncated > 0
    assert kept > 0
    torch.testing.assert_close(ours, plain, rtol=0, atol=float(1e-4 * plain.abs().max()))


# ---- Stopping, failing, resuming -----------------------------------------------------------------------------------


def test_stopped_and_resumed_equals_uninterrupted(ahead, server, tmp_path, monkeypatch):
    """SIGTERM while step 2 learns and step 3 is sampled: those samples are in the checkpoint, and are learnt from."""
    ahead = replace(ahead, save_every=10, rollout=replace(ahead.rollout, resample=1))
    ahead = replace(ahead, eval=EvalConfig(data="arithmetic:1@test", size=8, every=3))
    train(replace(ahead, output=str(tmp_path / "whole")))
    _, *steps = records(tmp_path / "whole")
    assert [record["rollout/staleness"] for record in steps] == [0, 1, 1, 1]
    assert steps[0]["ratio/sampler_max"] == pytest.approx(1, abs=1e-3)
    assert all(record["ratio/sampler_max"] > 1.01 for record in steps[1:])  # the rate is high
    assert all(record["time/wait"] >= 0 for record in steps)
    versions = [event[1] for event in server.events if event[0] == "version"]
    assert server.events.count(("begin", versions[-1])) == 8  # the last evaluation: with the weights that are saved

    assign_advantages = Trainer._assign_advantages
    made: list[Sequence[Sample]] = []

    def stop(self: Trainer, samples: Sequence[Sample]) -> None:
        made.append(samples)
        if len(made) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        assign_advantages(self, samples)

    monkeypatch.setattr(Trainer, "_assign_advantages", stop)
    with pytest.raises(Stopped):
        train(ahead)
    assert [record["step"] for record in records(tmp_path / "run")] == [0, 1, 2]
    train(ahead, resume=True)
    assert comparable(tmp_path / "run") == comparable(tmp_path / "whole")
    checkpoints = tmp_path / "run" / "checkpoints"
    assert [path.parent.name for path in checkpoints.glob("*/rollout_0.json")] == ["step-000002"]  # 4 is the last step


def test_an_error_of_the_next_steps_sampling_ends_the_run(ahead, server, tmp_path, monkeypatch):
    """The server refuses the requests of step 3: step 2 is not recorded, and the checkpoint before it stands."""
    answer = server.answer
    groups = 0

    def refuse(path: str, body: dict) -> dict:
        nonlocal groups
        groups += path == "/inference/v1/generate" and body["sampling_params"]["n"] == 4
        return {"choices": []} if groups > 4 else answer(path, body)

    monkeypatch.setattr(server, "answer", refuse)
    with pytest.raises(RolloutError, match="returned 0 completions where 4 were asked for"):
        train(replace(ahead, method="grpo", save_every=1))
    assert [record["step"] for record in records(tmp_path / "run")] == [1]


def test_an_error_of_the_learner_ends_the_sampling(ahead, server, monkeypatch):
    """The server would never answer the requests of step 2: they are given up."""
    release = threading.Event()
    answer = server.answer
    groups = 0

    def hold(path: str, body: dict) -> dict:
        nonlocal groups
        groups += path == "/inference/v1/generate" and body["sampling_params"]["n"] == 4
        if groups > 2:
            release.wait(60)
        return answer(path, body)

    def fail(self: Trainer, samples: Sequence[Sample]) -> None:
        raise FloatingPointError("diverged")

    monkeypatch.setattr(server, "answer", hold)
    monkeypatch.setattr(Trainer, "_assign_advantages", fail)
    try:
        with pytest.raises(FloatingPointError, match="diverged"):
            train(replace(ahead, method="grpo"))
        assert not release.is_set()
    finally:
        release.set()


def test_a_plan_samples_ahead_too(ahead):
    assert any(line.startswith("time") for line in plan(replace(ahead, method="grpo")).lines())


def test_what_is_begun_is_taken_once_and_in_turn():
    begun: list[int] = []

    def collect(number: int) -> Collected:
        begun.append(number)
        return Collected([], rounds=number)

    rollouts = Rollouts(collect, ahead=True, last=3)
    taken = []
    for number in (1, 2, 3):
        taken.append(rollouts.take(number))
        rollouts.wait()
    assert begun == [one.rounds for one in taken] == [1, 2, 3]
    assert [one.staleness for one in taken] == [0, 1, 1]
    assert rollouts.pending is None
    at_once = Rollouts(collect, ahead=False, last=9)
    assert at_once.take(1).rounds == 1
    at_once.wait()
    assert begun == [1, 2, 3, 1]


# ---- As plain data -------------------------------------------------------------------------------------------------


def parts_of(processes: int, number: int = 2) -> tuple[list[Collected], list]:
    """What so many processes collect for a step of four groups, and their prompts."""
    owners = [collector(ScriptedEngine("5", "6"), rank=rank, processes=processes) for rank in range(processes)]
    for own in owners:
        own.prompts = owners[0].prompts
    found = [Collected(step(own, number), 1 + rank, 10, {"calls": [float(rank)]}) for rank, own in enumerate(owners)]
    return found, owners[0].prompts


def test_plain_data_gives_the_samples_back():
    (whole,), prompts = parts_of(1)
    assert any(sample.response is not sample.first for sample in whole.samples)
    dropped = whole.samples[2:4]
    whole = replace(whole, dropped=tuple(dropped), rounds=1, staleness=1, seconds={"rollout": 0.5})
    text = json.dumps(to_plain(whole, prompts))
    back = from_plain([json.loads(text)], prompts, groups=range(4), rank=0, processes=1)
    assert repr(back) == repr(whole)  # NaN is not equal to itself
    assert any(math.isnan(value) for sample in back.samples for value in sample.response.logprobs)
    for old, new in zip(whole.samples, back.samples, strict=True):
        assert new.prompt is old.prompt
        assert (new.response is new.first) == (old.response is old.first)
        assert all(type(mark) is Provenance for mark in new.response.provenance)


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1), (4, 2), (2, 4)])
def test_another_number_of_processes_shares_them_anew(before, after):
    saved, prompts = parts_of(before)
    trees = [json.loads(json.dumps(to_plain(part, prompts))) for part in saved]
    groups = [range(rank * 4 // after, (rank + 1) * 4 // after) for rank in range(after)]
    now = [from_plain(trees, prompts, groups=groups[rank], rank=rank, processes=after) for rank in range(after)]
    everything = [sample for part in saved for sample in part.samples]
    assert repr([sample for part in now for sample in part.samples]) == repr(everything)
    for rank, part in enumerate(now):
        assert {sample.group for sample in part.samples} == set(groups[rank])
    assert sum(part.fallbacks for part in now) == sum(part.fallbacks for part in saved)
    assert sorted(value for part in now for value in part.logged.get("calls", ())) == list(range(before))


def test_samples_of_other_prompts_are_not_used():
    saved, prompts = parts_of(2)
    trees = [to_plain(part, prompts) for part in saved]
    changed = [replace(prompt, token_ids=(*prompt.token_ids, 7)) for prompt in prompts]
    for other in (changed, prompts[:1]):
        assert all(from_plain(trees, other, groups=range(2), rank=rank, processes=2) is None for rank in (0, 1))
