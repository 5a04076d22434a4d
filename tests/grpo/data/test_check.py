"""Checking a dataset: every defect is found once, in the right row."""

from __future__ import annotations

import json

import pytest
from bpe import make_tokenizer
from paths import SHARED_DATA
from rich.console import Console

from edge_grpo.commands import main as cli
from edge_grpo.config import load_config
from edge_grpo.data.check import Preflight, _bins, examine, rejected_solutions, unboxable_answers
from edge_grpo.data.sources import load_examples
from edge_grpo.types import Example

ROWS = [
    {"problem": "1+1?", "answer": "2", "solution": r"It is \boxed{2}.", "level": 1},
    {"problem": "1+2?", "answer": "3", "solution": r"It is \boxed{\frac{6}{2}}.", "level": None, "[/b]": 1},
    {"problem": " ", "answer": "3", "solution": r"\boxed{3}"},
    {"problem": " 1+1?\n", "answer": "2", "solution": None},
    {"problem": "1+2?", "answer": "4", "solution": r"It is \boxed{3}."},
    {"problem": "2+2?", "answer": None, "solution": "It is 4."},
    {"problem": "Who?", "answer": "Ada Lovelace", "solution": r"\boxed{Ada Lovelace}"},
    {"problem": "List.", "answer": r"1, 2, \ldots, 9", "solution": r"\boxed{1, 2, \ldots, 9}"},
    {"problem": "Tower?", "answer": "9^{9^{9^{9}}}", "solution": r"\boxed{9^{9^{9^{9}}}}"},
    {"problem": "2*2?", "answer": "4", "solution": "It is 4."},
    {"problem": "How " + "very " * 30 + "long?", "answer": "4", "solution": r"So \boxed{4}" + " indeed" * 30},
]
CONFIG = load_config(
    None, ["data.max_prompt_length=40", "rollout.max_completion_length=30", "correction.max_length=20"]
)
SHARED = SHARED_DATA / "deepscaler_hard-1k.json"


@pytest.fixture
def file(tmp_path) -> str:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(ROWS), encoding="utf-8")
    return str(path)


@pytest.fixture
def found(file, grader) -> Preflight:
    return examine(load_examples(file, {}, allow_empty=True), grader, CONFIG, make_tokenizer())


def test_every_defect_is_found_once(found):
    assert [(finding.kind, finding.row) for finding in found.findings] == [
        ("empty problem", 2),
        ("repeated problem", 3),
        ("repeated problem", 4),
        ("no answer", 5),
        ("unreadable answer", 7),
        ("unreadable answer", 8),
        ("rejected solution", 4),
        ("rejected solution", 9),
        ("long prompt", 10),
        ("long solution", 10),
    ]
    details = {(finding.kind, finding.row): finding.detail for finding in found.findings}
    assert details["repeated problem", 3] == "also in row 0, with the same answer"
    assert details["repeated problem", 4] == "also in row 1, with another answer"
    assert details["unreadable answer", 7] == r"unparseable: '1, 2, \\ldots, 9'"
    assert details["unreadable answer", 8] == "timed_out: '9^{9^{9^{9}}}'"
    assert details["rejected solution", 4] == "wrong: its box holds '3', the answer is '4'"
    assert details["rejected solution", 9] == "unparseable: its box holds nothing, the answer is '4'"
    assert details["long prompt", 10].endswith(" tokens of 40")
    assert details["long solution", 10].endswith(" tokens of 50")
    assert found.columns == {"problem": 10, "answer": 10, "solution": 10, "level": 1, "[/b]": 1}


def test_an_answer_must_read_back_from_the_correction_that_injects_it(grader):
    answers = (r"\frac{1}{2", "5}", "7", r"\{1", r"$\frac{1}{2}$")
    rows = [Example(index, "?", answer) for index, answer in enumerate(answers)]
    found = [finding for finding in examine(rows, grader, CONFIG).findings if finding.kind == "misread answer"]
    assert [(finding.row, finding.detail) for finding in found] == [
        (0, r"'\\frac{1}{2' reads as nothing"),
        (1, "'5}' reads as '5'"),
    ]
    config = load_config(None, ["reward.answer=line", "correction.answer_text= Answer: {answer}"])
    rows = [Example(0, "?", "1 0\n0 1"), Example(1, "5?", "5", "So it is.\nAnswer: 5")]
    found = [(finding.kind, finding.row) for finding in examine(rows, grader, config).findings]
    assert found == [("misread answer", 0)]


RATIONALE = "In May she sold 24 clips.\nIn all she sold 48+24 = 72 clips, so the answer is 72."


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        (RATIONALE, "sentence answer"),
        ("The answer is the number of all even divisors", "sentence answer"),
        ("1 0\n0 1", "multi-line answer"),
        (r"\begin{pmatrix} 1 & 0 \\\\ 0 & 1 \end{pmatrix}", None),
        ("Monday, Tuesday, Wednesday, Thursday, Friday, Saturday, Sunday, Monday", None),  # a list of words
        (r"\text{all real numbers } x \text{ with } $f(x) = \text{a number of this kind}$", None),
        ("Ada Lovelace and Charles Babbage", None),
    ],
)
def test_answers_that_no_model_gives_are_found_and_refused(grader, answer, kind):
    rows = [Example(7, "?", answer)]
    found = [
        f.kind for f in examine(rows, grader, CONFIG).findings if f.kind in ("sentence answer", "multi-line answer")
    ]
    assert found == [kind] * (kind is not None)
    assert list(unboxable_answers(rows, CONFIG)) == [0] * (kind == "sentence answer")


def test_one_answer_that_can_be_given_is_enough():
    several = Example(0, "?", RATIONALE, accepted_answers=(RATIONALE, "72"))
    assert unboxable_answers([several, Example(1, "?", "5}")], CONFIG) == {1: "'5}' reads as '5'"}
    hash_style = load_config(None, ["reward.answer=hash", "method=grpo"])  # no correction writes a box
    assert unboxable_answers([Example(0, "?", "72"), Example(1, "?", "1\n2")], hash_style) == {
        1: r"'1\n2' reads as '1'"
    }


def test_gsm8k_is_fit_to_train_on_as_it_is(tmp_path, grader):
    row = {"question": "?", "answer": "48+24 = <<48+24=72>>72 clips.\n#### 72"}
    (tmp_path / "train.jsonl").write_text(json.dumps(row))
    arguments = ["check", str(tmp_path / "train.jsonl"), "data.columns.problem=question", "--strict"]
    assert cli.main(arguments) == 0
    assert cli.main([*arguments, "reward.answer=hash", "method=grpo"]) == 0
    (tmp_path / "train.jsonl").write_text(json.dumps(row | {"answer": RATIONALE}))
    assert cli.main(arguments) == 1


def test_lengths_are_those_that_training_counts(found):
    tokenizer = make_tokenizer()
    assert found.prompt_lengths == tuple(len(tokenizer.encode(row["problem"])) for row in ROWS if row["problem"] != " ")
    solutions = [row["solution"] for row in ROWS if row["solution"]]
    assert found.solution_lengths == tuple(len(tokenizer.encode(text)) + 1 for text in solutions)


def test_control_tokens_in_the_data_are_listed_with_their_place(grader):
    chat = ({"role": "system", "content": "Be <s>."}, {"role": "user", "content": "2+2?"})
    rows = [
        Example(0, "What does </s> do?", "4", r"<s>It ends.</s> \boxed{4}"),
        Example(1, "1+1?", "2", "\\boxed{2}"),
        Example(2, "2+2?", "4", messages=chat),
    ]
    config = load_config(None, ["rollout.max_completion_length=500"])
    found = examine(rows, grader, config, make_tokenizer(chat=True))
    assert [(finding.kind, finding.row, finding.detail) for finding in found.findings] == [
        ("control token", 0, "</s> in the problem; <s>, </s> in the solution"),
        ("control token", 2, "<s> in the message 0"),
    ]
    assert found.solution_lengths[0] > len(make_tokenizer().encode(rows[0].solution)) + 1
    assert examine(rows, grader, config).findings == ()


def test_without_a_tokenizer_lengths_are_left_out(file, grader):
    found = examine(load_examples(file, {}, allow_empty=True), grader, CONFIG)
    assert found.prompt_lengths is None
    assert {finding.kind for finding in found.findings} & {"long prompt", "long solution"} == set()
    assert found.to_dict()["prompt_tokens"] is None


def test_a_solution_may_hold_any_accepted_answer(grader):
    example = Example(0, "?", "0.5", r"\boxed{\frac{1}{4}}", accepted_answers=("0.5", "0.25"))
    assert rejected_solutions([example], grader) == {}


@pytest.mark.parametrize(
    ("lengths", "bins"),
    [
        ([7], [(7, 7, 1)]),
        ([1, 1, 3], [(1, 1, 2), (2, 2, 0), (3, 3, 1)]),
        ([1, 12], [(n, n, int(n in (1, 12))) for n in range(1, 13)]),
        ([1, 13], [(n, n + 1, int(n in (1, 13))) for n in range(1, 14, 2)]),
    ],
)
def test_a_histogram_has_equal_ranges_that_hold_everything(lengths, bins):
    assert _bins(lengths) == bins


# ---- The command ---------------------------------------------------------------------------------------------------


def words(text: str) -> str:
    return " ".join(text.split())


def test_check_prints_a_table_and_writes_json(file, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    arguments = [file, "--model", "edge_grpo:tiny", "--json", str(tmp_path / "out" / "found.json")]
    keys = ["data.max_prompt_length=40", "rollout.max_completion_length=30", "correction.max_length=20"]
    assert cli.main(["check", *arguments, *keys, "reward.timeout=2"]) == 0
    printed = words(capsys.readouterr().out)
    assert "11 rows; of these with problem 10, answer 10, solution 10, level 1, [/b] 1" in printed
    assert "rejected solution 2 18.2% 4, 9 not injected" in printed
    assert "long prompt 1 9.1% 10 left out" in printed
    assert "tokens of prompts: median " in printed
    figures = json.loads((tmp_path / "out" / "found.json").read_text(encoding="utf-8"))
    assert figures["counts"]["repeated problem"] == 2
    assert {"kind": "no answer", "row": 5, "detail": ""} in figures["findings"]
    assert sum(entry["count"] for entry in figures["prompt_tokens"]["histogram"]) == 10


def test_strict_fails_when_there_is_anything(tmp_path, capsys):
    clean, dirty = tmp_path / "clean.json", tmp_path / "dirty.json"
    dirty.write_text(json.dumps(ROWS[:4]))
    assert cli.main(["check", str(dirty)]) == 0
    assert cli.main(["check", str(dirty), "--strict"]) == 1
    clean.write_text(json.dumps(ROWS[:2]))
    assert cli.main(["check", str(clean), "--strict"]) == 0
    assert "--model names the model whose tokenizer counts them" in words(capsys.readouterr().out)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no data to check; give DATA"),
        (["nowhere.json"], "no data file nowhere.json"),
        (
            ["FILE", "data.columns.problem=question"],
            "has no column 'question' for the problem; did you mean 'problem'?",
        ),
        (["FILE", "reward.time=3"], "unknown key reward.time; did you mean reward.timeout?"),
        (["ODD"], "the answer must be text, a number, or a list of those; got dict"),
    ],
)
def test_a_mistake_gets_one_message(file, tmp_path, capsys, arguments, message):
    odd = tmp_path / "odd.json"
    odd.write_text(json.dumps([{"problem": "?", "answer": {"value": 1}}]))
    arguments = [{"FILE": file, "ODD": str(odd)}.get(argument, argument) for argument in arguments]
    assert cli.main(["check", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_configuration_names_its_own_data(tmp_path, capsys):
    (tmp_path / "my.yaml").write_text("data: {train: 'arithmetic:1'}\n")
    assert cli.main(["check", "--config", str(tmp_path / "my.yaml"), "--size", "20", "--strict"]) == 0
    printed = words(capsys.readouterr().out)
    assert printed.startswith("arithmetic:1: 20 rows")
    assert "tokens of solutions" in printed  # the configuration has a model


def test_the_table_fits_a_narrow_terminal(found):
    console = Console(width=80, record=True)
    console.print(found.render())
    assert max(map(len, console.export_text().splitlines())) <= 80


@pytest.mark.skipif(not SHARED.is_file(), reason="no copy of the paper's data beside the repository")
def test_the_papers_training_set(grader):
    counts = examine(load_examples(str(SHARED), {}), grader, CONFIG).counts
    assert (counts["repeated problem"], counts["empty problem"], counts["no answer"]) == (10, 0, 0)
    assert counts["rejected solution"] == 16  # each gives another answer, or only an option's letter
    assert counts["unreadable answer"] == 5
    assert [counts[kind] for kind in ("misread answer", "sentence answer", "multi-line answer")] == [0, 0, 0]
