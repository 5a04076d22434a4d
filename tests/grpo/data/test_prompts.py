"""Prompts are rendered to exactly the tokens that a model should read."""

from __future__ import annotations

from collections import Counter

import pytest
from bpe import BOS, EOS, make_tokenizer
from hypothesis import given
from hypothesis import strategies as st

from edge_grpo.config import DataConfig
from edge_grpo.data.prompts import render_prompts
from edge_grpo.types import Example

EXAMPLES = [Example(0, "What is 2 + 3?", "5"), Example(1, "What is 5 * 7, please?", "35")]


def test_plain_prompts_are_the_filled_template_after_the_system_prompt():
    tokenizer = make_tokenizer()
    config = DataConfig(system_prompt="Be brief.", prompt_template="Q: {problem}\nA:")
    prompts, too_long = render_prompts(EXAMPLES, tokenizer, config)
    assert too_long == 0
    assert [prompt.text for prompt in prompts] == [f"Be brief.\n\nQ: {example.problem}\nA:" for example in EXAMPLES]
    assert [prompt.example for prompt in prompts] == EXAMPLES
    assert [tokenizer.decode(prompt.token_ids) for prompt in prompts] == [prompt.text for prompt in prompts]


@pytest.mark.parametrize(
    ("template", "prompt_template", "expected"),
    [
        ("$A", "{problem}", ""),
        (f"{BOS} $A", "{problem}", BOS),
        (f"{BOS} $A {EOS}", "{problem}", BOS),  # after an end of sequence a model would not go on
        (f"$A {EOS}", "{problem}", ""),
        (f"{BOS} $A", BOS + "{problem}", BOS),  # the template has it already
    ],
)
def test_plain_prompts_begin_once_and_do_not_end(template, prompt_template, expected):
    tokenizer = make_tokenizer(template=template)
    prompts, _ = render_prompts(EXAMPLES, tokenizer, DataConfig(prompt_template=prompt_template))
    for prompt, example in zip(prompts, EXAMPLES, strict=True):
        assert tokenizer.decode(prompt.token_ids) == expected + example.problem


def test_chat_prompts_are_exactly_the_template_with_one_bos():
    tokenizer = make_tokenizer(template=f"{BOS} $A", chat=True)
    config = DataConfig(system_prompt="Be brief.", prompt_template="{problem} Use \\boxed{}.")
    prompts, _ = render_prompts(EXAMPLES, tokenizer, config)
    for prompt, example in zip(prompts, EXAMPLES, strict=True):
        user = f"{example.problem} Use \\boxed{{}}."
        assert prompt.text == f"{BOS}[system]Be brief.[end][user]{user}[end][assistant]\n"
        chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": user}]
        ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"]
        assert list(prompt.token_ids) == ids
        assert Counter(ids)[tokenizer.bos_token_id] == 1


def test_a_chat_template_without_system_role_says_what_to_do():
    tokenizer = make_tokenizer(chat=True)
    refusal = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    tokenizer.chat_template = refusal + "{{ messages[0].content }}"
    render_prompts(EXAMPLES, tokenizer, DataConfig())
    with pytest.raises(ValueError, match=r"no system role; if it takes no system message, set data\.system_prompt"):
        render_prompts(EXAMPLES, tokenizer, DataConfig(system_prompt="Be brief."))


@pytest.mark.parametrize("chat", [False, True])
def test_long_prompts_are_left_out_and_counted(chat):
    tokenizer = make_tokenizer(chat=chat)
    lengths = [len(prompt.token_ids) for prompt in render_prompts(EXAMPLES, tokenizer, DataConfig())[0]]
    assert lengths[0] < lengths[1]
    prompts, too_long = render_prompts(EXAMPLES, tokenizer, DataConfig(max_prompt_length=lengths[0]))
    assert [prompt.example.index for prompt in prompts] == [0]
    assert too_long == 1
    with pytest.raises(ValueError, match=f"all 2 prompts have more than .* = 3 tokens; the shortest has {lengths[0]}"):
        render_prompts(EXAMPLES, tokenizer, DataConfig(max_prompt_length=3))


def test_no_examples_are_an_error():
    with pytest.raises(ValueError, match="must not be empty"):
        render_prompts([], make_tokenizer(), DataConfig())


@given(st.text(min_size=1).filter(str.strip))
def test_any_problem_survives_the_round_trip(problem):
    tokenizer = make_tokenizer()
    [prompt], _ = render_prompts([Example(0, problem)], tokenizer, DataConfig(max_prompt_length=10_000))
    assert tokenizer.decode(prompt.token_ids, clean_up_tokenization_spaces=False) == problem


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"columns": {"problm": "question"}}, "got the key 'problm'; did you mean problem"),
        ({"prompt_template": "Solve this."}, r"prompt_template must contain \{problem\}"),
        ({"max_prompt_length": 0}, "max_prompt_length must be a whole number of at least 1"),
    ],
)
def test_the_configuration_is_validated(values, message):
    with pytest.raises(ValueError, match=message):
        DataConfig(**values)
