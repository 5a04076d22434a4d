"""Files of every format, compression and encoding give their rows, or a sentence that says where they are broken."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
from pathlib import Path

import datasets
import pytest

from edge_grpo.data.files import sort_files, split_files, suffix_of
from edge_grpo.data.sources import load_examples, suite_sets

ROWS = [
    {"problem": "1+1?", "answer": "2", "solution": "It is\n\\boxed{2}, 50 %."},
    {"problem": 'What is "né", é or ∞?', "answer": "x;y", "solution": None},
]
READ = [(row["problem"], row["answer"], row["solution"]) for row in ROWS]
LINES = "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS)
TABLE = 'problem,answer,solution\n1+1?,2,"It is\n\\boxed{2}, 50 %."\n\n"What is ""né"", é or ∞?",x;y,\n'


def read(spec: object) -> list[tuple[str, str | None, str | None]]:
    return [(example.problem, example.answer, example.solution) for example in load_examples(str(spec), {})]


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("rows.jsonl", LINES.encode()),
        ("rows.ndjson", LINES.replace("\n", "\r\n").encode()),
        ("rows.json", json.dumps(ROWS).encode()),
        ("rows.JSONL.gz", gzip.compress(LINES.encode())),
        ("rows.json.bz2", bz2.compress(json.dumps(ROWS).encode())),
        ("rows.jsonl.xz", lzma.compress(LINES.encode())),
        ("rows.csv", TABLE.encode()),
        ("rows.csv.gz", gzip.compress(TABLE.encode("utf-8-sig"))),
        ("rows.tsv", b'problem\tanswer\tsolution\n1+1?\t2\t"It is\n\\boxed{2}, 50 %."\n'),
        ("semicolons.csv", b'problem;answer;solution\r\n1+1?;2;"It is\n\\boxed{2}, 50 %."\r\n'),
        ("utf8-with-mark.jsonl", LINES.encode("utf-8-sig")),
        ("utf16.csv", TABLE.encode("utf-16")),
        ("utf16be.jsonl", b"\xfe\xff" + LINES.encode("utf-16-be")),
        ("utf32.jsonl", LINES.encode("utf-32")),
    ],
)
def test_the_same_rows_in_every_dress(tmp_path, name, data):
    (tmp_path / name).write_bytes(data)
    found = read(tmp_path / name)
    assert found == READ[: len(found)]
    assert len(found) == (1 if name in ("rows.tsv", "semicolons.csv") else 2)


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        (
            "a.jsonl",
            LINES.encode("latin-1", "replace"),
            r"a\.jsonl, line 2 is not UTF-8: byte 0xe9, which is 'é' in Lat",
        ),
        ("a.csv", TABLE.replace("∞", "").encode("cp1252"), r"a\.csv, line 5 is not UTF-8: byte 0xe9"),
        ("a.jsonl", LINES.encode("utf-16-le"), r"a\.jsonl, line 1 holds a zero byte, as UTF-16 without its byte order"),
        ("a.csv", TABLE.encode("utf-16")[:-1], r"a\.csv begins as UTF-16 and is none"),
        ("a.jsonl.gz", gzip.compress(LINES.encode())[:-9], r"a\.jsonl\.gz is not a whole \.gz file"),
        ("a.jsonl.gz", LINES.encode(), r"a\.jsonl\.gz is not a whole \.gz file: Not a gzipped file"),
        ("a.jsonl.bz2", bz2.compress(b"{}")[:-3], r"is not a whole \.bz2 file"),
        ("a.json.xz", b"nothing", r"is not a whole \.xz file"),
        ("a.parquet", b"PAR1 and no more", r"a\.parquet is not a whole \.parquet file"),
        ("a.jsonl", b'{"problem": "?"}\n' + b"[" * 100_000, r"a\.jsonl, line 2 is not JSON: too many brackets"),
        (
            "a.csv",
            b"problem,answer\n1+1?,2\n2+2?,4,5\n",
            r"a\.csv, line 3 must have a value for each of 2 columns; got 3",
        ),
        ("a.csv", b"problem,answer\n1+1?\n", r"a\.csv, line 2 must have a value for each of 2 columns; got 1"),
        ("a.csv", b"problem,answer,answer\n?,1,2\n", "line 1 must name each column once"),
        ("a.csv", b'problem,answer\n"1+1?,2\n', r"a\.csv, line 2 is not a table's: unexpected end of data"),
        ("a.tsv", b"problem\tanswer\n", "has no rows"),
    ],
)
def test_a_broken_file_is_a_sentence_with_its_place(tmp_path, name, data, message):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=message):
        load_examples(str(tmp_path / name), {})


@pytest.mark.parametrize(
    ("number", "text"),
    [
        ("1e400", "1" + 400 * "0"),  # beyond a float
        ("-2.5e309", "-25" + 308 * "0"),
        ("1e-400", "0." + 399 * "0" + "1"),  # below it
        ("0e0", "0"),
        ("0.1", "0.1"),
        ("9" * 5000, "9" * 5000),  # more digits than Python converts
        ("1e999999999", "1e999999999"),  # a gigabyte, written out
    ],
)
def test_numbers_keep_the_value_that_is_written(tmp_path, number, text):
    (tmp_path / "a.jsonl").write_text(f'{{"problem": "?", "answer": {number}}}\n')
    [(_, answer, _)] = read(tmp_path / "a.jsonl")
    assert answer == text


def test_half_a_character_is_named_by_its_row(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"problem": "\\ud83d\\ude00"}\n{"problem": "so \\ud83d?"}\n')
    with pytest.raises(
        ValueError, match=r"a\.jsonl, row 1: the problem holds '\\ud83d' at place 3, which is half of a"
    ):
        load_examples(str(tmp_path / "a.jsonl"), {})


# ---- Several files -------------------------------------------------------------------------------------------------


def write(path: Path, *problems: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        datasets.Dataset.from_list([{"problem": problem} for problem in problems]).to_parquet(path)
    else:
        path.write_text("".join(json.dumps({"problem": problem}) + "\n" for problem in problems))


def problems(spec: object) -> list[str]:
    return [problem for problem, _, _ in read(spec)]


def test_a_pattern_names_files_in_the_order_of_their_numbers(tmp_path, monkeypatch):
    for number in (10, 9, 1):
        write(tmp_path / "me@home" / f"part-{number}.jsonl", f"{number}a", f"{number}b")
    (tmp_path / "me@home" / "part-2.txt").write_text("no data")
    assert problems(tmp_path / "me@home" / "part-*") == ["1a", "1b", "9a", "9b", "10a", "10b"]
    assert problems(tmp_path / "**" / "part-1?.jsonl") == ["10a", "10b"]
    monkeypatch.chdir(tmp_path)
    assert [example.index for example in load_examples("*/part-[19].jsonl", {})] == [0, 1, 2, 3]
    write(tmp_path / "odd[1].jsonl", "a file's own name")
    assert problems("odd[1].jsonl") == ["a file's own name"]
    with pytest.raises(FileNotFoundError, match=r"no data file matches none\*\.json; .*each is a \.json"):
        load_examples("none*.json", {})
    with pytest.raises(ValueError, match="names files, without splits; got @test"):
        load_examples("me@home/part-*.jsonl@test", {})


def test_a_downloaded_dataset_has_its_splits(tmp_path):
    folder = tmp_path / "snapshot"
    write(folder / "data" / "train-00001-of-00002-0f9ab3c4d5e6f708.parquet", "c")
    write(folder / "data" / "train-00000-of-00002-a1b2c3d4e5f60718.parquet", "a", "b")
    write(folder / "data" / "test-00000-of-00001.parquet", "d")
    (folder / "README.md").write_text("---\n---\n")
    (folder / "dataset_infos.json").write_text("{}")
    write(folder / ".cache" / "huggingface" / "train.jsonl", "not this")
    assert problems(folder) == ["a", "b", "c"]
    assert problems(f"{folder}@test") == ["d"]
    with pytest.raises(ValueError, match=r"has no split 'dev'; there are test, train; name one as .*@test"):
        load_examples(f"{folder}@dev", {})


@pytest.mark.parametrize(
    ("names", "split", "expected"),
    [
        (["part-2.jsonl", "part-10.jsonl", "part-0.jsonl"], "", ["part-0", "part-2", "part-10"]),
        (["train/0.jsonl", "train/1.jsonl", "dev/0.jsonl"], "@validation", ["dev/0"]),
        (["gsm8k_train.jsonl", "gsm8k_test.jsonl"], "@test", ["gsm8k_test"]),
        (["anything.jsonl"], "", ["anything"]),
        (["part-0-0b1c2d3e-0000-4aaa-8bbb-0123456789ab-c000.jsonl"] * 1, "@train", ["part-0-0b1c2d3e"]),
    ],
)
def test_a_folder_of_files_of_one_set(tmp_path, names, split, expected):
    for name in names:
        write(tmp_path / "set" / name, name)
    assert [
        found.startswith(start) for found, start in zip(problems(f"{tmp_path / 'set'}{split}"), expected, strict=True)
    ]
    assert sort_files([Path("a10"), Path("a9")]) == [Path("a9"), Path("a10")]


@pytest.mark.parametrize(
    "names",
    [
        ["main/train-00000-of-00001.parquet", "socratic/train-00000-of-00001.parquet"],
        ["aime.jsonl", "math.jsonl"],
        ["gsm8k_train.jsonl", "math_train.jsonl"],
        ["train.jsonl", "train.parquet"],  # the same rows twice, as likely as not
    ],
)
def test_a_folder_of_several_sets_is_refused(tmp_path, names):
    for name in names:
        write(tmp_path / "sets" / name, name)
    with pytest.raises(
        ValueError, match=r"sets holds files of several data sets \(.*\); name one of its files or fold"
    ):
        load_examples(str(tmp_path / "sets"), {})


def test_a_folder_without_data_says_so(tmp_path):
    (tmp_path / "notes.txt").write_text("")
    assert split_files(tmp_path) == {}
    with pytest.raises(ValueError, match=r"holds no data: neither what save_to_disk writes, nor a \.json"):
        load_examples(str(tmp_path), {})


def test_compressed_files_are_sets_of_a_suite(tmp_path):
    (tmp_path / "amc.jsonl.gz").write_bytes(gzip.compress(LINES.encode()))
    (tmp_path / "math.csv").write_text(TABLE)
    assert list(suite_sets(str(tmp_path))) == ["amc", "math"]
    assert suffix_of(Path("a.tar.gz")) is suffix_of(Path("a")) is suffix_of(Path("a.parquet.gz")) is None
