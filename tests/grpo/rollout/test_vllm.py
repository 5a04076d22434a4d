"""Real vLLM on the CPU, in process and as a server: what it samples, by which weights, and what a kill leaves.

Each engine starts once; they sample from the shipped model in float32, so that logprobs can be compared closely.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import math
import os
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from edge_grpo import trainer
from edge_grpo.collect import carry_out
from edge_grpo.config import CorrectionConfig, DataConfig, OptimConfig, RolloutConfig, TrainConfig
from edge_grpo.correction import Corrector
from edge_grpo.data.prompts import render_prompts
from edge_grpo.data.sources import load_examples
from edge_grpo.policy.loading import eos_token_ids, load_model
from edge_grpo.rollout import build_engine
from edge_grpo.rollout.wire import verify
from edge_grpo.run import checkpoint
from edge_grpo.types import Prompt, Provenance, Reward, RolloutEngine, RolloutError, Sampling
from edge_kernels import GRPOLossConfig, reference

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("vllm") is None, reason="vLLM is not installed; `make vllm` installs it for the CPU"
    ),
]

CONFIG = TrainConfig(
    data=DataConfig(train="arithmetic:1,2", max_prompt_length=64),
    # So few tokens at once that one of several prompts would be read in chunks, which ends vLLM 0.32 on a CPU.
    rollout=RolloutConfig(
        num_prompts=2,
        num_generations=4,
        max_completion_length=24,
        batch_size=16,
        vllm={"max_num_batched_tokens": 200},
    ),
    correction=CorrectionConfig(max_length=96),
    optim=OptimConfig(learning_rate=1e-3),
)
GREEDY = Sampling(max_tokens=12, temperature=0.0)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@contextlib.contextmanager
def serving(config: TrainConfig) -> Iterator[subprocess.Popen[bytes]]:
    """A real server in a process group of its own, started by the command that users start it with."""
    keys = {
        "data.max_prompt_length": config.data.max_prompt_length,
        "rollout.max_completion_length": config.rollout.max_completion_length,
        "rollout.batch_size": config.rollout.batch_size,
        "rollout.server": config.rollout.server,
        "rollout.server_folder": config.rollout.server_folder,
        "correction.max_length": config.correction.max_length,
    }
    keys |= {f"rollout.vllm.{name}": value for name, value in config.rollout.vllm.items()}
    process = subprocess.Popen(
        [sys.executable, "-m", "edge_grpo", "serve", *(f"{key}={value}" for key, value in keys.items())],
        env=os.environ | {"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"},
        stdout=subprocess.DEVNULL,  # it is in the log
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        kill(process)


def kill(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def by_server(config: TrainConfig, folder: Path) -> TrainConfig:
    rollout = replace(
        config.rollout,
        engine="vllm-server",
        server=f"127.0.0.1:{free_port()}",
        server_folder=str(folder),
        timeout=180.0,
    )
    return replace(config, rollout=rollout)


class Sampler(NamedTuple):
    engine: RolloutEngine
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    config: TrainConfig


@pytest.fixture(scope="module", params=["vllm", "vllm-server"])
def sampler(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sampler]:
    config = replace(CONFIG, rollout=replace(CONFIG.rollout, engine="vllm"))
    with contextlib.ExitStack() as stack:
        if request.param == "vllm-server":
            config = by_server(CONFIG, tmp_path_factory.mktemp("server"))
            stack.enter_context(serving(config))
        model, tokenizer = load_model(config.model)
        engine = build_engine(config, model, tokenizer)
        stack.callback(engine.close)
        yield Sampler(engine, model, tokenizer, config)


@pytest.fixture
def restored(sampler: Sampler) -> Iterator[Sampler]:
    """The sampler for a test that changes the weights: model and engine get the old ones back."""
    before = {name: value.clone() for name, value in sampler.model.state_dict().items()}
    yield sampler
    sampler.model.load_state_dict(before)
    sampler.engine.update_weights(sampler.model)


def prompts(sampler: Sampler, count: int) -> list[Prompt]:
    examples = load_examples(sampler.config.data.train, {}, limit=count)
    return render_prompts(examples, sampler.tokenizer, sampler.config.data)[0]


@torch.no_grad()
def scored(model: PreTrainedModel, prompt, token_ids, temperature: float) -> torch.Tensor:
    """The logprobs of a response from one plain forward pass."""
    ids = torch.tensor([[*prompt, *token_ids]])
    logits = model(input_ids=ids).logits[0, len(prompt) - 1 : -1]
    return reference.token_stats(logits, ids[0, len(prompt) :], temperature=temperature).logprobs


@torch.no_grad()
def greedy(model: PreTrainedModel, prompt, eos, length: int) -> tuple[int, ...]:
    ids: list[int] = []
    while len(ids) < length and not set(ids) & set(eos):
        ids.append(int(model(input_ids=torch.tensor([[*prompt, *ids]])).logits[0, -1].argmax()))
    return tuple(ids)


def change(model: PreTrainedModel) -> None:
    """Move every parameter, norms and both ends included, as an optimizer step does, only further."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for value in model.parameters():
            value.add_(torch.randn(value.shape, generator=generator), alpha=0.5 * float(value.std()) + 0.01)


def test_logprobs_are_those_of_a_forward_pass(sampler):
    """Groups of four, prompts of several lengths; two temperatures, since vLLM can report them before or after."""
    given = [prompt.token_ids for prompt in prompts(sampler, 5) for _ in range(4)]
    reasons: Counter[str] = Counter()
    for temperature in (1.0, 0.6):
        sampling = Sampling(max_tokens=14, temperature=temperature)
        responses = sampler.engine.generate(given, sampling, seed=3)
        assert len(responses) == len(given)
        for prompt, response in zip(given, responses, strict=True):
            expected = scored(sampler.model, prompt, response.token_ids, temperature)
            torch.testing.assert_close(torch.tensor(response.logprobs), expected, rtol=0, atol=1e-4)
            assert all(map(math.isnan, response.entropy))
            assert set(response.provenance) == {Provenance.SAMPLED}
            reasons[response.finish_reason] += 1
            *body, last = response.token_ids
            eos = eos_token_ids(sampler.model, sampler.tokenizer)
            assert not set(body) & set(eos)
            assert (response.finish_reason == "stop") == (last in eos)
            assert response.finish_reason == "stop" or len(response.token_ids) == sampling.max_tokens
    assert reasons["stop"] >= 3
    assert reasons["length"] >= 3


def test_more_prompts_than_fit_into_one_pass(sampler):
    """Twelve prompts of 60 tokens where a pass has 200; each is another, so that no cached prefix shortens it."""
    given = [[(7 * place + number) % 300 + 3 for place in range(60)] for number in range(12)]
    for prompt, response in zip(given, sampler.engine.generate(given, Sampling(max_tokens=3), seed=0), strict=True):
        expected = scored(sampler.model, prompt, response.token_ids, 1.0)
        torch.testing.assert_close(torch.tensor(response.logprobs), expected, rtol=0, atol=1e-4)


def test_seeds(sampler):
    given = [prompt.token_ids for prompt in prompts(sampler, 2) for _ in range(6)]
    first, again, other = (sampler.engine.generate(given, Sampling(max_tokens=8), seed=seed) for seed in (1, 1, 2))
    assert [r.token_ids for r in first] == [r.token_ids for r in again]
    assert [r.token_ids for r in first] != [r.token_ids for r in other]
    assert len({r.token_ids for r in first[:6]}) > 1  # the completions of a group differ


def test_ids_that_are_no_text_pass_unchanged(sampler):
    """Bytes that are no UTF-8, and special tokens in mid-prompt: a text round trip would change them."""
    vocabulary = sampler.model.config.vocab_size
    odd = [[7 * place % vocabulary for place in range(offset, offset + 20)] for offset in (3, 50, 200)]
    assert any(list(sampler.tokenizer(sampler.tokenizer.decode(ids))["input_ids"]) != ids for ids in odd)
    for prompt, response in zip(odd, sampler.engine.generate(odd, GREEDY, seed=0), strict=True):
        expected = scored(sampler.model, prompt, response.token_ids, 1.0)
        torch.testing.assert_close(torch.tensor(response.logprobs), expected, rtol=0, atol=1e-4)


def test_a_partial_completion_is_continued(sampler):
    eos = eos_token_ids(sampler.model, sampler.tokenizer)
    for prompt in prompts(sampler, 3):
        whole = greedy(sampler.model, prompt.token_ids, eos, 12)
        (rest,) = sampler.engine.generate([prompt.token_ids + whole[:2]], replace(GREEDY, max_tokens=10), seed=0)
        assert whole[:2] + rest.token_ids == whole


def test_reflection_keeps_what_was_sampled(sampler):
    config = CorrectionConfig(mix={"reflect": 1.0}, max_length=60)
    sampling = Sampling(max_tokens=10)
    corrector = Corrector(
        config,
        encode=lambda text: sampler.tokenizer(text, add_special_tokens=False)["input_ids"],
        eos_token_ids=eos_token_ids(sampler.model, sampler.tokenizer),
        max_tokens=sampling.max_tokens,
    )
    asked = prompts(sampler, 4)
    first = sampler.engine.generate([prompt.token_ids for prompt in asked], sampling, seed=5)
    wrong = [Reward(0.0, {}, "wrong")] * len(asked)
    plan = corrector.plan(asked, first, wrong, range(len(asked)), seed=0)
    corrected = carry_out(plan, sampler.engine, sampling, seed=0)
    for prompt, before, after in zip(asked, first, corrected, strict=True):
        kept = after.provenance.count(Provenance.SAMPLED)
        assert after.token_ids[:kept] == before.token_ids[:kept]
        assert kept >= len(before.token_ids) - 1  # but for the end of sequence
        expected = scored(sampler.model, prompt.token_ids, after.token_ids, 1.0)
        for logprob, own, mark in zip(expected, after.logprobs, after.provenance, strict=True):
            assert math.isnan(own) if mark == Provenance.INJECTED else own == pytest.approx(float(logprob), abs=1e-4)
        assert after.provenance.count(Provenance.CONTINUED) > 0


def test_a_push_changes_what_is_sampled_to_the_trained_weights(restored):
    """Greedy tokens and logprobs are the old weights' until the push, and the new ones' after it."""
    engine, model = restored.engine, restored.model
    eos = eos_token_ids(model, restored.tokenizer)
    given = [prompt.token_ids for prompt in prompts(restored, 4)]
    old = [greedy(model, prompt, eos, 12) for prompt in given]
    old_logprobs = [scored(model, prompt, ids, 1.0) for prompt, ids in zip(given, old, strict=True)]
    change(model)
    new = [greedy(model, prompt, eos, 12) for prompt in given]
    assert all(a != b for a, b in zip(old, new, strict=True)), "change the weights more"

    before = engine.generate(given, GREEDY, seed=0)
    assert [response.token_ids for response in before] == old
    for response, expected in zip(before, old_logprobs, strict=True):
        torch.testing.assert_close(torch.tensor(response.logprobs), expected, rtol=0, atol=1e-4)
    with pytest.raises(RolloutError, match="nats on average"):
        verify(engine, model, seed=0)

    engine.update_weights(model)
    after = engine.generate(given, GREEDY, seed=0)
    assert [response.token_ids for response in after] == new
    for prompt, response in zip(given, after, strict=True):
        expected = scored(model, prompt, response.token_ids, 1.0)
        torch.testing.assert_close(torch.tensor(response.logprobs), expected, rtol=0, atol=1e-4)
    verify(engine, model, seed=0)


def test_a_push_of_adapters_changes_what_is_sampled(restored):
    """The engine, which was built from the base model, gets each adapter merged into its layer's weight."""
    engine, eos = restored.engine, eos_token_ids(restored.model, restored.tokenizer)
    adapted, _ = load_model(replace(restored.config.model, lora={"rank": 4}))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for value in adapted.parameters():
            if value.requires_grad:
                value.copy_(torch.randn(value.shape, generator=generator) * 0.2)
    given = [prompt.token_ids for prompt in prompts(restored, 4)]
    old = [greedy(restored.model, prompt, eos, 12) for prompt in given]
    new = [greedy(adapted, prompt, eos, 12) for prompt in given]
    assert all(a != b for a, b in zip(old, new, strict=True)), "change the adapters more"
    engine.update_weights(adapted)
    assert [response.token_ids for response in engine.generate(given, GREEDY, seed=0)] == new
    verify(engine, adapted, seed=0)


def test_what_does_not_fit_is_refused(sampler):
    longest = 64 + 24 + 96
    assert sampler.engine.generate([[5] * (longest - 12)], GREEDY, seed=0)
    with pytest.raises(ValueError, match=f"the engine holds {longest}"):
        sampler.engine.generate([[5] * (longest - 11)], GREEDY, seed=0)
    assert sampler.engine.generate([], GREEDY, seed=0) == []


def test_the_process_is_left_as_it_was(sampler):
    """vLLM sets seeds and thread numbers, and on a CPU takes the function away that sets them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    assert torch.get_num_threads() == threads + 1
    torch.set_num_threads(threads)
    torch.manual_seed(11)
    expected = torch.rand(3)
    torch.manual_seed(11)
    sampler.engine.generate([[5, 6]], Sampling(max_tokens=2), seed=0)
    assert torch.equal(torch.rand(3), expected)


def test_training_steps(sampler, tmp_path, monkeypatch):
    """Ratios near 1 in float32 step after step: each step samples with the weights that the last one made."""
    monkeypatch.setattr(trainer, "build_engine", lambda config, model, tokenizer: Lent(sampler.engine, model))
    # The entropy bonus has a gradient in any case: corrected groups of this model may all be right.
    loss = GRPOLossConfig(entropy_coef=0.01)
    config = replace(sampler.config, loss=loss, output=str(tmp_path / "run"), steps=3, save_every=0)
    trainer.train(config)
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(records) == 3
    for record in records:
        assert record["ratio/sampler_mean"] == pytest.approx(1.0, abs=1e-4)
        assert record["ratio/sampler_p99"] == pytest.approx(1.0, abs=1e-3)
        assert record["ratio/sampler_max"] == pytest.approx(1.0, abs=1e-2)
        assert record["ratio/sampler_truncated"] == 0
        assert record["drift/logprob_max"] < 1e-3
        assert record["grad/norm"] > 0  # so that the next step samples with other weights
    assert sum(record["tokens/injected_share"] for record in records) > 0
    sampler.engine.update_weights(sampler.model)


class Lent:
    """An engine that outlives the trainer it is lent to."""

    def __init__(self, engine: RolloutEngine, model: PreTrainedModel) -> None:
        self._engine = engine
        engine.update_weights(model)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def close(self) -> None:
        pass


def test_a_killed_server_ends_the_run_and_resuming_goes_on(tmp_path):
    """SIGKILL to a real server in mid-run; the run's process says what to do; both are started again."""
    config = by_server(CONFIG, tmp_path / "shared")
    output = tmp_path / "run"
    command = [sys.executable, "-m", "edge_grpo", "train", "--output", str(output)]
    keys = [
        "data.train=arithmetic:1,2",
        "data.max_prompt_length=64",
        "rollout.engine=vllm-server",
        f"rollout.server={config.rollout.server}",
        f"rollout.server_folder={config.rollout.server_folder}",
        "rollout.num_prompts=2",
        "rollout.num_generations=4",
        "rollout.max_completion_length=24",
        "rollout.batch_size=16",
        "correction.max_length=96",
        "save_every=1",
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with serving(config) as server:
        run = subprocess.Popen([*command, *keys, "steps=100000"], env=environment, stderr=subprocess.PIPE, text=True)
        deadline = time.monotonic() + 240
        while not checkpoint.steps(output / "checkpoints")[1:]:
            assert run.poll() is None, run.communicate()[1]
            assert time.monotonic() < deadline
            time.sleep(0.05)
        kill(server)
        _, said = run.communicate(timeout=60)
    assert run.returncode == 3, said
    saved = checkpoint.steps(output / "checkpoints")
    assert f"step {saved[-1]} is saved; continue with\n  edge-grpo train --resume --output {output} --trust" in said
    assert "Nothing of this step was trained on. Start the server again" in said
    last_line = (tmp_path / "shared" / "server.log").read_text().splitlines()[-1]
    assert said.rstrip().endswith(last_line)
    assert "Traceback" not in said

    with serving(config):
        resumed = subprocess.run(
            [*command, "--resume", "--trust", f"steps={saved[-1] + 1}"], env=environment, capture_output=True, text=True
        )
    assert resumed.returncode == 0, resumed.stderr
    steps = [json.loads(line)["step"] for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, saved[-1] + 2))
    assert (output / "final" / "model.safetensors").is_file()
