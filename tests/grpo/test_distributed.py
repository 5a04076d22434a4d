"""The same gradient and the same run on 1, 2 and 4 processes, with whole and with split parameters, over gloo.

What the processes do is in processes.py and resumed_runs.py. How a gradient is made of micro-batches on one process:
test_learner.py.
"""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType
from fake_servers import ModelServer, running
from forked import run_program
from paths import ROOT
from safetensors import safe_open
from training import records, rollout, untied_model
from transformers import AutoModelForCausalLM

from edge_grpo.config import ModelConfig, RolloutConfig, TrainConfig
from edge_grpo.learning.distribution import check_distribution
from edge_grpo.policy.loading import eos_token_ids, load_model
from edge_grpo.policy.sharding import is_sharded, layers_of, whole_parameters, whole_weights
from edge_grpo.run import checkpoint
from edge_grpo.trainer import Trainer, train

pytestmark = pytest.mark.usefixtures("one_thread")

# bfloat16 keeps 8 bits, and sums are split elsewhere; a packed row's products are of other shapes
ROUNDED = {"mixed": 0.02, "bfloat16": 0.02, "packed": 1e-5}


@pytest.mark.slow
def test_every_layout_gives_one_process_gradient(config, tmp_path):
    """Real DDP and FSDP2 on 2 and 4 processes. Checked first: what vLLM gets, accelerate's units, whole updates with a
    process that has no sample, and their checkpoints.

    Where one of them is starved, a collective that it left out would hang.
    Four groups of two, so that four processes have one group each; lengths are uneven as they are sampled.
    """
    trainer = Trainer(replace(config, rollout=replace(config.rollout, num_prompts=4, num_generations=2)))
    samples = rollout(trainer)
    trainer.close()
    for number, sample in enumerate(samples):
        sample.advantage = float(number) - 3.5
    assert len({len(sample.response.token_ids) for sample in samples}) > 1
    torch.save(samples, tmp_path / "samples.pt")
    run_program("processes.py", tmp_path / "samples.pt", untied_model(tmp_path / "untied"), tmp_path / "errors.json")
    errors = json.loads((tmp_path / "errors.json").read_text())
    columns = [f"{kind}, {number}" for kind in ("DDP", "FSDP2") for number in (2, 4)]
    print(f"\n| layout | {' | '.join(columns)} |\n| --- | --- | --- | --- | --- |")  # shown by pytest -s
    for name, row in errors.items():
        print(f"| {name} | {' | '.join(f'{row[one]:.1e}' if one in row else '' for one in columns)} |")
    table = (ROOT / "docs" / "distributed.md").read_text()
    for name, row in errors.items():
        assert f"\n| {name} | " in table
        assert row.keys() == set(columns[2:] if "each reduced" in name else columns)
        tolerance = next((value for part, value in ROUNDED.items() if part in name), 2e-6)
        assert max(row.values()) < tolerance, name


@pytest.mark.slow
def test_a_run_killed_on_four_processes_resumes_on_two(tmp_path):
    """SIGKILL after the first checkpoint, parameters split by FSDP2; every loss is that of a run on one process.

    So it is where two processes have sampled ahead, with other prompts for groups of equal rewards, and four go on.
    """
    model, tokenizer = load_model(ModelConfig())
    with running(ModelServer(model, eos_token_ids(model, tokenizer), tokenizer.pad_token_id)) as server:
        run_program("resumed_runs.py", tmp_path, server.address)
    check_ahead(*(records(tmp_path / name) for name in ("ahead_whole", "ahead_parts")))
    assert len(list((tmp_path / "ahead_parts" / "checkpoints" / "step-000002").glob("rollout_*.json"))) == 2
    whole, parts = records(tmp_path / "whole"), records(tmp_path / "parts")
    assert [line["step"] for line in parts] == [0, 1, 2, 3]
    assert [line["eval/accuracy"] for line in parts] == [line["eval/accuracy"] for line in whole]
    assert any(0 < line["eval/accuracy"] < 1 for line in whole)
    whole, parts = whole[1:], parts[1:]
    assert any(abs(line["loss"]) > 1e-3 for line in whole[1:])  # of the steps after the checkpoint
    for expected, got in zip(whole, parts, strict=True):
        for name in ("loss", "grad/norm", "reward/mean", "entropy/token_mean", "tokens/generated"):
            assert got[name] == pytest.approx(expected[name], rel=1e-5, abs=1e-6), (expected["step"], name)
    files = json.loads((tmp_path / "at_kill.json").read_text())
    assert [name for name in files if name.startswith("shard-")] == [
        f"shard-{rank:05}-model-00001-of-00001.safetensors" for rank in (1, 2, 3, 4)
    ]
    ends = [AutoModelForCausalLM.from_pretrained(tmp_path / name / "final").state_dict() for name in ("whole", "parts")]
    assert ends[0].keys() == ends[1].keys()
    differences = torch.cat([(ends[0][name] - ends[1][name]).abs().flatten() for name in ends[0]])
    # Adam moves an entry by about 1e-5 a step; without what the optimizer has accumulated all would differ.
    assert float(differences.max()) < 1e-6


def check_ahead(whole: list[dict], parts: list[dict]) -> None:
    assert [line["step"] for line in parts] == [1, 2, 3]
    assert [line["rollout/staleness"] for line in parts] == [0, 1, 1]
    assert whole[2]["ratio/sampler_max"] > 1.01  # the weights after step 1 sampled what those after step 2 learn from
    assert any(line["resample/dropped"] for line in whole)
    for expected, got in zip(whole, parts, strict=True):
        for name, value in expected.items():
            if not name.startswith(("time/", "throughput/", "memory/")):
                assert got[name] == pytest.approx(value, rel=1e-3, abs=1e-5, nan_ok=True), (expected["step"], name)


def test_a_split_checkpoint_is_read_by_one_process(config):
    """One process writes and reads the files that several do; its next step is the uninterrupted run's."""
    config = replace(config, model=ModelConfig(sharding="fsdp2"), save_every=1)
    train(config)
    folder = Path(config.output) / "checkpoints" / "step-000001"
    (shard,) = folder.glob("shard-*.safetensors")
    with safe_open(shard, "pt") as file:
        assert {name.partition(":")[0] for name in file.keys()} == {"model", "step", "exp_avg", "exp_avg_sq"}  # noqa: SIM118
    expected = records(Path(config.output))
    for later in folder.parent.glob("step-000002"):
        for path in later.iterdir():
            path.unlink()
        later.rmdir()
    train(config, resume=True)
    for before, after in zip(expected, records(Path(config.output)), strict=True):
        assert after["loss"] == before["loss"]
        assert after["grad/norm"] == before["grad/norm"]


@pytest.mark.parametrize("damage", ["changed", "missing", "foreign"])
def test_damaged_shards_are_refused(config, damage):
    config = replace(config, model=ModelConfig(sharding="fsdp2"), save_every=2)
    train(config)
    folder = Path(config.output) / "checkpoints" / "step-000002"
    (shard,) = folder.glob("shard-*.safetensors")
    if damage == "changed":
        data = bytearray(shard.read_bytes())
        data[-1] ^= 1
        shard.write_bytes(data)
    elif damage == "missing":
        shard.unlink()
    else:  # left by a run of more processes: it would be read as a part of this one
        (folder / "shard-00002-model-00001-of-00001.safetensors").write_bytes(shard.read_bytes())
    with pytest.raises(checkpoint.state.UnreadableError, match=f"shard.*delete {folder}"):
        train(replace(config, steps=3), resume=True)


def launched(kind: DistributedType, processes: int = 2) -> SimpleNamespace:
    return SimpleNamespace(distributed_type=kind, num_processes=processes, device=torch.device("cpu"))


@pytest.mark.parametrize(("engine", "instead"), [("FSDP", " instead"), ("DeepSpeed", r".*examples/trl_zero\.py")])
def test_what_accelerate_ignores_on_a_cpu_is_refused(monkeypatch, config, engine, instead):
    check_distribution(TrainConfig(), launched(DistributedType.MULTI_CPU))
    monkeypatch.setenv(f"ACCELERATE_USE_{engine.upper()}", "true")
    said = rf"launched this run with {engine}, which accelerate ignores.*set model\.sharding=fsdp2{instead}"
    with pytest.raises(ValueError, match=said):
        Trainer(config)
    assert (ROOT / "examples" / "trl_zero.py").is_file()


@pytest.mark.slow
def test_accelerates_own_launcher_is_refused(tmp_path):
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--use_fsdp", "--num_processes", "1"]
    train = ["-m", "edge_grpo", "train", "--recipe", "tiny", "--output", str(tmp_path / "run")]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    result = subprocess.run([*launch, *train], env=environment, capture_output=True, text=True)
    assert result.returncode != 0
    assert re.search(r"accelerate launched this run with FSDP.*set model\.sharding=fsdp2", result.stderr)


@pytest.mark.parametrize("kind", [DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM])
def test_other_launches_are_refused_with_the_way_to_shard(kind):
    with pytest.raises(ValueError, match=r"model\.sharding=fsdp2"):
        check_distribution(TrainConfig(), launched(kind))


def test_groups_stay_whole_on_their_process():
    three = TrainConfig(rollout=RolloutConfig(num_prompts=8))
    with pytest.raises(ValueError, match=r"divisible by processes x optim\.minibatches = 3 x 1"):
        check_distribution(three, launched(DistributedType.MULTI_CPU, 3))


def test_layers_are_units(make_model):
    model = make_model()
    assert layers_of(model) == list(model.model.layers)
    model._no_split_modules = None
    with pytest.raises(ValueError, match=r"does not name its layers.*model\.sharding=none"):
        layers_of(model)


def test_whole_weights_name_a_shared_tensor_once(make_model):
    """Without sharding the helpers pass everything through."""
    tied, apart = make_model(tie_word_embeddings=True), make_model()
    assert not is_sharded(tied)
    with whole_parameters(tied):
        names = [name for name, _ in whole_weights(tied)]
    assert names == [name for name in tied.state_dict() if name != "lm_head.weight"]
    assert "lm_head.weight" in dict(whole_weights(apart))
    assert all(not value.requires_grad for _, value in whole_weights(apart))
    assert math.isfinite(sum(float(value.sum()) for _, value in whole_weights(apart)))
