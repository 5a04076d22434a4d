"""What is refused or said of a run before it begins, and what is not."""

from __future__ import annotations

import copy

import pytest

from edge_grpo.config import from_dict
from edge_grpo.data.doubts import doubts
from edge_grpo.types import Example, Prompt


def prompts(*rows):
    return [Prompt(Example(i, *row), row[0], (1, 2)) for i, row in enumerate(rows)]


FULL = prompts(("2 + 3?", "5", "It is 5."), ("1 + 1?", "2", "It is 2."))


def test_nothing_is_said_of_a_run_as_it_should_be(tiny_tokenizer):
    held_out = prompts(("4 + 4?", "8"))
    assert doubts(from_dict({"eval": {"data": "held-out"}}), FULL, held_out, tiny_tokenizer) == []


@pytest.mark.parametrize(
    ("tree", "sentence"),
    [
        ({"steps": 5, "optim": {"warmup_steps": 5}}, "optim.warmup_steps is 5, and the run makes 5 optimizer steps"),
        ({"steps": 5, "optim": {"warmup_steps": 9, "epochs": 2}}, None),
        ({"loss": {"epsilon_low": 1.0}}, "loss.epsilon_low is 1.0: ratios are never below 0"),
        ({"loss": {"epsilon_low": 1.0, "loss_type": "cispo"}}, None),
    ],
)
def test_settings(tiny_tokenizer, tree, sentence):
    found = doubts(from_dict(tree), FULL, [], tiny_tokenizer)
    assert len(found) == (sentence is not None)
    assert sentence is None or sentence in found[0]


def test_held_out_problems_that_are_trained_on(tiny_tokenizer):
    config = from_dict({"data": {"train": "a.jsonl"}, "eval": {"data": "b.jsonl"}})
    [sentence] = doubts(config, FULL, prompts(("1 + 1?", "2"), ("4 + 4?", "8")), tiny_tokenizer)
    assert "1 of 2 held-out problems (b.jsonl) are trained on too (a.jsonl)" in sentence


@pytest.mark.parametrize("column", ["answer", "solution"])
def test_corrections_that_the_data_lack(tiny_tokenizer, column):
    keep = {"answer": ("5", None), "solution": (None, "It is 5.")}
    without = prompts(("2 + 3?", *keep["answer" if column == "solution" else "solution"]), ("1 + 1?", None, None))
    other = "solution" if column == "answer" else "answer"
    some, none = from_dict({"correction": {"mix": {other: 1}}}), from_dict({"correction": {"mix": {column: 1}}})
    [sentence] = doubts(some, without, [], tiny_tokenizer)
    assert f"correction.mix asks for {other}s, and 1 of 2 rows of arithmetic have none: their corrections" in sentence
    with pytest.raises(ValueError, match=rf"{column}s, and 2 of 2 .*; name .*data\.columns\.{column}=COLUMN, or set"):
        doubts(none, without, [], tiny_tokenizer)
    for method in ("grpo", "eda", "grpo+reflection"):  # which inject neither
        assert doubts(from_dict({"method": method}), without, [], tiny_tokenizer) == []


@pytest.mark.parametrize(
    ("path", "has_marks", "why"),
    [
        ("some/Model-7B-Instruct", False, "its name has 'Instruct'"),
        ("gemma-3-1b-it", False, "its name has 'it'"),
        ("some/base", True, "its vocabulary has <|user|>"),
        ("Chatty/Summit-base", False, None),
    ],
)
def test_a_chat_model_without_its_template(tiny_tokenizer, path, has_marks, why):
    tokenizer = copy.deepcopy(tiny_tokenizer)
    config = from_dict({"model": {"path": path}})
    assert doubts(config, FULL, [], tokenizer) == []
    tokenizer.chat_template = None
    if not has_marks:
        tokenizer.get_vocab = dict
    found = doubts(config, FULL, [], tokenizer)
    assert len(found) == (why is not None)
    assert why is None or f"the tokenizer of {path} has no chat template, though {why}: prompts are plain" in found[0]
