"""Files of a run or a result that appear whole or not at all, and JSON as they hold it.

Folders that appear whole are ``checkpoint``'s; logs, which grow line by line, are ``log``'s.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from pathlib import Path
from typing import Any


def partial_of(target: Path) -> Path:
    """Return the path beside ``target`` at which it is written before it is renamed."""
    return target.with_name(f".partial-{target.name}")


def check_writable(path: Path) -> None:
    """Raise ValueError for a file that cannot be written, before hours of work for it; nothing is made."""
    place = path if path.exists() else path.absolute().parent
    while not place.exists():
        place = place.parent
    if path.is_dir():
        reason = "it is a folder"
    elif place != path and not place.is_dir():
        reason = f"{place} is no folder"
    elif not os.access(place, os.W_OK):
        reason = f"no permission to write to {place}"
    else:
        return
    raise ValueError(f"{path} cannot be written: {reason}; name another file")


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 file, as ``write_bytes`` does."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file, replacing an older one as a whole; folders are made as needed.

    Links, pipes and devices, such as /dev/stdout, are written to and not replaced. Raises ValueError for a folder that
    cannot be made, and OSError for what the machine refuses.
    """
    if path.is_symlink() or (path.exists() and not path.is_file()):
        path.write_bytes(content)
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{path} cannot be written: its folder cannot be made: {error.strerror}") from error
    partial = partial_of(path)
    try:
        partial.write_bytes(content)
        os.replace(partial, path)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise


def write_json(path: Path, tree: Any) -> None:
    """Write an indented JSON file, as ``write_text`` does. Raises ValueError for NaN and infinity (``finite``)."""
    write_text(path, json.dumps(tree, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def record_of(line: bytes) -> dict[str, Any] | None:
    """Return the record in a line of a run's JSONL files: an object with an integer step; None where there is none."""
    try:
        record = json.loads(line.decode())
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) and type(record.get("step")) is int else None


def finite(value: float) -> float | None:
    """Return the value, or None where it is NaN or infinite, which JSON does not have."""
    return value if math.isfinite(value) else None
