"""Two trainer processes that share two servers, which sample from the weights that they are sent; and who fails when.

The processes are real ones over gloo. The servers are threads of the test; a real one is in rollout/test_vllm.py.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from fake_servers import ModelServer, running
from training import records

from edge_grpo.config import EvalConfig, ModelConfig, TrainConfig, to_dict
from edge_grpo.policy.loading import eos_token_ids, load_model
from edge_grpo.trainer import train
from edge_kernels import GRPOLossConfig

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


SCRIPT = """
import json, sys, yaml
from dataclasses import replace
import torch
from accelerate import PartialState
from edge_grpo.config import from_dict
from edge_grpo.policy.loading import load_model
from edge_grpo.rollout import build_engine, connection
from edge_grpo.rollout.ahead import Rollouts
from edge_grpo.rollout.collected import Collected
from edge_grpo.policy.together import together
from edge_grpo.trainer import Trainer, train
from edge_grpo.types import Sampling

config = from_dict(yaml.safe_load(open(sys.argv[1])))
train(config)
train(replace(config, output=f"{config.output}-ahead", rollout=replace(config.rollout, ahead=1)))

rank = PartialState().process_index
connection._PAUSE = 0.01
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

def collect(step):
    if rank == 1 and step == 2:
        raise ValueError("not this one")
    return Collected([])

rollouts = Rollouts(collect, ahead=True, last=9)
attempt(lambda: sample(5))                          # both
attempt(lambda: sample(5 if rank == 0 else REFUSED))  # process 1 asks for what the server refuses
attempt(lambda: sample(6 if rank == 1 else REFUSED))  # process 0 does
attempt(lambda: engine.update_weights(model))       # a server does not take the weights, which process 0 sends
attempt(lambda: sample(7))                          # both once more: nobody is left behind
attempt(lambda: rollouts.take(1).staleness)
attempt(rollouts.wait)                              # what process 1 collects ahead fails
with open(f"{sys.argv[1]}.{rank}", "w") as file:
    json.dump(said, file)
torch.distributed.destroy_process_group()
"""
REFUSED = 1000  # no token of the model


def test_two_processes_share_two_servers(shared, servers, tmp_path):
    """On time and ahead, from the right weights, with the steps of one process alone; then each way in which one fails.

    One launch for all of it, since most of its time goes into starting processes. Learning is so fast that other
    weights would show in the ratios of trainer and sampler.
    """
    # A gradient also where corrections have made all responses right.
    config = replace(shared, steps=3, loss=GRPOLossConfig(entropy_coef=0.1))
    config = replace(config, eval=EvalConfig(data="arithmetic:1@test", size=8, every=2))
    for server in servers:
        refuse_where_asked(server)
    file, script = tmp_path / "config.yaml", tmp_path / "two.py"
    file.write_text(yaml.safe_dump(to_dict(config)))
    script.write_text(SCRIPT.replace("REFUSED", str(REFUSED)))
    result = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script), str(file)],
        env=os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    check_requests(servers)
    for server in servers:
        server.trouble.clear()  # it takes weights again
    on_time, ahead = records(tmp_path / "run"), records(tmp_path / "run-ahead")
    for record in [*on_time[1:], ahead[1]]:
        assert record["ratio/sampler_max"] == pytest.approx(1, abs=1e-3)
        assert record["drift/logprob_max"] < 1e-3
    assert [record["rollout/staleness"] for record in ahead[1:]] == [0, 1, 1]
    assert all(record["ratio/sampler_max"] > 1.01 for record in ahead[2:])
    train(replace(config, output=str(tmp_path / "alone"), rollout=replace(config.rollout, ahead=1)))
    for expected, got in zip(records(tmp_path / "alone"), ahead, strict=True):
        for key in expected.keys() & {"eval/accuracy", "reward/mean", "length/mean", "loss", "grad/norm"}:
            assert got[key] == pytest.approx(expected[key], rel=1e-3, abs=1e-5), (expected["step"], key)
    said = [json.loads((tmp_path / f"config.yaml.{rank}").read_text()) for rank in (0, 1)]
    check_failures(*said, [server.address for server in servers])


def refuse_where_asked(server: ModelServer) -> None:
    """Have the server send nothing where the token ``REFUSED`` is asked for, and from then on take no weights."""
    answer = server.answer
    refused = threading.Event()

    def instead(path: str, body: dict) -> dict:
        if REFUSED not in body.get("token_ids", ()):
            return answer(path, body)
        refused.set()
        return {"choices": []}

    server.answer = instead  # type: ignore[method-assign]
    server.trouble["/collective_rpc"] = lambda attempt: 0 if refused.is_set() else None


def check_requests(servers: Sequence[ModelServer]) -> None:
    """All servers get the same weights and the same number of requests, and sample none while weights come in."""
    pushed = [[event[1] for event in server.events if event[0] == "version"] for server in servers]
    versions = pushed[0]
    assert pushed[1] == versions
    assert len(versions) == len(set(versions)) == 4 + 4 + 1  # each run's at the start and after three steps
    for server in servers:
        sampling = 0
        for event in server.events:
            sampling += {"begin": 1, "end": -1}.get(event[0], 0)
            assert not (sampling and event[0] in ("weights", "version"))
    groups = [server.sizes[4] for server in servers]
    assert groups[0] == groups[1] == 2 * 3 * 2  # in each step of a run one group of each process


def check_failures(first: list, second: list, addresses: Sequence[str]) -> None:
    """Whichever process fails, nobody waits for it, and both say what was wrong."""
    for own, other, failing, place in ((second, first, 1, 1), (first, second, 0, 2), (first, second, 0, 3)):
        its_first = addresses[failing]  # each process begins at another server
        assert own[place].startswith(f"RolloutError: the vLLM server at http://{its_first} ")
        assert other[place] == f"RolloutError: process {failing} of this run failed: {own[place]}"
    assert "returned 0 completions" in first[2]
    assert "failed 3 times to answer /collective_rpc" in first[3]
    assert second[6] == "ValueError: not this one"
    assert first[6] == "RolloutError: process 1 of this run failed: ValueError: not this one"
    for own in (first, second):
        assert (own[0], own[4], own[5]) == (1, 1, 0)
