"""The keys: what each section refuses, what cannot go together, and the settings that follow from others."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path

import pytest

from edge_grpo.config import (
    AdvantageConfig,
    CorrectionConfig,
    DataConfig,
    EvalConfig,
    OptimConfig,
    RolloutConfig,
    TrainConfig,
    from_dict,
    load_config,
    to_dict,
)
from edge_kernels.config import EDAConfig, GRPOLossConfig

# ---- What is refused


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim=3", "optim is a section; set one of its keys, for example optim.learning_rate=..."),
        ("steps=1.5", "steps must be a whole number; got 1.5"),
        ("steps=true", "steps must be a whole number; got True"),
        ("steps=0", "steps must be a whole number of at least 1; got 0"),
        ("correction.truncated=1", "correction.truncated must be true or false; got 1"),
        ("correction.max_per_group=x", "correction.max_per_group must be a whole number or null; got 'x'"),
        ("optim.learning_rate=fast", "optim.learning_rate must be a number; got 'fast'"),
        ("optim.learning_rate=nan", "optim.learning_rate must be a number; got 'nan'"),
        ("optim.learning_rate=0", "optim.learning_rate must be a number in (0, 1e37]; got 0.0"),
        ("method=egde", "method must be one of edge, grpo, eda, gec, grpo+reflection; got 'egde'; did you mean edge?"),
        (
            "loss.loss_type=ppo",
            "loss.loss_type must be one of grpo, bnpo, dr_grpo, dapo, cispo, sapo, luspo, geo_mean, vespo",
        ),
        ("loss.beta=-1", "loss.beta must be a number of at least 0; got -1.0"),
        ("reward.kl_coef=-1", "reward.kl_coef must be a number >= 0; got -1.0"),
        ("reward.kl_penalty=k4", "reward.kl_penalty must be one of k1, k2, k3, abs; got 'k4'"),
        ("eda.scale_rewards=groups", "eda.scale_rewards must be true or false or one of group, batch, none; got"),
        ("loss.off_policy_mask_threshold=0", "loss.off_policy_mask_threshold must be a number greater than 0; got 0"),
        ("eda.clip=0.5", "eda.clip must be a number >= 1; got 0.5"),
        ("rollout.temperature=0", "rollout.temperature must be a number > 0; got 0.0; greedy responses"),
        ("rollout.num_generations=1", "rollout.num_generations must be a whole number of at least 2; got 1"),
        ("optim.minibatches=3", "rollout.num_prompts must be a multiple of optim.minibatches"),
        ("reward.weights.accuracy=1e300", "must be a number in [-1e30, 1e30]; got 1e+300"),
        (
            "optim.weight_decay=1e7",
            "weight_decay x learning_rate is the share of every weight that a step removes, and",
        ),
        ("eval.generations=0", "eval.generations must be a whole number of at least 1; got 0"),
        ("reward.weights.accuracy=0", "reward.weights must not all be 0: there would be nothing to learn"),
        ("reward.weights.acuracy=1", "reward.weights takes accuracy, format, and functions as package.module:function"),
        ("reward.weights.format=x", "reward.weights must be a mapping from text to a number; got {'accuracy': 1.0"),
        ("correction.mix={answer: 0}", "correction.mix must not be all 0; got {'answer': 0.0}"),
        (
            "correction.mix.reflct=1",
            "correction.mix takes reflect, answer, solution, hint; got 'reflct'; did you mean reflec",
        ),
        (
            "data.columns.anser=x",
            "data.columns maps problem, answer, solution to the dataset's columns; got the key 'a",
        ),
        ("output= ", "output must be the path of a folder"),
    ],
)
def test_refused(override: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        load_config(None, [override])


@pytest.mark.parametrize(
    ("key", "source"),
    [
        ("temperature", "it is taken from rollout.temperature"),
        ("softcap", "it is taken from the model"),
        ("max_completion_length", "it is taken from rollout.max_completion_length"),
        ("sampler_ratio_floor", "it is always 0"),
        ("eda.max_ratio", "it is set in the section eda"),
    ],
)
def test_what_the_trainer_gives_the_loss_is_no_key(key: str, source: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f"unknown key loss.{key}; {source}")):
        load_config(None, [f"loss.{key}=3"])
    assert not [name for name in to_dict(TrainConfig())["loss"] if name in key]


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (GRPOLossConfig(temperature=0.7), "loss.temperature must be left at 1.0; got 0.7; it is taken from rollout."),
        (GRPOLossConfig(softcap=30.0), "loss.softcap must be left at None; got 30.0; it is taken from the model"),
        (GRPOLossConfig(sampler_ratio_cap=2.0, sampler_ratio_floor=0.5), "loss.sampler_ratio_floor must be left at 0"),
        (GRPOLossConfig(eda=EDAConfig(max_ratio=3.0)), "it is set in the section eda"),
        (GRPOLossConfig(max_completion_length=9), "loss.max_completion_length must be left at None; got 9"),
    ],
)
def test_nor_can_it_be_set_in_python(loss: GRPOLossConfig, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        TrainConfig(loss=loss)


def test_an_entropy_bonus_on_a_quantile_is_refused() -> None:
    with pytest.raises(ValueError, match=r"loss\.entropy_coef and loss\.top_entropy_quantile cannot be combined"):
        load_config(None, ["loss.entropy_coef=0.01", "loss.top_entropy_quantile=0.2"])


def test_a_configuration_built_in_python_is_checked_too() -> None:
    with pytest.raises(ValueError, match=r"steps must be a whole number; got '5'\ndata\.train must be text; got 3"):
        TrainConfig(steps="5", data=DataConfig(train=3))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="warmup_steps must be a whole number of at least 0; got -1"):
        OptimConfig(warmup_steps=-1)


# ---- What follows from other settings


@pytest.mark.parametrize(
    ("method", "eda", "gec"),
    [
        ("edge", True, True),
        ("grpo", False, False),
        ("eda", True, False),
        ("gec", False, True),
        ("grpo+reflection", False, True),
    ],
)
def test_the_method_and_its_ablations(method: str, eda: bool, gec: bool) -> None:
    config = load_config(None, [f"method={method}"])
    assert (config.use_eda, config.use_gec) == (eda, gec)


def test_reflection_alone_keeps_the_rest_of_the_correction() -> None:
    correction = CorrectionConfig(max_length=7, mix={"reflect": 0.2, "answer": 0.4, "solution": 0.4})
    config = TrainConfig(method="grpo+reflection", correction=correction)
    assert config.correction_config == replace(correction, mix={"reflect": 1.0})
    assert TrainConfig(correction=correction).correction_config == correction


def test_the_mix_of_corrections_is_normalised() -> None:
    correction = load_config(None, ["correction.mix={reflect: 3, solution: 1}"]).correction
    assert (correction.reflect, correction.answer, correction.solution) == (0.75, 0.0, 0.25)
    published = CorrectionConfig()
    assert (published.reflect, published.answer, published.solution) == (0.5, 0.25, 0.25)


@pytest.mark.parametrize(
    ("clip", "low", "high"), [("10", 0.1, 10.0), ("4", 0.25, 4.0), ("1", 1.0, 1.0), (".inf", 0, math.inf)]
)
def test_one_clip_bounds_the_relative_entropy_on_both_sides(clip: str, low: float, high: float) -> None:
    loss = load_config(None, [f"eda.clip={clip}"]).loss_config
    assert (loss.eda.min_ratio, loss.eda.max_ratio) == (low, high)


def test_the_kernels_get_the_whole_loss() -> None:
    assert TrainConfig().loss_config == GRPOLossConfig()
    config = TrainConfig(
        rollout=RolloutConfig(temperature=0.6),
        loss=GRPOLossConfig(beta=0.1, injected="mask"),
        eda=AdvantageConfig(preserve_scale=True, mean_over="batch", scale_rewards=False),
    )
    eda = EDAConfig(preserve_scale=True, mean_over="batch", scale_rewards=False)
    assert config.loss_config == GRPOLossConfig(beta=0.1, injected="mask", temperature=0.6, eda=eda)


def test_dr_grpo_divides_by_the_generation_limit() -> None:
    config = load_config(None, ["loss.loss_type=dr_grpo", "rollout.max_completion_length=64"])
    assert config.loss_config.max_completion_length == 64
    assert from_dict(to_dict(config)) == config
    in_python = TrainConfig(loss=GRPOLossConfig(loss_type="dr_grpo", max_completion_length=1), rollout=config.rollout)
    assert in_python == config
    longer = replace(config, rollout=replace(config.rollout, max_completion_length=96))
    assert longer.loss_config.max_completion_length == 96


@pytest.mark.parametrize(("generations", "temperature"), [(1, 0.0), (4, 0.7)])
def test_one_response_is_evaluated_greedily_and_several_as_sampled(generations: int, temperature: float) -> None:
    config = TrainConfig(eval=EvalConfig(generations=generations), rollout=RolloutConfig(temperature=0.7))
    assert config.eval_temperature == temperature


# ---- vLLM


def test_vllms_own_arguments_are_read_as_yaml() -> None:
    config = load_config(None, ["rollout.vllm.dtype=bfloat16", "rollout.vllm.gpu_memory_utilization=0.3"])
    assert config.rollout.vllm == {"dtype": "bfloat16", "gpu_memory_utilization": 0.3}
    assert load_config(None, ["rollout.vllm.enforce_eager=true"]).rollout.vllm == {"enforce_eager": True}
    for engine in ("vllm", "vllm-server"):
        shared = load_config(None, [f"rollout.engine={engine}", "rollout.vllm.tensor_parallel_size=2"])
        assert shared.rollout.vllm == {"tensor_parallel_size": 2}
        assert shared.rollout.tensor_parallel_size == 2
    assert load_config().rollout.tensor_parallel_size == 1


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["rollout.vllm.max_model_len=99"], "rollout.vllm must not set max_model_len, which follows from"),
        (["rollout.vllm.port=99"], "rollout.vllm must not set port, which is part of rollout.server"),
        (["rollout.server=http://a:8000"], "rollout.server must read HOST:PORT; got 'http://a:8000'"),
        (["rollout.server=localhost"], "rollout.server must read HOST:PORT"),
        (["rollout.server=localhost:65536"], "rollout.server must read HOST:PORT"),
        (["rollout.server=a:1,b"], "rollout.server must read HOST:PORT; got 'b'"),
        (["rollout.server=a:1,"], "rollout.server must read HOST:PORT; got ''"),
        (["rollout.server=a:1,b:2,a:1"], "rollout.server must name each address once; got a:1 2 times"),
        (["rollout.ahead=2"], "rollout.ahead must be 0 or 1; got 2"),
        (["rollout.ahead=1"], "rollout.ahead = 1 needs an engine that samples while the policy learns; got engine ="),
        (["rollout.ahead=1", "rollout.engine=vllm"], "got engine = vllm; set engine to vllm-server, or ahead to 0"),
        (["rollout.timeout=.inf"], "rollout.timeout must be a number in (0, 1e6]; got inf"),
        (["rollout.vllm.max-model-len=99"], "rollout.vllm takes its arguments with underscores"),
        (
            ["rollout.engine=vllm", "rollout.vllm.pipeline_parallel_size=2"],
            "rollout.vllm.pipeline_parallel_size = 2 and rollout.engine vllm cannot be combined",
        ),
        (
            ["rollout.vllm.tensor_parallel_size=0"],
            "rollout.vllm is wrong: tensor_parallel_size must be a whole number of at least 1; got 0",
        ),
        (
            ["rollout.engine=vllm", "rollout.vllm.distributed_executor_backend=mp"],
            "rollout.vllm.distributed_executor_backend must not be set with rollout.engine vllm",
        ),
        (["rollout.timeout=0"], "rollout.timeout must be a number in (0, 1e6]; got 0.0"),
    ],
)
def test_what_vllm_cannot_do_is_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        load_config(None, overrides)


def test_servers_are_one_or_several(tmp_path: Path) -> None:
    assert load_config().rollout.servers == ("127.0.0.1:8000",)
    for listed in ("a:1,b:2", "a:1, b:2", "[a:1, b:2]"):
        (tmp_path / "run.yaml").write_text(f"rollout: {{server: {listed if listed[0] == '[' else repr(listed)}}}")
        config = load_config(tmp_path / "run.yaml")
        assert config.rollout.servers == ("a:1", "b:2")
        assert from_dict(to_dict(config)) == config
    assert load_config(None, ["rollout.server=a:1,b:2"]).rollout.servers == ("a:1", "b:2")
    with pytest.raises(ValueError, match=r"rollout\.server must name at least one HOST:PORT; got an empty list"):
        from_dict({"rollout": {"server": []}})


@pytest.mark.parametrize(
    ("overrides", "cap"),
    [
        ([], None),
        (["loss.sampler_ratio_cap=3"], 3.0),
        (["rollout.engine=vllm"], 2.0),
        (["rollout.engine=vllm-server"], 2.0),
        (["rollout.engine=vllm", "loss.sampler_ratio_cap=3"], 3.0),
    ],
)
def test_the_samplers_ratio_is_bounded_where_vllm_samples(overrides: list[str], cap: float | None) -> None:
    assert load_config(None, overrides).loss_config.sampler_ratio_cap == cap
