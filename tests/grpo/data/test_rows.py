r"""What rows mean as they are published: GSM8K, MATH, OlympiadBench, and the conversations of TRL and verl."""

from __future__ import annotations

import json
from pathlib import Path

import datasets
import pytest

from edge_grpo.data.check import rejected_solutions
from edge_grpo.data.sources import load_examples
from edge_grpo.grading.answers import accepted_answers
from edge_grpo.text import AnswerStyle, find_answer
from edge_grpo.types import Example

GSM8K = {
    "question": "Natalia sold clips to 48 friends in April, and half as many in May. How many in all?",
    "answer": "In May: 48/2 = <<48/2=24>>24 clips.\nIn all: 48+24 = <<48+24=1072>>1,072 clips.\n#### 1,072",
}
MATH = {"problem": "1/2+1/2?", "level": "Level 1", "type": "Algebra", "solution": r"First \boxed{0}, no: $\boxed{1}$."}
OLYMPIAD = {
    "question": "x^2=4?",
    "solution": ["$x=\\pm 2$.", "Clear."],
    "final_answer": ["$2$", "$-2$"],
    "is_multiple_answer": True,
}
CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1+1?"}]
VERL = {
    "data_source": "openai/gsm8k",
    "prompt": [{"role": "user", "content": "1+1? Answer after ####."}],
    "ability": "math",
    "reward_model": {"style": "rule", "ground_truth": "2"},
    "extra_info": {"split": "train", "index": 0, "answer": "One and one.\n#### 2"},
}


def write(folder: Path, *rows: dict) -> str:
    (folder / "data.json").write_text(json.dumps(rows), encoding="utf-8")
    return str(folder / "data.json")


def load(folder: Path, *rows: dict, style: AnswerStyle = "box", **columns: str) -> list[Example]:
    return load_examples(write(folder, *rows), columns, style=style)


@pytest.mark.parametrize("style", ["box", "hash", "line", "tag"])
def test_gsm8k_as_it_is(tmp_path, grader, style):
    [example] = load(tmp_path, GSM8K, style=style, problem="question")
    assert example.answer == "1,072"
    assert example.solution.startswith("In May: 48/2 = 24 clips.\nIn all: 48+24 = 1,072 clips.\n")
    assert find_answer(example.solution, style) == "1,072"
    assert rejected_solutions([example], grader, style) == {}
    assert grader([(accepted_answers(example), "1072")]) == ["correct"]


def test_a_marked_solution_ends_as_the_run_looks_for_answers(tmp_path):
    row = {"problem": "1+1?", "answer": "2", "solution": "One and one.\n#### 2"}
    assert load(tmp_path, row)[0].solution == "One and one.\n\\boxed{2}"
    assert load(tmp_path, row, style="hash")[0].solution == "One and one.\n#### 2"
    own = {"problem": "1+1?", "answer": "Count.\n#### 2", "solution": r"My own: \boxed{2}"}
    [example] = load(tmp_path, own)
    assert (example.answer, example.solution) == ("2", r"My own: \boxed{2}")


@pytest.mark.parametrize("text", ["#### 2", "####2", " #### 2 \n"])
def test_a_mark_without_rationale_is_an_answer_alone(tmp_path, text):
    [example] = load(tmp_path, {"problem": "1+1?", "answer": text})
    assert (example.answer, example.solution) == ("2", None)


@pytest.mark.parametrize("text", ["#### Step 1\nIt is 2.", "a ### 2", "####"])
def test_other_marks_are_text(tmp_path, text):
    assert load(tmp_path, {"problem": "1+1?", "answer": text})[0].answer == text


def test_math_as_it_is(tmp_path):
    [example] = load(tmp_path, MATH)
    assert (example.answer, example.solution) == ("1", MATH["solution"])
    assert example.extra == {"level": "Level 1", "type": "Algebra"}
    assert load(tmp_path, {"problem": "?", "solution": "no box"})[0].answer is None
    both = [{"problem": "?", "answer": None, "solution": r"\boxed{1}"}, {"problem": "?", "answer": "2"}]
    assert [example.answer for example in load(tmp_path, *both)] == [None, "2"]  # a column of answers is believed


def test_olympiad_bench_as_it_is(tmp_path):
    [example] = load(tmp_path, OLYMPIAD, problem="question", answer="final_answer")
    assert example.solution == "$x=\\pm 2$."
    assert accepted_answers(example) == ("$2$", "$-2$")
    assert load(tmp_path, OLYMPIAD | {"solution": [None, " "]}, problem="question")[0].solution is None


def test_a_column_that_is_mapped_has_no_other_role(tmp_path):
    row = {"prompt": CHAT, "solution": r"$\frac{1}{3}$"}  # as TRL's DeepMath-103K
    [example] = load(tmp_path, row, answer="solution")
    assert (example.answer, example.solution) == (r"$\frac{1}{3}$", None)
    assert example.extra == {"solution": r"$\frac{1}{3}$"}


@pytest.mark.parametrize("value", ["12", [12, 13], ["1", "2"], None, {"a": 1}])
def test_a_column_named_as_our_own_field_means_nothing(tmp_path, value):
    [example] = load(tmp_path, {"problem": "?", "answer": "5", "accepted_answers": value, "messages": value})
    assert accepted_answers(example) == ("5",)
    assert example.messages is None
    assert example.extra == {"accepted_answers": value, "messages": value}


# ---- Conversations -------------------------------------------------------------------------------------------------


def test_trl_conversations(tmp_path):
    [example] = load(tmp_path, {"prompt": CHAT, "answer": "2"})
    assert (example.problem, example.answer, example.extra) == ("1+1?", "2", {})
    assert example.messages == tuple(CHAT)
    (tmp_path / "one.jsonl").write_text(json.dumps({"prompt": CHAT}))  # one line with one list of objects
    assert load_examples(str(tmp_path / "one.jsonl"), {})[0].messages == tuple(CHAT)
    parts = [{"role": "user", "content": [{"type": "text", "text": "1+"}, {"type": "text", "text": "1?"}]}]
    assert load(tmp_path, {"chat": parts}, problem="chat")[0].messages == ({"role": "user", "content": "1+1?"},)


@pytest.mark.parametrize("kind", ["json", "parquet", "saved"])
def test_verl_as_it_is(tmp_path, kind):
    path = write(tmp_path, VERL)
    if kind == "parquet":
        path = str(tmp_path / "data.parquet")
        datasets.Dataset.from_list([VERL]).to_parquet(path)
    elif kind == "saved":
        path = str(tmp_path / "saved")
        datasets.Dataset.from_list([VERL]).save_to_disk(path)
    [example] = load_examples(path, {"solution": "extra_info.answer"})
    assert (example.problem, example.answer) == ("1+1? Answer after ####.", "2")
    assert example.solution == "One and one.\n\\boxed{2}"
    assert example.messages == ({"role": "user", "content": "1+1? Answer after ####."},)
    assert set(example.extra) == {"data_source", "ability", "reward_model", "extra_info"}


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([*CHAT, {"role": "assistant", "content": "2"}], "must end with a message of the user.*role is 'assistant'"),
        (
            [{"role": "user", "content": [{"type": "image"}]}],
            "a message must hold text alone; got a part .*'type': 'im",
        ),
        ([{"role": "user", "content": " "}], r"row 0: the problem \(column 'prompt'\) is empty"),
        ([{"role": "user", "content": "\ud83d"}], "row 0: the problem holds"),
    ],
)
def test_a_conversation_that_cannot_be_asked_is_a_sentence(tmp_path, prompt, message):
    with pytest.raises(ValueError, match=message):
        load(tmp_path, {"prompt": prompt})


def test_only_messages_are_a_conversation(tmp_path):
    with pytest.raises(ValueError, match=r"no column 'problem' for the problem; did you mean 'prompt'\?"):
        load(tmp_path, {"prompt": "1+1?"})
    with pytest.raises(TypeError, match="the problem must be text, a number, or a list of messages; got list"):
        load(tmp_path, {"problem": ["1+1?"]})
    with pytest.raises(ValueError, match=r"no column 'reward_model\.truth' for the answer"):
        load(tmp_path, VERL, answer="reward_model.truth")
