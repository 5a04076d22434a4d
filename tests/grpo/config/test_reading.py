"""Files, overrides and recipes: what is read, and how every mistake is told with its file or its override."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import yaml

from edge_grpo.config import (
    AdvantageConfig,
    RolloutConfig,
    TrainConfig,
    flatten,
    from_dict,
    load_config,
    recipe_names,
    recipe_path,
    to_dict,
)


def write(folder: Path, text: str) -> Path:
    path = folder / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def complaint(path: Path | None, *overrides: str) -> str:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - each caller looks at the whole message
        load_config(path, overrides)
    return str(caught.value)


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
        eda: {clip: 3}
        reward:
          weights: {format: 1, my.module:reward: 0.5}
        optim:
          learning_rate: 1e-6   # text to YAML 1.1, which wants 1.0e-6
        data:
          columns: {problem: question}
        rollout:
        """,
    )
    config = load_config(path, ["optim.learning_rate=3e-5", "eda.preserve_scale=true", "data.columns.answer=final"])
    assert (config.method, config.steps, config.loss.loss_type) == ("grpo", 7, "dr_grpo")
    assert config.eda == AdvantageConfig(clip=3.0, preserve_scale=True)
    assert isinstance(config.eda.clip, float)
    assert config.reward.weights == {"format": 1.0, "my.module:reward": 0.5}
    assert config.reward.functions == ["my.module:reward"]
    assert isinstance(config.reward.weights["format"], float)
    assert config.optim.learning_rate == 3e-5
    assert load_config(path).optim.learning_rate == 1e-6
    assert config.data.columns == {"problem": "question", "answer": "final"}
    assert config.rollout == RolloutConfig()  # a section with everything commented out


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("steps=12", 12),
        ("correction.truncated=false", False),
        ("method=grpo+reflection", "grpo+reflection"),
        ("output=2024", "2024"),  # text as it stands, although YAML would see a number
        ("output=a=b", "a=b"),
        ("eval.data=arithmetic:1,2@test", "arithmetic:1,2@test"),
        ("eval.data=null", None),
        ('eval.data="null"', "null"),  # quotes make text of it
        ('correction.reflection_text=" Wait\\n"', " Wait\n"),
        ("trackers=wandb", ("wandb",)),
        ("trackers=wandb, trackio", ("wandb", "trackio")),
        ("trackers=[wandb, trackio]", ("wandb", "trackio")),
        ("trackers=", ()),
        ("data.columns={problem: q}", {"problem": "q"}),
        ("reward.weights={format: 1}", {"format": 1.0}),
        (
            "reward.weights.my.module:reward=1e-1",
            {"accuracy": 1.0, "my.module:reward": 0.1},
        ),  # the default's others stay
        ("correction.mix.reflect=0", {"reflect": 0.0, "answer": 0.25, "solution": 0.25}),
        ("loss.delta=2", 2.0),
        ("loss.delta=null", None),
        ("eda.clip=inf", math.inf),
        ("eda.clip=.inf", math.inf),
        ("optim.learning_rate=1e-5", 1e-5),
    ],
)
def test_overrides_are_read_as_their_fields_type(override: str, expected: object) -> None:
    key = re.split(r"=|\.my\.|(?<=mix)\.", override)[0]
    value = flatten(to_dict(load_config(None, [override])))[key]
    value = tuple(value) if isinstance(value, list) else value
    assert value == expected
    assert type(value) is type(expected)


def test_an_override_outranks_the_file(tmp_path: Path) -> None:
    path = write(tmp_path, "steps: 3\ncorrection: {mix: {reflect: 1}}\n")
    config = load_config(path, ["steps=4", "correction.mix.answer=1"])
    assert config.steps == 4
    assert config.correction.mix == {"reflect": 1.0, "answer": 1.0}


def test_what_is_written_reads_back(tmp_path: Path) -> None:
    config = load_config(
        None,
        [
            "trackers=wandb",
            "eda.clip=inf",
            "optim.learning_rate=1e-6",
            "eval.data=arithmetic@test",
            "reward.weights.a.b:c=2",
            "correction.mix={solution: 2}",
            "correction.reflection_text=' No\n'",
        ],
    )
    assert from_dict(to_dict(config)) == config
    assert load_config(write(tmp_path, yaml.safe_dump(to_dict(config)))) == config


def test_an_empty_file_is_the_defaults(tmp_path: Path) -> None:
    assert load_config(write(tmp_path, "# nothing yet\n")) == TrainConfig()


# ---- What is refused


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("optm.learning_rate", "optim.learning_rate"),
        ("optim.lerning_rate", "optim.learning_rate"),
        ("optim.lr", "optim.learning_rate"),
        ("optim.wd", "optim.weight_decay"),
        ("learning_rate", "optim.learning_rate"),
        ("model_path", "model.path"),
        # Under the section or the name that a key might have had:
        ("data.eval", "eval.data"),
        ("data.eval_size", "eval.size"),
        ("eval_every", "eval.every"),
        ("eval_generations", "eval.generations"),
        ("loss.preserve_scale", "eda.preserve_scale"),
        ("reward.accuracy", "reward.weights.accuracy"),
        ("correction.reflect", "correction.mix.reflect"),
    ],
)
def test_an_unknown_key_is_told_the_nearest(key: str, nearest: str) -> None:
    assert complaint(None, f"{key}=1") == f"override {key}=1: unknown key {key}; did you mean {nearest}?"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("zzz=1", "unknown key zzz"),
        ("rollout.top_p=0.9", "unknown key rollout.top_p"),
        ("steps", "must read KEY=VALUE"),
        ("=3", "must read KEY=VALUE"),
        ("optim=3", "optim is a section; set one of its keys, for example optim.learning_rate=..."),
        ("steps=[1", "not readable as YAML: while parsing a flow sequence"),
        ("steps=0", "steps must be a whole number of at least 1; got 0"),
        ("data.columns={a: 1, a: 2}", "line 1: duplicate key 'a', first set on line 1"),
    ],
)
def test_a_mistake_on_the_command_line_names_the_override(tmp_path: Path, override: str, message: str) -> None:
    path = write(tmp_path, "seed: 3\n")
    for source in (None, path):
        assert complaint(source, "save_every=5", override).startswith(f"override {override}: {message}")


def test_a_value_given_twice_is_refused() -> None:
    assert complaint(None, "steps=4", "steps=5") == "override steps=5: steps is given twice; first by steps=4"
    whole, entry = "correction.mix={reflect: 1}", "correction.mix.answer=1"
    for first, second in ((whole, entry), (entry, whole), (entry, entry)):
        key = second.partition("=")[0]
        assert complaint(None, first, second) == f"override {second}: {key} is given twice; first by {first}"
    assert load_config(None, [entry, "correction.mix.reflect=1"]).correction.answer == 1 / 2.25


def test_everything_wrong_is_said_at_once_with_where_it_stands(tmp_path: Path) -> None:
    path = write(tmp_path, "steps: no\noptim: 3\nrollout: {temprature: 1, engine: '0.9'}\n1: 2\n")
    first, *lines = complaint(path, "loss.beta=x", "lr=1", "steps").splitlines()
    assert first == "8 problems"
    assert sorted(lines) == [
        f"  - {path}: optim is a section and must hold `key: value` lines; got 3",
        f"  - {path}: rollout.engine must be one of transformers, vllm, vllm-server; got '0.9'",
        f"  - {path}: steps must be a whole number; got False",
        f"  - {path}: unknown key 1",
        f"  - {path}: unknown key rollout.temprature; did you mean rollout.temperature?",
        "  - override loss.beta=x: loss.beta must be a number; got 'x'",
        "  - override lr=1: unknown key lr; did you mean optim.learning_rate?",
        "  - override steps: must read KEY=VALUE",
    ]


def test_what_all_problems_have_in_common_is_said_once(tmp_path: Path) -> None:
    path = write(tmp_path, "loss: {beta: -1, epsilon_low: -2, loss_type: dr_grpo}\nsteps: 0\noptim: {epochs: 0}\n")
    assert complaint(path, "seed=3").splitlines() == [
        f"{path}: 4 problems",
        "  - loss.epsilon_low must be a number of at least 0; got -2.0",
        "  - loss.beta must be a number of at least 0; got -1.0",
        "  - optim.epochs must be a whole number of at least 1; got 0",
        "  - steps must be a whole number of at least 1; got 0",
    ]


def test_evaluation_is_turned_off_by_its_data_alone(tmp_path: Path) -> None:
    path = write(tmp_path, "eval: {every: 5, data: arithmetic}")
    assert load_config(path, ["eval.data=null"]).eval.data is None


@pytest.mark.parametrize(
    ("text", "overrides", "source"),
    [
        ("rollout: {num_prompts: 8}", ["seed=1", "optim.minibatches=3"], "override optim.minibatches=3"),
        ("optim: {minibatches: 4}", ["rollout.num_prompts=6"], "override rollout.num_prompts=6"),
        ("optim: {minibatches: 3}", ["optim.epochs=2"], "{path}"),
        ("", ["optim.minibatches=3", "rollout.num_prompts=4"], "override optim.minibatches=3 rollout.num_prompts=4"),
        ("rollout: {vllm: {data_parallel_size: 2}}", ["rollout.engine=vllm"], "override rollout.engine=vllm"),
        ("rollout: {vllm: {port: 2}}", ["rollout.vllm.dtype=float32"], "{path}"),
        ("", ["rollout.vllm.port=2", "rollout.vllm.dtype=float32"], "override rollout.vllm.port=2"),
        ("correction: {mix: {reflect: 1}}", ["correction.mix.reflect=0"], "override correction.mix.reflect=0"),
    ],
)
def test_a_conflict_is_blamed_on_what_brought_it_about(
    tmp_path: Path, text: str, overrides: list[str], source: str
) -> None:
    path = write(tmp_path, text)
    assert complaint(path, *overrides).startswith(source.format(path=path) + ": ")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("steps: 1\nsteps: 2\n", "line 2: duplicate key 'steps', first set on line 1"),
        ("loss:\n  eda:\n    clip: 2\n    clip: 3\n", "line 4: duplicate key 'clip', first set on line 3"),
        ("- steps\n", "must hold `key: value` lines; got a list"),
        ("steps: [1\n", "expected ',' or ']'"),
        ("output: 2024-01-01\n", "output must be text"),
        ("output: 12\n", "output must be text; got 12; put it in quotes"),
        ("data: {columns: {problem: 3}}\n", "data.columns must be a mapping from text to text; got {'problem': 3}"),
        ("reward: {weights: 1}\n", "reward.weights must be a mapping from text to a number; got 1"),
        ("trackers: wandb\n", "trackers must be a list, each item text; got 'wandb'"),
        ("loss: {eda: {max_ratio: 2}}\n", "unknown key loss.eda; it is set in the section eda"),
    ],
)
def test_refused_files(tmp_path: Path, text: str, message: str) -> None:
    path = write(tmp_path, text)
    told = complaint(path)
    assert told.startswith(str(path))
    assert message in told


def test_a_mapping_names_no_source() -> None:
    with pytest.raises(ValueError, match=r"^steps must be a whole number of at least 1; got 0$"):
        from_dict({"steps": 0})


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no configuration file .*none\.yaml; recipes are: "):
        load_config(tmp_path / "none.yaml")


# ---- Recipes


def test_every_recipe_loads_and_starts_with_what_it_is() -> None:
    names = recipe_names()
    assert "tiny" in names
    for name in names:
        load_config(recipe_path(name))
        assert recipe_path(name).read_text(encoding="utf-8").startswith("# ")


@pytest.mark.parametrize("name", ["", "../recipes/tiny", "tinny", "zzzz"])
def test_an_unknown_recipe_is_refused_with_the_names(name: str) -> None:
    with pytest.raises(ValueError, match=r"no recipe named .*(did you mean|there are: )"):
        recipe_path(name)
