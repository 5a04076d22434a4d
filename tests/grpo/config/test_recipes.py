"""The shipped recipes: each loads, and the path of the large ones runs on a tiny random model."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace

import pytest
from paths import SHARED_DATA
from transformers import PreTrainedTokenizerFast

from edge_grpo.collect import carry_out
from edge_grpo.config import flatten, load_config, preset_names, recipe_names, recipe_path, to_dict
from edge_grpo.correction import Corrector
from edge_grpo.data.prompts import render_prompts
from edge_grpo.data.sources import load_examples
from edge_grpo.grading.rewards import Rewarder
from edge_grpo.policy.loading import eos_token_ids
from edge_grpo.rollout import build_engine
from edge_grpo.types import Provenance, Sampling

DEEPSCALER = SHARED_DATA / "deepscaler_hard-1k.json"
GROUP = 8
# Three rows of the same form: JSON list, answers as text, LaTeX with backslashes and braces.
ROWS = [
    {
        "problem": "What is $\\frac{1}{2}+\\frac{1}{3}$?",
        "answer": "\\frac{5}{6}",
        "solution": "$\\boxed{\\frac{5}{6}}$",
    },
    {"problem": "Compute $2^{10}$.", "answer": "1024", "solution": "It is $2^{10}=1024$."},
    {"problem": "Solve $x+1=3$.", "answer": "2", "solution": "Subtract $1$: $x=\\boxed{2}$."},
]


@pytest.fixture(scope="module")
def qwen_tokenizer(tiny_tokenizer) -> PreTrainedTokenizerFast:
    """The tiny tokenizer with Qwen's special tokens and chat template, base model fashion: eos is <|endoftext|>."""
    names = {"<|pad|>": "<|endoftext|>", "<|end|>": "<|im_end|>", "<|system|>": "<|im_start|>"}
    description = tiny_tokenizer.backend_tokenizer.to_str()
    for old, new in names.items():
        description = description.replace(old, new)
    backend = type(tiny_tokenizer.backend_tokenizer).from_str(description)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
        chat_template=(
            "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
            "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
        ),
    )


def test_the_published_preset_sets_these_keys_of_any_recipe():
    """Only those, on top of the recipe's other settings; its mixture replaces the recipe's as a whole."""
    assert preset_names() == ["published", "recommended"]
    plain, preset = (flatten(to_dict(load_config(recipe_path("tiny"), preset=name))) for name in (None, "published"))
    assert {key: value for key, value in preset.items() if value != plain[key]} == {
        "correction.mix": {"reflect": 0.5, "answer": 0.25, "solution": 0.25},
        "correction.max_prompt_length": 255,
        "eda.mean_over": "batch",
        "eda.clip": float("inf"),
        "published.padding_entropy": True,
        "published.entropy_gradient": True,
        "published.drop_eos": True,
        "published.reencode": True,
    }


def test_the_recommended_preset_injects_one_solution_in_a_group():
    plain, preset = (flatten(to_dict(load_config(recipe_path("tiny"), preset=name))) for name in (None, "recommended"))
    changed = {key: value for key, value in preset.items() if value != plain[key]}
    assert changed == {"correction.mix": {"solution": 1.0}, "correction.scope": "one"}
    assert load_config(preset="recommended", overrides=["method=gec"]).method == "gec"


@pytest.mark.parametrize("name", [None, *recipe_names()])
def test_a_preset_goes_with_every_recipe_that_samples_here(name):
    path = recipe_path(name) if name else None
    if load_config(path).rollout.engine == "transformers":
        assert load_config(path, preset="published").eda.mean_over == "batch"
    else:
        with pytest.raises(
            ValueError, match=r"published\.entropy_gradient and rollout\.engine = vllm.* cannot be combined"
        ):
            load_config(path, preset="published")
        load_config(path, ["published.entropy_gradient=false"], preset="published")


def test_an_override_switches_one_key_of_a_preset_back():
    config = load_config(recipe_path("tiny"), ["published.drop_eos=false", "correction.mix.hint=1"], preset="published")
    assert not config.published.drop_eos
    assert config.published.reencode
    assert config.correction.mix == {"reflect": 0.5, "answer": 0.25, "solution": 0.25, "hint": 1.0}


def test_an_unknown_preset_is_refused():
    with pytest.raises(ValueError, match=r"no preset named 'publishd'; did you mean published\?"):
        load_config(preset="publishd")


@pytest.mark.parametrize("name", recipe_names())
def test_recipe_loads(name):
    config = load_config(recipe_path(name))
    assert config.method == "edge"
    assert config.output.startswith("runs/")  # which git ignores


def test_the_papers_setting():
    config = load_config(recipe_path("qwen2.5-math-7b-edge"))
    assert (config.use_eda, config.use_gec, config.steps) == (True, True, 1000)
    assert (config.rollout.num_prompts, config.rollout.num_generations, config.rollout.temperature) == (1, 8, 0.6)
    assert (config.data.max_prompt_length, config.rollout.max_completion_length) == (512, 1024)
    assert config.correction.max_length == 256
    assert config.correction.mix == {"reflect": 0.5, "answer": 0.25, "solution": 0.25}
    assert (config.loss.loss_type, config.loss.beta, config.loss.injected) == ("bnpo", 0.0, "credit")
    assert (config.loss.epsilon_low, config.loss.epsilon_high) == (0.2, 0.2)
    assert config.optim.learning_rate == 1e-6


def run_a_step(config, examples, model, tokenizer):
    """Sample, judge and correct one group per example, as a training step does; a few tokens each."""
    prompts, too_long = render_prompts(examples, tokenizer, config.data)
    groups = [prompt for prompt in prompts for _ in range(GROUP)]
    engine = build_engine(config, model, tokenizer)
    sampling = Sampling(max_tokens=12, temperature=config.rollout.temperature)
    rewarder = Rewarder(config.reward)
    try:
        responses = engine.generate([prompt.token_ids for prompt in groups], sampling, seed=0)
        rewards = rewarder(groups, [tokenizer.decode(response.token_ids) for response in responses])
        corrector = Corrector(
            config.correction,
            encode=lambda text: tokenizer(text, add_special_tokens=False)["input_ids"],
            eos_token_ids=eos_token_ids(model, tokenizer),
            max_tokens=1024,  # room for a solution, as the recipe gives it
        )
        ids = [place // GROUP for place in range(len(groups))]
        plan = corrector.plan(groups, responses, rewards, ids, seed=0)
        corrected = carry_out(plan, engine, sampling, seed=0)
        after = rewarder(groups, [tokenizer.decode(response.token_ids) for response in corrected])
    finally:
        rewarder.close()
    return prompts, too_long, groups, responses, corrected, after


@pytest.fixture(scope="module")
def qwen_config():
    return load_config(recipe_path("qwen2.5-math-7b-edge"), ["data.max_prompt_length=1200"])  # a byte is a token here


def check_qwen_path(config, examples, model, tokenizer):
    prompts, too_long, groups, responses, corrected, after = run_a_step(config, examples, model, tokenizer)
    assert too_long == 0
    for prompt in prompts:
        assert prompt.text == (
            "<|im_start|>system\nPlease reason step by step, and put your final answer within \\boxed{}.<|im_end|>\n"
            f"<|im_start|>user\n{prompt.example.problem}<|im_end|>\n<|im_start|>assistant\n"
        )
    assert eos_token_ids(model, tokenizer) == (0, 1)  # the document's end, and the turn's from the chat template
    assert all(response.is_recorded for response in responses)
    kinds = Counter(response.correction for response in corrected)
    assert kinds["reflect"]
    assert kinds["answer"]
    assert kinds["solution"]
    right = {kind: [] for kind in kinds}
    for prompt, response, reward in zip(groups, corrected, after, strict=True):
        right[response.correction].append(reward.correct)
        if response.correction == "solution":
            text = tokenizer.decode(
                [t for t, p in zip(response.token_ids, response.provenance, strict=True) if p == Provenance.INJECTED],
                skip_special_tokens=True,
            )
            assert text == prompt.example.solution
    assert all(right["answer"])
    assert sum(right["solution"]) / len(right["solution"]) > 0.5  # some reference solutions box nothing
    assert not any(right["reflect"])  # a random model stays wrong


def test_qwen_recipe_runs_on_its_data_format(tmp_path, make_model, qwen_tokenizer, qwen_config):
    path = tmp_path / "deepscaler_hard-1k.json"
    path.write_text(json.dumps(ROWS), encoding="utf-8")
    examples = load_examples(str(path), qwen_config.data.columns)
    assert [(e.problem, e.answer, e.solution) for e in examples] == [tuple(row.values()) for row in ROWS]
    model = make_model("Qwen2", max_position_embeddings=4096)
    check_qwen_path(qwen_config, examples, model, qwen_tokenizer)


@pytest.mark.skipif(not DEEPSCALER.is_file(), reason="needs DeepScaleR-Hard-1K in ../shared/data, not in this checkout")
def test_qwen_recipe_runs_on_deepscaler(make_model, qwen_tokenizer, qwen_config):
    everything = load_examples(str(DEEPSCALER), qwen_config.data.columns)
    assert len(everything) == 1000
    assert all(example.answer and example.solution for example in everything)
    prompts, too_long = render_prompts(everything, qwen_tokenizer, qwen_config.data)
    assert (len(prompts), too_long) == (1000, 0)
    boxed = [e for e in everything if e.solution and "\\boxed" in e.solution and len(e.solution) < 800][:4]
    check_qwen_path(qwen_config, boxed, make_model("Qwen2", max_position_embeddings=4096), qwen_tokenizer)


def test_smollm2_recipe_runs_on_a_tiny_model(tiny_model, tiny_tokenizer):
    config = load_config(recipe_path("smollm2-135m"), ["data.max_prompt_length=400", "correction.max_length=200"])
    examples = load_examples(config.data.train, config.data.columns, limit=3)
    prompts, _, _, _, corrected, _ = run_a_step(config, examples, tiny_model, tiny_tokenizer)
    assert all("\\boxed{14}" in prompt.text for prompt in prompts)
    assert {response.correction for response in corrected} >= {"reflect", "answer", "solution"}


@pytest.mark.parametrize("engine", ["vllm", "vllm-server"])
def test_smollm2_recipes_differ_in_what_samples(engine):
    """The three can be compared only as long as everything else is the same."""
    plain = load_config(recipe_path("smollm2-135m"))
    other = load_config(recipe_path(f"smollm2-135m-{engine.removeprefix('vllm-')}"))
    assert other.rollout.engine == engine
    names = ("engine", "vllm", "server", "server_folder", "timeout")
    rollout = replace(other.rollout, **{name: getattr(plain.rollout, name) for name in names})
    assert replace(other, output=plain.output, rollout=rollout) == plain


def test_smollm2_recipe_holds_out_every_eval_problem():
    config = load_config(recipe_path("smollm2-135m"))
    assert config.eval.data
    train = {example.problem for example in load_examples(config.data.train, {}, limit=490)}
    held_out = [example.problem for example in load_examples(config.eval.data, {}, limit=config.eval.size)]
    assert not train & set(held_out)
    assert config.data.system_prompt  # its examples are no held-out problems either
    assert not any(shown in problem for problem in held_out for shown in ("7 + 8", "8 + 7", "20 - 6"))
