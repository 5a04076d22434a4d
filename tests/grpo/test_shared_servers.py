"""Two trainer processes that share two servers, which sample from the weights that they are sent; and who fails when.

The processes are real ones over gloo. The servers are threads of the test; a real one is in rollout/test_vllm.py.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from fake_servers import ModelServer, running
from training import records

from edge_grpo.config import EvalConfig, ModelConfig, TrainConfig, to_dict
from edge_grpo.policy.loading import eos_token_ids, load_model
from edge_grpo.trainer import train

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]


@pytest.fixture
def servers() -> Iterator[list[ModelServer]]:
    model, tokenizer = load_model(ModelConfig())
    first, second = (ModelServer(model, eos_token_ids(model, tokenizer), tokenizer.pad_token_id) for _ in range(2))
    with running(first), running(second):
        yield [first, second]


@pytest.fixture
def shared(config: TrainConfig, servers: list[ModelServer], tmp_path: Path) -> TrainConfig:
    """Four groups a step: two for each process, one of which goes to each server."""
    addresses = tuple(server.address for server in servers)
    rollout = replace(config.rollout, engine="vllm-server", num_prompts=4, server=addresses, timeout=60.0)
    return replace(config, rollout=replace(rollout, server_folder=str(tmp_path / "shared")))


def launch(config: TrainConfig, tmp_path: Path, *program: str) -> subprocess.CompletedProcess[str]:
    """Run a program with the configuration's file on two processes."""
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(to_dict(config)))
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *program, str(file)],
        env=os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )


def test_each_step_samples_with_the_weights_of_its_own(shared, servers, tmp_path):
    """And as one process alone does. Learning is so fast that older weights would show in the ratios."""
    config = replace(shared, steps=3, method="grpo", eval=EvalConfig(data="arithmetic:1@test", size=8, every=2))
    result = launch(config, tmp_path, "-m", "edge_grpo", "train", "--config")
    assert result.returncode == 0, result.stderr[-3000:]
    before, *steps = records(tmp_path / "run")
    assert before["eval/accuracy"] >= 0
    assert sum(step["grad/norm"] > 0 for step in steps) > 0
    for step in steps:
        assert step["ratio/sampler_max"] == pytest.approx(1, abs=1e-3)
        assert step["drift/logprob_max"] < 1e-3
    events = [list(server.events) for server in servers]
    train(replace(config, output=str(tmp_path / "alone")))
    for expected, got in zip(records(tmp_path / "alone"), [before, *steps], strict=True):
        for key in expected.keys() & {"eval/accuracy", "reward/mean", "length/mean", "loss", "grad/norm"}:
            assert got[key] == pytest.approx(expected[key], rel=1e-3, abs=1e-5), (expected["step"], key)
    for server, of_server in zip(servers, events, strict=True):
        server.events = of_server
    for server in servers:
        versions = [event[1] for event in server.events if event[0] == "version"]
        assert len(versions) == len(set(versions)) == 4  # at the start, and after each step
        assert versions == [event[1] for event in servers[0].events if event[0] == "version"]
        sampling = 0
        for event in server.events:
            sampling += {"begin": 1, "end": -1}.get(event[0], 0)
            assert not (sampling and event[0] in ("weights", "version"))  # nobody samples while weights come in
    asked = [[server.events.count(("begin", one)) for one in versions] for server in servers]
    assert asked[0] == asked[1]
    assert asked[0][1] == 2  # a step without an evaluation: a group of each process


FAILURES = """
import json, sys, yaml
import torch
from accelerate import PartialState
from edge_grpo.config import from_dict
from edge_grpo.policy.loading import load_model
from edge_grpo.rollout import build_engine, connection
from edge_grpo.rollout.together import together
from edge_grpo.types import Sampling

connection._PAUSE = 0.01
config = from_dict(yaml.safe_load(open(sys.argv[1])))
rank = PartialState(cpu=True).process_index
model, tokenizer = load_model(config.model)
engine = build_engine(config, model, tokenizer)
said = []

def attempt(work):
    try:
        said.append(work())
    except Exception as error:
        said.append(f"{type(error).__name__}: {error}")

def sample(token):
    return together(lambda: len(engine.generate([[token]], Sampling(max_tokens=2), seed=0)))

attempt(lambda: sample(5))                          # both
attempt(lambda: sample(5 if rank == 0 else 1000))   # process 1 asks for what the server refuses
attempt(lambda: sample(6 if rank == 1 else 1000))   # process 0 does
attempt(lambda: engine.update_weights(model))       # the server does not take the weights, which process 0 sends
attempt(lambda: sample(7))                          # both once more: nobody is left behind
with open(f"{sys.argv[1]}.{rank}", "w") as file:
    json.dump(said, file)
torch.distributed.destroy_process_group()
"""


def test_where_one_process_fails_all_do(shared, servers, tmp_path):
    """Whichever it is, nobody waits for it, and both say what was wrong."""
    server = servers[0]
    answer = server.answer

    def refuse(path: str, body: dict) -> dict:
        return {"choices": []} if 1000 in body.get("token_ids", ()) else answer(path, body)

    server.answer = refuse  # type: ignore[method-assign]
    server.trouble["/collective_rpc"] = lambda attempt: 0 if attempt > 1 else None
    rollout = replace(shared.rollout, server=server.address)
    (tmp_path / "failures.py").write_text(FAILURES)
    result = launch(replace(shared, rollout=rollout), tmp_path, str(tmp_path / "failures.py"))
    assert result.returncode == 0, result.stderr[-3000:]
    said = [json.loads((tmp_path / f"config.yaml.{rank}").read_text()) for rank in (0, 1)]
    for own, other, failing in ((said[1], said[0], 1), (said[0], said[1], 0)):
        place = 1 if failing else 2
        assert own[place].startswith(f"RolloutError: the vLLM server at http://{server.address} returned 0 completions")
        assert other[place] == f"RolloutError: process {failing} of this run failed: {own[place]}"
    assert "failed 3 times to answer /collective_rpc" in said[0][3]
    assert said[1][3] == f"RolloutError: process 0 of this run failed: {said[0][3]}"
    for own in said:
        assert (own[0], own[4]) == (1, 1)
