"""Configuration: what is read, what is refused and in which words, and that help and values cannot drift apart."""

from __future__ import annotations

import dataclasses
import math
import re
from pathlib import Path

import pytest
import yaml

from edge_grpo.config import (
    CorrectionConfig,
    DataConfig,
    OptimConfig,
    RolloutConfig,
    TrainConfig,
    describe,
    flatten,
    from_dict,
    load_config,
    recipe_names,
    recipe_path,
    to_dict,
)
from edge_grpo.config import keys as config_module
from edge_kernels.config import EDAConfig, GRPOLossConfig


def write(folder: Path, text: str) -> Path:
    path = folder / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return path


# ---- What is read


def test_no_file_gives_the_defaults() -> None:
    assert load_config() == TrainConfig()


def test_a_file_and_overrides(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        """
        method: grpo
        steps: 7
        loss:
          loss_type: dr_grpo
          max_completion_length: 64
          eda: {max_ratio: 3}
        optim:
          learning_rate: 1e-6   # text to YAML 1.1, which wants 1.0e-6
        data:
          columns: {problem: question}
        rollout:
        """,
    )
    config = load_config(path, ["optim.learning_rate=3e-5", "loss.eda.min_ratio=0", "data.columns.answer=final"])
    assert (config.method, config.steps, config.loss.loss_type) == ("grpo", 7, "dr_grpo")
    assert config.loss.eda == EDAConfig(min_ratio=0.0, max_ratio=3.0)
    assert isinstance(config.loss.eda.max_ratio, float)
    assert config.optim.learning_rate == 3e-5
    assert load_config(path).optim.learning_rate == 1e-6
    assert config.data.columns == {"problem": "question", "answer": "final"}
    assert config.rollout == RolloutConfig()  # a section with everything commented out


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("steps=12", 12),
        ("eda=false", False),
        ("eda=null", None),
        ("method=grpo+reflection", "grpo+reflection"),
        ("output=2024", "2024"),  # text as it stands, although YAML would see a number
        ("output=a=b", "a=b"),
        ("data.eval=arithmetic:1,2@test", "arithmetic:1,2@test"),
        ("data.eval=null", None),
        ('data.eval="null"', "null"),  # quotes make text of it
        ('correction.reflection_text=" Wait\\n"', " Wait\n"),
        ("trackers=wandb", ("wandb",)),
        ("trackers=wandb, trackio", ("wandb", "trackio")),
        ("trackers=[wandb, trackio]", ("wandb", "trackio")),
        ("trackers=", ()),
        ("data.columns={problem: q}", {"problem": "q"}),
        ("reward.functions.my.module:reward=0.5", {"my.module:reward": 0.5}),
        ("loss.delta=2", 2.0),
        ("loss.delta=null", None),
        ("loss.eda.max_ratio=inf", math.inf),
        ("loss.eda.max_ratio=.inf", math.inf),
        ("optim.learning_rate=1e-5", 1e-5),
    ],
)
def test_overrides_are_read_as_their_fields_type(override: str, expected: object) -> None:
    key = override.partition("=")[0].partition(".my.")[0]
    value = flatten(to_dict(load_config(None, [override])))[key]
    value = tuple(value) if isinstance(value, list) else value
    assert value == expected
    assert type(value) is type(expected)


def test_an_override_outranks_the_file_and_the_last_one_counts(tmp_path: Path) -> None:
    assert load_config(write(tmp_path, "steps: 3"), ["steps=4", "steps=5"]).steps == 5


def test_what_is_written_reads_back(tmp_path: Path) -> None:
    config = load_config(
        None,
        [
            "trackers=wandb",
            "loss.eda.max_ratio=inf",
            "optim.learning_rate=1e-6",
            "data.eval=arithmetic@test",
            "reward.functions.a.b:c=2",
            "correction.reflection_text=' No\n'",
        ],
    )
    assert from_dict(to_dict(config)) == config
    assert load_config(write(tmp_path, yaml.safe_dump(to_dict(config)))) == config


# ---- What is refused


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optm.learning_rate=1", "unknown key optm.learning_rate; did you mean optim.learning_rate?"),
        ("optim.lerning_rate=1", "unknown key optim.lerning_rate; did you mean optim.learning_rate?"),
        ("learning_rate=1", "unknown key learning_rate; did you mean optim.learning_rate?"),
        ("loss.max_ratio=2", "unknown key loss.max_ratio; did you mean loss.eda.max_ratio?"),
        ("zzz=1", "unknown key zzz"),
        ("steps", "an override must read KEY=VALUE; got 'steps'"),
        ("optim=3", "optim is a section; set one of its keys, for example optim.learning_rate=..."),
        ("steps=1.5", "steps must be a whole number; got 1.5"),
        ("steps=true", "steps must be a whole number; got True"),
        ("steps=0", "steps must be a whole number of at least 1; got 0"),
        ("steps=[1", "steps=[1 is not readable as YAML"),
        ("eda=1", "eda must be true or false or null; got 1"),
        ("optim.learning_rate=fast", "optim.learning_rate must be a number; got 'fast'"),
        ("optim.learning_rate=nan", "optim.learning_rate must be a number; got 'nan'"),
        ("optim.learning_rate=0", "optim.learning_rate must be a number > 0; got 0.0"),
        ("method=egde", "method must be one of edge, grpo, grpo+reflection; got 'egde'; did you mean edge?"),
        ("loss.loss_type=ppo", "loss.loss_type must be one of grpo, bnpo, dr_grpo, dapo, cispo; got 'ppo'"),
        ("loss.beta=-1", "loss.beta must be a number of at least 0; got -1.0"),
        ("loss.eda.min_ratio=20", "loss.eda.min_ratio must not exceed max_ratio; got 20.0 > 10.0"),
        ("loss.loss_type=dr_grpo", "loss: loss_type='dr_grpo' divides by max_completion_length"),
        ("rollout.temperature=0", "rollout.temperature must be a number > 0; got 0.0; greedy responses"),
        ("rollout.top_p=1.2", "rollout.top_p must be a number in (0, 1]; got 1.2"),
        ("rollout.num_generations=1", "rollout.num_generations must be a whole number of at least 2; got 1"),
        ("optim.minibatches=3", "rollout.num_prompts must be a multiple of optim.minibatches"),
        ("eval_every=5", "eval_every = 5 needs held-out data; set data.eval, or eval_every to 0"),
        ("eval_generations=4", "eval_generations = 4 at eval_temperature 0 would repeat one greedy response"),
        ("loss.temperature=0.7", "loss.temperature must be left at 1.0; got 0.7; it is taken from rollout.temperature"),
        ("loss.softcap=30", "loss.softcap must be left at None; got 30.0; it is taken from the model"),
        ("output= ", "output must be the path of a folder"),
    ],
)
def test_refused(override: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        load_config(None, [override])


def test_an_entropy_bonus_on_a_quantile_is_refused() -> None:
    with pytest.raises(ValueError, match=r"loss\.entropy_coef and loss\.top_entropy_quantile cannot be combined"):
        load_config(None, ["loss.entropy_coef=0.01", "loss.top_entropy_quantile=0.2"])


def test_everything_wrong_is_said_at_once_with_its_file(tmp_path: Path) -> None:
    path = write(tmp_path, "steps: no\noptim: 3\nrollout: {temprature: 1, top_p: '0.9'}\n1: 2\n")
    with pytest.raises(ValueError, match="5 problems") as caught:
        load_config(path, ["loss.beta=x"])
    lines = str(caught.value).splitlines()
    assert lines[0] == f"{path}: 5 problems"
    assert sorted(lines[1:]) == [
        "  - loss.beta must be a number; got 'x'",
        "  - optim is a section and must hold `key: value` lines; got 3",
        "  - steps must be a whole number; got False",
        "  - unknown key 1",
        "  - unknown key rollout.temprature; did you mean rollout.temperature?",
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("steps: 1\nsteps: 2\n", "line 2: the key 'steps' stands already in line 1"),
        ("loss:\n  eda:\n    max_ratio: 2\n    max_ratio: 3\n", "line 4: the key 'max_ratio' stands already in line 3"),
        ("- steps\n", "must hold `key: value` lines; got a list"),
        ("steps: [1\n", "expected ',' or ']'"),
        ("output: 2024-01-01\n", "output must be text"),
        ("output: 12\n", "output must be text; got 12; put it in quotes"),
        ("data: {columns: {problem: 3}}\n", "data.columns must be a mapping from text to text; got {'problem': 3}"),
        ("trackers: wandb\n", "trackers must be a list, each item text; got 'wandb'"),
    ],
)
def test_refused_files(tmp_path: Path, text: str, message: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        load_config(path)
    assert str(caught.value).startswith(str(path))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no configuration file .*none\.yaml; recipes by name are: "):
        load_config(tmp_path / "none.yaml")


def test_an_empty_file_is_the_defaults(tmp_path: Path) -> None:
    assert load_config(write(tmp_path, "# nothing yet\n")) == TrainConfig()


def test_a_configuration_built_in_python_is_checked_too() -> None:
    with pytest.raises(ValueError, match=r"steps must be a whole number; got '5'\ndata\.train must be text; got 3"):
        TrainConfig(steps="5", data=DataConfig(train=3))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="warmup_steps must be a whole number of at least 0; got -1"):
        OptimConfig(warmup_steps=-1)


# ---- Derived settings


@pytest.mark.parametrize(
    ("overrides", "eda", "gec"),
    [
        (["method=edge"], True, True),
        (["method=grpo"], False, False),
        (["method=grpo+reflection"], False, True),
        (["method=edge", "eda=false"], False, True),
        (["method=edge", "gec=false"], True, False),
        (["method=grpo", "eda=true"], True, False),
    ],
)
def test_the_method_and_its_ablations(overrides: list[str], eda: bool, gec: bool) -> None:
    config = load_config(None, overrides)
    assert (config.use_eda, config.use_gec) == (eda, gec)


def test_reflection_alone_keeps_the_rest_of_the_correction() -> None:
    correction = CorrectionConfig(max_length=7, reflect=0.2, answer=0.4, solution=0.4)
    config = TrainConfig(method="grpo+reflection", correction=correction)
    assert config.correction_config == dataclasses.replace(correction, reflect=1.0, answer=0.0, solution=0.0)
    assert TrainConfig(correction=correction).correction_config == correction


# ---- Recipes and help


def test_every_recipe_loads_and_starts_with_what_it_is() -> None:
    names = recipe_names()
    assert "tiny" in names
    for name in names:
        load_config(recipe_path(name))
        assert recipe_path(name).read_text(encoding="utf-8").startswith("# ")


@pytest.mark.parametrize("name", ["", "../recipes/tiny", "tinny", "zzzz"])
def test_an_unknown_recipe_is_refused_with_the_names(name: str) -> None:
    with pytest.raises(ValueError, match=r"no recipe of the name .*(did you mean|there are: )"):
        recipe_path(name)


def test_every_key_has_help_and_a_default_that_loads() -> None:
    entries = list(describe())
    assert len({entry.key for entry in entries}) == len(entries)
    assert [entry.key for entry in entries if len(entry.help) < 7] == []
    described = {entry.key: entry.default for entry in entries}
    hidden = {"loss.temperature", "loss.softcap", "loss.logit_scale"}  # the trainer sets them
    leaves = flatten(to_dict(TrainConfig()))
    assert set(leaves) == described.keys() | hidden
    assert {key: list(v) if isinstance(v, tuple) else v for key, v in described.items()} == {
        key: value for key, value in leaves.items() if key not in hidden
    }


def test_help_stands_once_beside_its_field() -> None:
    by_key = {entry.key: entry for entry in describe()}
    assert by_key["rollout.num_generations"].help == "responses per prompt: the group size G"
    assert by_key["rollout.engine"].type == "transformers|vllm|vllm-server"
    assert by_key["loss.delta"].type == "float|null"
    assert by_key["trackers"].type == "list[str]"
    # edge_kernels documents its fields in docstrings: one paragraph may speak for several.
    assert by_key["loss.epsilon_low"].help == by_key["loss.epsilon_high"].help
    assert by_key["loss.eda.min_ratio"].help == by_key["loss.eda.max_ratio"].help
    assert by_key["loss.sft_weight"].help == "see injected, which uses it"
    for cls in (GRPOLossConfig, EDAConfig):
        fields = {field.name for field in dataclasses.fields(cls)} - {"eda"}
        assert fields <= set(config_module._notes(cls))


# ---- vLLM


def test_vllms_own_arguments_are_read_as_yaml() -> None:
    config = load_config(None, ["rollout.vllm.dtype=bfloat16", "rollout.vllm.gpu_memory_utilization=0.3"])
    assert config.rollout.vllm == {"dtype": "bfloat16", "gpu_memory_utilization": 0.3}
    assert load_config(None, ["rollout.vllm.enforce_eager=true"]).rollout.vllm == {"enforce_eager": True}
    elsewhere = load_config(None, ["rollout.engine=vllm-server", "rollout.vllm.tensor_parallel_size=2"])
    assert elsewhere.rollout.vllm == {"tensor_parallel_size": 2}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["rollout.vllm.max_model_len=99"], "rollout.vllm must not set max_model_len, which is made of"),
        (["rollout.vllm.port=99"], "rollout.vllm must not set port, which is part of rollout.server"),
        (["rollout.server=http://a:8000"], "rollout.server must read HOST:PORT; got 'http://a:8000'"),
        (["rollout.server=localhost"], "rollout.server must read HOST:PORT"),
        (["rollout.server=localhost:65536"], "rollout.server must read HOST:PORT"),
        (["rollout.timeout=.inf"], "rollout.timeout must be a number in (0, 1e6]; got inf"),
        (["rollout.vllm.max-model-len=99"], "rollout.vllm takes its arguments with underscores"),
        (
            ["rollout.engine=vllm", "rollout.vllm.tensor_parallel_size=2"],
            "rollout.vllm.tensor_parallel_size = 2 takes processes that the weights do not reach",
        ),
        (["rollout.timeout=0"], "rollout.timeout must be a number in (0, 1e6]; got 0.0"),
        (
            ["rollout.engine=vllm", "rollout.top_p=0.9", "loss.sampler_ratio_cap=3"],
            "loss.sampler_ratio_cap = 3.0 needs the sampler's logprobs; vLLM reports those that top_p changed",
        ),
    ],
)
def test_what_vllm_cannot_do_is_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        load_config(None, overrides)


@pytest.mark.parametrize(
    ("overrides", "cap"),
    [
        ([], None),
        (["loss.sampler_ratio_cap=3"], 3.0),
        (["rollout.engine=vllm"], 2.0),
        (["rollout.engine=vllm-server"], 2.0),
        (["rollout.engine=vllm", "loss.sampler_ratio_cap=3"], 3.0),
        (["rollout.engine=vllm", "rollout.top_p=0.9"], None),
    ],
)
def test_the_samplers_ratio_is_bounded_where_vllm_samples(overrides: list[str], cap: float | None) -> None:
    assert load_config(None, overrides).sampler_ratio_cap == cap
