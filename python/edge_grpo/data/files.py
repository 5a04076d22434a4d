"""Rows out of files: the formats, compressions and encodings that are read, and the splits of a folder's files.

Which file a name means is decided in ``sources``; what a row's columns mean, in ``rows``.
"""

from __future__ import annotations

import bz2
import codecs
import csv
import gzip
import io
import json
import lzma
import math
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any

Rows = list[Mapping[str, Any]]

SUFFIXES = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet")
FORMATS = "a .json, .jsonl, .csv, .tsv or .parquet file (text may be compressed: .gz, .bz2, .xz)"
_COMPRESSIONS = {".gz": gzip.decompress, ".bz2": bz2.decompress, ".xz": lzma.decompress}
# The four bytes of UTF-32 begin with the two of UTF-16.
_MARKS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
_SPLITS = {
    "train": ("train", "training"),
    "test": ("test", "testing", "eval", "evaluation"),
    "validation": ("validation", "valid", "val", "dev"),
}
_SPLIT_OF = {word: split for split, words in _SPLITS.items() for word in words}
# What datasets writes beside the data.
_DESCRIPTIONS = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
_LONGEST_INTEGER = 4000  # digits: Python refuses to convert a few more
_LARGEST_EXPONENT = 5000


def suffix_of(path: Path) -> str | None:
    """Return the suffix that says how a file is read, without that of its compression; None where nothing reads it."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in _COMPRESSIONS:
        suffixes.pop()
        return suffixes[-1] if suffixes and suffixes[-1] in SUFFIXES and suffixes[-1] != ".parquet" else None
    return suffixes[-1] if suffixes and suffixes[-1] in SUFFIXES else None


def stem_of(path: Path) -> str:
    """Return a data file's name without its suffixes."""
    name = path.stem if path.suffix.lower() in _COMPRESSIONS else path.name
    return Path(name).stem


def read_files(paths: Sequence[Path]) -> Rows:
    """Return the rows of all files, in order. Raises ValueError naming the file, and the line where there are lines."""
    return [row for path in paths for row in _read(path)]


def split_files(folder: Path) -> dict[str, list[Path]]:
    """Return the data files in a folder and below it by split: train, test and validation, as file names say.

    A file whose path has none of these words, nor a usual other word for one, is part of "train". Files that belong
    together have names that differ only in split, numbers and hashes; a folder with others is refused, since it holds
    several sets of data.
    """
    files = [
        path
        for path in folder.rglob("*")
        if suffix_of(path) and path.is_file() and path.name not in _DESCRIPTIONS and not _is_hidden(path, folder)
    ]
    splits: dict[str, list[Path]] = {}
    sets: dict[tuple[str, ...], Path] = {}
    for path in sorted(files, key=_natural_order):
        relative = path.relative_to(folder)
        words = re.findall(r"[a-z0-9]+", " ".join([*relative.parts[:-1], stem_of(path)]).lower())
        named = [word for word in words if word in _SPLIT_OF]
        splits.setdefault(_SPLIT_OF[named[-1]] if named else "train", []).append(path)
        name = [word for word in words if word not in _SPLIT_OF and not _is_number(word)]
        sets.setdefault((*name, suffix_of(path) or ""), relative)
    if len(sets) > 1:
        names = ", ".join(map(str, list(sets.values())[:4])) + (", ..." if len(sets) > 4 else "")
        raise ValueError(
            f"the folder {folder} holds files of several data sets ({names}); name one of its files or folders, or "
            f"several files by a pattern such as {folder}/*{next(iter(sets))[-1]}"
        )
    return splits


def _is_hidden(path: Path, folder: Path) -> bool:
    return any(part.startswith((".", "_")) for part in path.relative_to(folder).parts)


def _is_number(word: str) -> bool:
    """Whether a word of a file's name is a number, a hash, or the "of" of "00000-of-00002"."""
    return word == "of" or word.isdigit() or bool(re.fullmatch(r"(?=.*\d)[0-9a-f]{4,}", word))


def _natural_order(path: Path) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", str(path))]


def sort_files(paths: Sequence[Path]) -> list[Path]:
    """Return files in the order of their names, numbers by value: part-2 before part-10."""
    return sorted(paths, key=_natural_order)


def _read(path: Path) -> Rows:
    suffix = suffix_of(path)
    if suffix == ".parquet":
        return _read_parquet(path)
    text = _read_text(path)
    if suffix in (".csv", ".tsv"):
        return list(_read_table(path, text, "\t" if suffix == ".tsv" else ","))
    return _read_json(path, text, is_lines=suffix != ".json")


def _read_text(path: Path) -> str:
    expand = _COMPRESSIONS.get(path.suffix.lower())
    data = path.read_bytes()
    try:
        if expand is not None:
            data = expand(data)
    except (EOFError, OSError, ValueError, lzma.LZMAError, zlib.error) as error:
        raise ValueError(f"{path} is not a whole {path.suffix} file: {error}; fetch it again") from error
    encoding = next((name for mark, name in _MARKS.items() if data.startswith(mark)), "utf-8")
    if encoding.startswith("utf-8") and (zero := data.find(b"\0")) >= 0:
        line = data.count(b"\n", 0, zero) + 1
        raise ValueError(
            f"{path}, line {line} holds a zero byte, as UTF-16 without its byte order mark does; convert the file, "
            "from UTF-16 with: iconv -f UTF-16LE -t UTF-8"
        )
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        if not encoding.startswith("utf-8"):
            raise ValueError(
                f"{path} begins as {encoding.upper()} and is none: {error.reason}; save it anew"
            ) from error
        line = data.count(b"\n", 0, error.start) + 1
        byte = data[error.start]
        raise ValueError(
            f"{path}, line {line} is not UTF-8: byte 0x{byte:02x}, which is {chr(byte)!r} in Latin-1; convert the "
            f"file, from Latin-1 with: iconv -f LATIN1 -t UTF-8"
        ) from error


# ---- JSON ----------------------------------------------------------------------------------------------------------


def _integer(text: str) -> int | Decimal:
    return int(text) if len(text) <= _LONGEST_INTEGER else Decimal(text)


def _real(text: str) -> float | Decimal | str:
    """A number with a point or an exponent; as it is written where a float has no room for it (1e400, 1e-400)."""
    value = float(text)
    if math.isfinite(value) and (value or not re.search("[1-9]", text.lower().partition("e")[0])):
        return value
    try:
        exact = Decimal(text)
    except InvalidOperation:
        return text
    return exact if exact.is_finite() and abs(exact.adjusted()) <= _LARGEST_EXPONENT else text


def _loads(text: str) -> Any:
    try:
        return json.loads(text, parse_float=_real, parse_int=_integer)
    except RecursionError:
        raise json.JSONDecodeError("too many brackets within each other", text, 0) from None


def _read_json(path: Path, text: str, *, is_lines: bool) -> Rows:
    try:
        rows = _loads(text)
    except json.JSONDecodeError as error:
        if not is_lines and error.msg != "Extra data":
            raise ValueError(f"{path} is not JSON: {error}") from error
        return list(_read_json_lines(path, text))
    if isinstance(rows, dict):  # {"data": [...]}, or a file of one line
        lists = [value for value in rows.values() if isinstance(value, list) and value and isinstance(value[0], dict)]
        rows = lists[0] if len(rows) == len(lists) == 1 and not _is_conversation(lists[0]) else [rows]
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{path} must hold a list of objects, or one object a line")
    return rows


def _is_conversation(value: list[Mapping[str, Any]]) -> bool:
    return all("role" in item and "content" in item for item in value)


def _read_json_lines(path: Path, text: str) -> Iterator[Mapping[str, Any]]:
    for number, line in enumerate(text.split("\n"), start=1):  # not splitlines: JSON may hold other line separators
        if line.strip():
            try:
                row = _loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}, line {number} is not JSON: {error}") from error
            if not isinstance(row, dict):
                raise ValueError(f"{path}, line {number} must be an object; got {type(row).__name__}")
            yield row


# ---- Tables --------------------------------------------------------------------------------------------------------


def _read_table(path: Path, text: str, delimiter: str) -> Iterator[Mapping[str, Any]]:
    """The rows of a table whose first line names the columns; a .csv may separate them by semicolons."""
    header = text[: text.find("\n")] if "\n" in text else text
    if delimiter == "," and "," not in header and ";" in header:
        delimiter = ";"
    csv.field_size_limit(2**31 - 1)  # the default of 128 KiB is less than a long solution
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    names: list[str] = []
    try:
        for cells in reader:
            if not cells:
                continue
            if not names:
                names = [name.strip() for name in cells]
                if len(set(names)) < len(names) or "" in names:
                    raise ValueError(
                        f"{path}, line {reader.line_num} must name each column once; got {', '.join(map(repr, names))}"
                    )
            elif len(cells) != len(names):
                raise ValueError(
                    f"{path}, line {reader.line_num} must have a value for each of {len(names)} columns; got "
                    f"{len(cells)}; put values that hold a {delimiter!r} or a line end in quotes"
                )
            else:
                yield dict(zip(names, cells, strict=True))
    except csv.Error as error:
        raise ValueError(f"{path}, line {reader.line_num} is not a table's: {error}") from error


def _read_parquet(path: Path) -> Rows:
    import pyarrow
    import pyarrow.parquet

    try:
        rows: Rows = pyarrow.parquet.ParquetFile(path).read().to_pylist()
    except pyarrow.ArrowException as error:
        raise ValueError(f"{path} is not a whole .parquet file: {' '.join(str(error).split())}; fetch it") from error
    return rows
