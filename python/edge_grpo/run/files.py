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


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 file, as ``write_bytes`` does."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file, replacing an older one as a whole; folders are made as needed.

    Links, pipes and devices, such as /dev/stdout, are written to and not replaced.
    """
    if path.is_symlink() or (path.exists() and not path.is_file()):
        path.write_bytes(content)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
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
