"""The recipes for 1, 8 and 64 GPUs: what the cost model chooses, and each run on CPU processes with a small model.

Of a recipe stay the method, the kind of model, precision, sharding, checkpointing, engine and every way of the step.
Fewer are processes, servers, prompts and tokens; the weights go to the servers through a folder, since NCCL needs GPUs.
The engine in process is that of transformers, scored in full as vLLM's responses are; vLLM's has a test of its own. The
learning rate is high, so that weights of a step before are told apart from the step's own.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from fake_servers import ModelServer, running
from forked import run_program
from training import records, untied_model
from transformers import Qwen2ForCausalLM

from benchmarks.scaling import tables
from benchmarks.scaling.layouts import FSDP, Setup
from benchmarks.scaling.step import step_of
from benchmarks.scaling.transformer import MODELS
from edge_grpo.config import TrainConfig, load_config, recipe_path, to_dict
from edge_grpo.policy.loading import eos_token_ids, load_tokenizer

# By recipe: GPUs, of these the trainer's, and the CPU processes that stand for them.
RECIPES = {
    "qwen2.5-math-1.5b-1gpu": (1, 1, 1),
    "qwen2.5-math-7b-8gpus": (8, 4, 2),
    "qwen2.5-32b-64gpus": (64, 64, 4),
}
LEARNING_RATE = 1e-2
PROBLEMS = [
    {"problem": f"{n} + {n} = ?", "answer": str(2 * n), "solution": f"\\boxed{{{2 * n}}}"} for n in range(2, 10)
]


def config_of(name: str) -> TrainConfig:
    return load_config(recipe_path(name))


# --- as the cost model has it -----------------------------------------------------------------------------------------


def setup_of(name: str) -> Setup:
    """The recipe's settings in the cost model's choice for its model and number of GPUs."""
    gpus, config = RECIPES[name][0], config_of(name)
    (model,) = (model for model in MODELS if config.model.path.endswith(model.name))
    chosen = next(step for other, number, step in tables.chosen() if (other, number) == (model, gpus))
    assert chosen is not None
    job = replace(
        chosen.setup.job,
        num_prompts=config.rollout.num_prompts,
        num_generations=config.rollout.num_generations,
        max_completion_length=config.rollout.max_completion_length,
        correction_max_length=config.correction.max_length,
        micro_batch_size=config.optim.micro_batch_size,
        gradient_checkpointing=config.model.gradient_checkpointing,
        reduce_each_micro_batch=config.optim.reduce_each_micro_batch,
    )
    return replace(chosen.setup, job=job)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_what_the_cost_model_chooses(name):
    setup, config, (gpus, trainers, _) = setup_of(name), config_of(name), RECIPES[name]
    rollout, sampling = config.rollout, setup.sampling
    assert (setup.gpus, setup.trainers) == (gpus, trainers)
    assert (config.model.sharding == "fsdp2") == (setup.layout is FSDP)
    assert config.model.precision == "mixed"
    assert (rollout.engine == "vllm-server") == bool(setup.servers)
    assert rollout.vllm.get("tensor_parallel_size", 1) == sampling.tensor_parallel
    assert rollout.ahead == sampling.ahead
    if setup.servers:
        assert len(rollout.servers) * sampling.tensor_parallel == setup.servers
    assert rollout.batch_size * (len(rollout.servers) if setup.servers else trainers) >= setup.job.responses
    assert rollout.num_prompts == tables.PROMPTS_OF_GPU * gpus
    assert rollout.num_prompts % trainers == 0
    step = step_of(setup)
    assert step is not None  # it fits


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_says_how_many_processes_it_needs(name):
    """In the command that it shows, where there are several."""
    text, trainers = recipe_path(name).read_text(encoding="utf-8"), RECIPES[name][1]
    assert (f"--num_processes {trainers} " in text) == (trainers > 1)
    assert f"--recipe {name}" in text


# --- on CPU processes -------------------------------------------------------------------------------------------------


def shrunk(config: TrainConfig, processes: int, model: Path, folder: Path, *, vllm: bool) -> TrainConfig:
    """Two steps of short responses, two prompts for each process; in process vLLM samples, or transformers."""
    folder.mkdir()
    (folder / "data.json").write_text(json.dumps(PROBLEMS))
    rollout = replace(config.rollout, num_prompts=2 * processes, num_generations=4, max_completion_length=8)
    shared = {"tensor_parallel_size": min(2, rollout.tensor_parallel_size)}  # the model has two heads
    rollout = replace(rollout, vllm=shared, temperature=1.0, timeout=60.0)
    loss = config.loss
    if config.rollout.engine == "vllm" and not vllm:
        rollout = replace(rollout, engine="transformers", vllm={})
        loss = replace(loss, sampler_ratio_cap=config.sampler_ratio_cap)
    return replace(
        config,
        steps=2,
        output=str(folder / "run"),
        save_every=2,
        model=replace(config.model, path=str(model)),
        data=replace(config.data, train=str(folder / "data.json")),
        rollout=rollout,
        correction=replace(config.correction, max_length=48),
        optim=replace(config.optim, learning_rate=LEARNING_RATE),
        loss=loss,
    )


@contextlib.contextmanager
def served(config: TrainConfig, folder: Path) -> Iterator[tuple[TrainConfig, list[ModelServer]]]:
    """Two servers in the place of the recipe's four, one for its one, none for none."""
    if config.rollout.engine != "vllm-server":
        yield config, []
        return
    model = Qwen2ForCausalLM.from_pretrained(config.model.path)
    tokenizer = load_tokenizer(config.model)
    with contextlib.ExitStack() as stack:
        number = min(2, len(config.rollout.servers))
        servers = [ModelServer(model, eos_token_ids(model, tokenizer), tokenizer.pad_token_id) for _ in range(number)]
        for server in servers:
            stack.enter_context(running(server))
        addresses = tuple(server.address for server in servers)
        rollout = replace(config.rollout, server=addresses, server_folder=str(folder / "weights"))
        yield replace(config, rollout=rollout), servers


Run = tuple[TrainConfig, list[ModelServer]]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    return run_all(RECIPES, tmp_path_factory.mktemp("recipes"))


def run_all(names: Iterable[str], folder: Path, *, vllm: bool = False) -> dict[str, Run]:
    """Run recipes, one after the other, by one program: importing takes longer than a run."""
    model, found, arguments = untied_model(folder / "model"), {}, []
    with contextlib.ExitStack() as stack:
        for name in names:
            processes = RECIPES[name][2]
            config = shrunk(config_of(name), processes, model, folder / name, vllm=vllm)
            found[name] = config, _ = stack.enter_context(served(config, folder / name))
            file = folder / f"{name}.yaml"
            file.write_text(yaml.safe_dump(to_dict(config)))
            arguments += [str(processes), str(file)]
        run_program("train_on_processes.py", *arguments)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_runs_with_a_small_model_on_cpu_processes(name: str, runs: dict[str, Run]) -> None:
    check_run(*runs[name], processes=RECIPES[name][2])


@pytest.mark.slow
@pytest.mark.vllm
@pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None, reason="vLLM is not installed; `make vllm` installs it for the CPU"
)
def test_the_recipe_for_one_gpu_runs_with_vllm(tmp_path: Path) -> None:
    """Another with engines in process takes long on few cores: call ``run_all`` with its name by hand."""
    name = next(iter(RECIPES))
    config, _ = run_all([name], tmp_path, vllm=True)[name]
    assert config.rollout.engine == "vllm"
    check_run(config, [], processes=RECIPES[name][2])


def check_run(config: TrainConfig, servers: list[ModelServer], *, processes: int) -> None:
    output = Path(config.output)
    steps = records(output)
    assert [step["step"] for step in steps] == [1, 2]
    for step in steps:
        assert step["correction/reflect"] + step["correction/answer"] + step["correction/solution"] > 0
        if not config.rollout.ahead or step["step"] == 1:
            assert step["ratio/sampler_max"] == pytest.approx(1, abs=0.05)  # bfloat16 against float32
        else:
            assert step["ratio/sampler_max"] > 1.1  # the weights of the step before have sampled
        assert step["optim/skipped"] == 0
    assert any(step["grad/norm"] > 0 for step in steps)
    for server in servers:
        assert sum(event[0] == "version" for event in server.events) == 1 + config.steps  # at first, after each step
        assert any(event[0] == "begin" for event in server.events)
        trained = Qwen2ForCausalLM.from_pretrained(output / "final").state_dict()
        for key, value in server.model.state_dict().items():  # which were sent as bfloat16
            torch.testing.assert_close(value.float(), trained[key].float(), rtol=0.01, atol=LEARNING_RATE / 100)
    if config.rollout.ahead:
        assert [step["rollout/staleness"] for step in steps] == [0, 1]
    shards = sorted(path.name for path in (output / "checkpoints" / "step-000002").glob("shard-*"))
    assert len(shards) == (processes if config.model.sharding == "fsdp2" else 0)
    assert (output / "final" / "config.json").exists()
