"""Reading every kind of dataset, and what is said about one that cannot be read."""

from __future__ import annotations

import json
from pathlib import Path

import datasets
import pytest
from hypothesis import given
from hypothesis import strategies as st
from paths import SHARED_DATA

from edge_grpo.data.arithmetic import generate
from edge_grpo.data.rows import plain_number
from edge_grpo.data.sources import GENERATED_SIZE, load_examples, suite_sets
from edge_grpo.grading.answers import accepted_answers
from edge_grpo.types import Example

ROWS = [
    {"problem": "1+1?", "answer": "2", "solution": "It is \\boxed{2}.", "level": 1},
    {"problem": "1+1?", "answer": "2", "solution": None, "level": 2},
    {"problem": "2+2?", "answer": "4", "solution": " ", "level": 3},
]
SHARED = SHARED_DATA


def write(path: Path, rows: list[dict]) -> str:
    path.write_text(json.dumps(rows), encoding="utf-8")
    return str(path)


# ---- Files and folders ---------------------------------------------------------------------------------------------


def as_json(folder: Path) -> str:
    return write(folder / "data.json", ROWS)


def as_wrapped_json(folder: Path) -> str:
    (folder / "data.json").write_text(json.dumps({"data": ROWS}))
    return str(folder / "data.json")


def as_jsonl(folder: Path) -> str:
    (folder / "data.jsonl").write_text("\n\n".join(map(json.dumps, ROWS)) + "\n")
    return str(folder / "data.jsonl")


def as_json_lines_called_json(folder: Path) -> str:
    (folder / "data.json").write_text("\n".join(map(json.dumps, ROWS)))
    return str(folder / "data.json")


def as_parquet(folder: Path) -> str:
    datasets.Dataset.from_list(ROWS).to_parquet(folder / "data.parquet")
    return str(folder / "data.parquet")


def as_saved_dataset(folder: Path) -> str:
    datasets.Dataset.from_list(ROWS).save_to_disk(folder / "saved")
    return str(folder / "saved")


def as_saved_splits(folder: Path) -> str:
    splits = {"other": datasets.Dataset.from_list(ROWS[:1]), "mine": datasets.Dataset.from_list(ROWS)}
    datasets.DatasetDict(splits).save_to_disk(folder / "saved")
    return f"{folder / 'saved'}@mine"


def with_an_at_sign(folder: Path) -> str:
    (folder / "me@home").mkdir()
    return as_json(folder / "me@home")


@pytest.mark.parametrize(
    "source",
    [
        as_json,
        as_wrapped_json,
        as_jsonl,
        as_json_lines_called_json,
        as_parquet,
        as_saved_dataset,
        as_saved_splits,
        with_an_at_sign,
    ],
)
def test_every_source_gives_the_same_examples(tmp_path, source):
    assert load_examples(source(tmp_path), {}) == [
        Example(0, "1+1?", "2", "It is \\boxed{2}.", {"level": 1}),
        Example(1, "1+1?", "2", None, {"level": 2}),  # a duplicate stays
        Example(2, "2+2?", "4", None, {"level": 3}),
    ]


def test_a_hub_dataset_is_loaded_by_id_configuration_and_split(monkeypatch):
    asked = []

    def load_dataset(*arguments):
        asked.append(arguments)
        return datasets.DatasetDict(train=datasets.Dataset.from_list(ROWS), test=datasets.Dataset.from_list(ROWS[2:]))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert len(load_examples("owner/name", {})) == 3
    assert [example.problem for example in load_examples("owner/name:main@test", {})] == ["2+2?"]
    assert asked == [("owner/name", None), ("owner/name", "main")]
    with pytest.raises(ValueError, match="owner/name has no split 'dev'; there are train, test; name one as"):
        load_examples("owner/name@dev", {})


def test_a_hub_failure_says_what_was_tried(monkeypatch):
    def load_dataset(*arguments):
        raise ConnectionError("offline")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(ValueError, match=r"no folder owner/name, and .* failed with ConnectionError: offline"):
        load_examples("owner/name", {})


def test_columns_are_mapped_and_the_rest_is_kept(tmp_path):
    path = write(tmp_path / "data.json", [{"question": "1+1?", "final": 2, "problem": "unused", "topic": "sums"}])
    examples = load_examples(path, {"problem": "question", "answer": "final"})
    raw = {"question": "1+1?", "final": 2}  # reward functions may ask for columns by the names that they have
    assert examples == [Example(0, "1+1?", "2", None, raw | {"problem": "unused", "topic": "sums"})]


def test_rows_may_have_different_columns(tmp_path):
    path = write(tmp_path / "data.json", [{"problem": "1+1?"}, {"problem": "2+2?", "answer": "4"}])
    assert [example.answer for example in load_examples(path, {})] == [None, "4"]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (3, "3"),
        (3.0, "3"),
        (-0.0, "0"),
        (0.1, "0.1"),
        (1e-5, "0.00001"),
        (1e22, "1" + 22 * "0"),
        (-142.50, "-142.5"),
        (True, "True"),
        ("025", "025"),  # text stays as it is
        ("  ", None),
        (None, None),
        (float("nan"), None),
        (float("-inf"), "-\\infty"),
        (["9.6\n"], "9.6"),
        ([], None),
        ([None, 7], "7"),
    ],
)
def test_answers_become_plain_text(tmp_path, value, text):
    [example] = load_examples(write(tmp_path / "data.json", [{"problem": "?", "answer": value}]), {})
    assert example.answer == text
    assert example.extra == {}


def test_a_list_of_answers_accepts_each(tmp_path):
    path = write(tmp_path / "data.json", [{"problem": "?", "answer": ["0.01\n", "0.02", 0.01]}])
    [example] = load_examples(path, {})
    assert example.answer == "0.01"
    assert accepted_answers(example) == ("0.01", "0.02")


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_a_number_keeps_its_value_as_text(value):
    text = plain_number(value)
    assert text is not None
    assert float(text) == value
    assert "e" not in text


def test_a_limit_samples_the_whole_dataset_and_keeps_rows_and_order(tmp_path):
    path = write(tmp_path / "data.json", [{"problem": f"{n}?", "answer": n} for n in range(100)])
    some = load_examples(path, {}, seed=1, limit=10)
    assert some == load_examples(path, {}, seed=1, limit=10)
    assert some != load_examples(path, {}, seed=2, limit=10)
    indices = [example.index for example in some]
    assert indices == sorted(set(indices))
    assert len(indices) == 10
    assert indices[-1] > 50
    assert all(example.answer == str(example.index) for example in some)
    assert len(load_examples(path, {}, limit=1000)) == 100


# ---- Errors --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("problem", ["", " \n", None])
def test_an_empty_problem_is_named_by_its_row(tmp_path, problem):
    path = write(tmp_path / "data.json", [*ROWS, {"problem": problem, "answer": "1"}])
    with pytest.raises(ValueError, match=r"data\.json, row 3: the problem \(column 'problem'\) is empty"):
        load_examples(path, {})


@pytest.mark.parametrize(
    ("row", "columns", "message"),
    [
        ({"question": "?", "answer": 1}, {}, "no column 'problem' for the problem; did you mean 'question'"),
        ({"problems": "?"}, {}, "did you mean 'problems'"),
        ({"problem": "?", "final": 1}, {"answer": "finale"}, "'finale' for the answer; did you mean 'final'"),
        (
            {"problem": "?", "x": 1},
            {"solution": "steps"},
            r"There are problem, x; name it with data\.columns\.solution",
        ),
        ({"problem": "?"}, {"tags": "x"}, "maps problem, answer and solution; got 'tags'"),
    ],
)
def test_a_missing_column_lists_those_there_are(tmp_path, row, columns, message):
    with pytest.raises(ValueError, match=message):
        load_examples(write(tmp_path / "data.json", [row]), columns)


@pytest.mark.parametrize("answer", [{"value": 1}, [[1]]])
def test_an_answer_of_another_type_is_named(tmp_path, answer):
    with pytest.raises(TypeError, match="row 0: the answer must be text"):
        load_examples(write(tmp_path / "data.json", [{"problem": "?", "answer": answer}]), {})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", "has no rows"),
        ("", "not JSON"),
        ('{"problem": "1"}\n{"problem": \n', "line 2 is not JSON"),
        ('{"problem": "1"}\n[1]', "line 2 must be an object; got list"),
        ("[1, 2]", "must hold a list of objects"),
        ('"text"', "must hold a list of objects"),
    ],
)
def test_a_broken_file_says_where(tmp_path, content, message):
    (tmp_path / "data.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        load_examples(str(tmp_path / "data.json"), {})


@pytest.mark.parametrize(
    ("spec", "error", "message"),
    [
        ("arithmetc", ValueError, "did you mean 'arithmetic'"),
        ("arithmetic:one", ValueError, "must name levels such as arithmetic:1,2"),
        ("arithmetic:9", ValueError, "levels must be one or more"),
        ("arithmetic@dev", ValueError, "split must be one of"),
        ("reasoning_gym:chain_sums", ValueError, "did you mean 'chain_sum'"),
        ("reasoning_gym:chain_sum@dev", ValueError, "splits 'train' and 'test'; got 'dev'"),
        ("reasoning_gym:composite", ValueError, "no usable default settings"),
        ("nowhere.json", FileNotFoundError, "no data file nowhere.json"),
        ("arithmetic@", ValueError, r"given as NAME\[@SPLIT\]"),
    ],
)
def test_a_name_that_leads_nowhere_is_explained(spec, error, message):
    with pytest.raises(error, match=message):
        load_examples(spec, {})


def test_folders_and_splits_that_do_not_fit_are_explained(tmp_path):
    saved = as_saved_dataset(tmp_path)
    with pytest.raises(ValueError, match="without splits; got @train"):
        load_examples(f"{saved}@train", {})
    with pytest.raises(ValueError, match="without splits; got @test"):
        load_examples(f"{as_json(tmp_path)}@test", {})
    with pytest.raises(ValueError, match=r"data\.json names files, without splits; got @x"):
        load_examples(f"{tmp_path / 'data.json'}@x", {})
    (tmp_path / "data.xml").write_text("<problem/>")
    with pytest.raises(ValueError, match=r"must be a \.json, .* or \.parquet file \(.*\); got 'data\.xml'"):
        load_examples(str(tmp_path / "data.xml"), {})
    with pytest.raises(ValueError, match="limit must be at least 1 or None; got 0"):
        load_examples("arithmetic", {}, limit=0)


def test_the_sets_of_a_suite(tmp_path):
    rows = datasets.Dataset.from_list([{"problem": "p", "answer": "1"}])
    saved = str(tmp_path / "saved")
    datasets.DatasetDict({"b": rows, "a": rows}).save_to_disk(saved)
    assert suite_sets(saved) == {"b": f"{saved}@b", "a": f"{saved}@a"}
    assert len(load_examples(suite_sets(saved)["a"], {})) == 1
    files = tmp_path / "files"
    files.mkdir()
    (files / "amc.jsonl").write_text('{"problem": "p", "answer": "1"}')
    (files / "notes.txt").write_text("")
    assert suite_sets(str(files)) == {"amc": str(files / "amc.jsonl")}
    rows.save_to_disk(str(tmp_path / "single"))
    (tmp_path / "empty").mkdir()
    for name in ("single", "empty"):
        with pytest.raises(ValueError, match="holds no evaluation sets"):
            suite_sets(str(tmp_path / name))
    with pytest.raises(FileNotFoundError, match="no folder"):
        suite_sets(str(tmp_path / "none"))


# ---- Generated tasks -----------------------------------------------------------------------------------------------


def test_arithmetic_is_the_built_in_task():
    assert load_examples("arithmetic:2,1@test", {"problem": "ignored"}, seed=3, limit=20) == generate(
        [2, 1], "test", 3, 20
    )
    assert len(load_examples("arithmetic", {})) == GENERATED_SIZE


def test_reasoning_gym_is_seeded_and_its_splits_share_no_seed(grader):
    load = {
        (split, seed): load_examples(f"reasoning_gym:chain_sum@{split}", {}, seed=seed, limit=300)
        for split in ("train", "test")
        for seed in (0, 1)
    }
    assert load["train", 0] == load_examples("reasoning_gym:chain_sum", {}, seed=0, limit=300)
    problems = {key: {example.problem for example in examples} for key, examples in load.items()}
    # Neighbouring seeds of reasoning_gym itself share all examples but one; a few four-digit sums repeat by chance.
    assert all(len(problems[a] & problems[b]) < 10 for a in problems for b in problems if a != b)
    answers = [e.answer for e in load["test", 1] if e.answer is not None]
    assert set(grader([([answer], answer) for answer in answers])) == {"correct"}
    assert load["test", 0][0].extra["metadata"]["source_dataset"] == "chain_sum"


def test_a_reasoning_gym_task_with_its_own_grading_is_reported(caplog):
    examples = load_examples("reasoning_gym:graph_color", {}, limit=3)
    assert [example.answer for example in examples] == [None] * 3
    assert "grades with its own score_answer and gives no answer for 3 of 3 problems" in caplog.text


# ---- The paper's data, where there is a copy -----------------------------------------------------------------------


@pytest.mark.skipif(not SHARED.is_dir(), reason="no copy of the paper's data beside the repository")
def test_the_papers_training_set_loads():
    examples = load_examples(str(SHARED / "deepscaler_hard-1k.json"), {})
    assert len(examples) == 1000
    assert len({example.problem for example in examples}) == 990
    assert all(example.answer and example.solution for example in examples)


@pytest.mark.skipif(not SHARED.is_dir(), reason="no copy of the paper's data beside the repository")
@pytest.mark.parametrize(
    ("split", "size", "first"),
    [
        ("aime", 30, "204"),
        ("amc", 83, "142"),
        ("math", 500, None),
        ("minerva", 272, "9.6"),
        ("olympiad_bench", 675, "2"),
    ],
)
def test_the_papers_evaluation_sets_load_and_accept_their_own_answers(grader, split, size, first):
    examples = load_examples(f"{SHARED / 'evaluation_suite'}@{split}", {})
    assert len(examples) == size
    assert first in (None, examples[0].answer)
    accepted = [accepted_answers(example) for example in examples]
    assert set(grader([(several, answer) for several in accepted for answer in several])) == {"correct"}
