"""Prompt templates: the published texts to the letter, where the answer stands, and what a response ends with."""

from __future__ import annotations

import pytest
from bpe import make_tokenizer
from hypothesis import given
from hypothesis import strategies as st

from edge_grpo.config import DataConfig
from edge_grpo.data.templates import TEMPLATES, find_template, foreign_marks
from edge_grpo.text import last_box
from edge_grpo.types import Example

EXAMPLES = [Example(3, r"What is {1} + \frac{1}{2}?", "x"), Example(5, "Why? " * 40, "y")]


def text_of(name: str, *, chat: bool = True, **data: str) -> str:
    template = find_template(name, DataConfig(**data))
    prompts, left_out = template.render(EXAMPLES[:1], make_tokenizer(chat=chat), 10_000)
    assert left_out == []
    return prompts[0].text


def test_the_published_texts():
    assert text_of("qwen_math") == (
        "<|im_start|>system\nPlease reason step by step, and put your final answer within \\boxed{}.<|im_end|>\n"
        "<|im_start|>user\nWhat is {1} + \\frac{1}{2}?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert text_of("r1") == (
        "A conversation between User and Assistant. The User asks a question, and the Assistant solves it. The "
        "Assistant first thinks about the reasoning process in the mind and then provides the User with the answer. "
        "The reasoning process is enclosed within <think> </think> and answer is enclosed within <answer> </answer> "
        "tags, respectively, i.e., <think> reasoning process here </think> <answer> answer here </answer>.\n"
        "User: What is {1} + \\frac{1}{2}?\nAssistant: <think>"
    )


def test_whole_texts_are_the_same_for_every_model_and_start_as_its_sequences_do():
    for name in ("qwen_math", "r1"):
        assert text_of(name, chat=True) == text_of(name, chat=False)
    tokenizer = make_tokenizer(template="<s> $A")
    [prompt], _ = TEMPLATES["r1"].render(EXAMPLES[:1], tokenizer, 10_000)
    assert prompt.token_ids[0] == tokenizer.bos_token_id
    assert prompt.token_ids.count(tokenizer.bos_token_id) == 1


def test_the_models_own_chat_template():
    assert text_of("chat") == (
        "<s>[user]What is {1} + \\frac{1}{2}?\n\n"
        "Please reason step by step, and put your final answer within \\boxed{}.[end][assistant]\n"
    )
    with pytest.raises(ValueError, match="template chat needs a tokenizer with a chat template"):
        text_of("chat", chat=False)


def test_the_prompt_of_training():
    data = {"system_prompt": "Be brief.", "prompt_template": "Q: {problem}"}
    assert (
        text_of("config", **data) == "<s>[system]Be brief.[end][user]Q: What is {1} + \\frac{1}{2}?[end][assistant]\n"
    )
    assert text_of("config", chat=False, **data) == "Be brief.\n\nQ: What is {1} + \\frac{1}{2}?"


def test_an_unknown_template_is_named():
    with pytest.raises(ValueError, match="one of qwen_math, r1, chat, config; got 'qwen'"):
        find_template("qwen", DataConfig())


def test_rows_left_out_are_named():
    prompts, left_out = TEMPLATES["qwen_math"].render(EXAMPLES, make_tokenizer(), 200)
    assert [prompt.example.index for prompt in prompts] == [3]
    assert left_out == [5]


def test_marks_that_a_tokenizer_does_not_know():
    tokenizer = make_tokenizer(chat=True)
    assert foreign_marks(TEMPLATES["qwen_math"], tokenizer) == ["<|im_start|>", "<|im_end|>"]
    assert foreign_marks(TEMPLATES["r1"], tokenizer) == foreign_marks(TEMPLATES["chat"], tokenizer) == []
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    assert foreign_marks(TEMPLATES["qwen_math"], tokenizer) == []


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        (r" so </think> <answer> 5 </answer>", "5"),
        (r"</think><answer>The sum is \boxed{5}.</answer>", "5"),  # a box within the answer is the answer
        ("</think>\n<answer>\n\\frac{1}{2}\n</answer>", r"\frac{1}{2}"),
        (r" \boxed{4} </think> <answer>5</answer>", "5"),  # a box in the reasoning is not
        (r"</think> <answer>5</answer> <answer>6</answer>", "5"),
        (r"</think> <answer>5", None),  # never closed
        (r"<answer>5</answer>", None),  # still thinking
        (r"</think> \boxed{5}", None),
        (r"</think> <answer>{5</answer>", None),  # a brace too many
    ],
)
def test_where_r1_puts_the_answer(completion, answer):
    assert last_box(TEMPLATES["r1"].boxed(completion)) == answer


def test_the_other_templates_leave_the_last_box():
    for name in ("qwen_math", "chat"):
        assert TEMPLATES[name].boxed(r"\boxed{4} no, \boxed{5}.") == r"\boxed{4} no, \boxed{5}."
        assert TEMPLATES[name].ending is None
    assert TEMPLATES["r1"].ending == "</answer>"


@given(st.sampled_from(sorted(TEMPLATES)), st.text("ab{}\\ 12<>/$", max_size=12))
def test_a_sheets_answer_is_read_back(name, answer):
    r"""What ``answer_with`` writes is read as the last box would be."""
    template = TEMPLATES[name]
    written = template.answer_with(answer)
    if "</answer>" not in answer:
        assert last_box(template.boxed(written)) == last_box(f"\\boxed{{{answer}}}")
