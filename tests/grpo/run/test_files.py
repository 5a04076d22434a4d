"""Files appear whole or not at all."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import pytest

from edge_grpo.run.files import check_writable, finite, write_json, write_text


def test_a_file_replaces_another_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "file.txt"
    write_text(path, "old é\n")
    write_text(path, "new\n")
    assert path.read_text(encoding="utf-8") == "new\n"
    assert list(path.parent.iterdir()) == [path]


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file.txt"
    write_text(path, "old")

    def full(self: Path, *_: object, **__: object) -> int:
        with self.open("w") as file:
            file.write("ne")
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        with pytest.raises(OSError, match="no space left"):
            write_text(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_links_and_pipes_are_written_to(tmp_path: Path) -> None:
    """``--json /dev/stdout``: a rename would put a file in the place of the device."""
    file, link = tmp_path / "file", tmp_path / "link"
    link.symlink_to(file)
    write_text(link, "through")
    assert link.is_symlink()
    assert file.read_text() == "through"
    reading, writing = os.pipe()
    write_text(Path(f"/dev/fd/{writing}"), "x")
    assert os.read(reading, 9) == b"x"
    os.close(reading)
    os.close(writing)


def test_json_has_no_nan(tmp_path: Path) -> None:
    path = tmp_path / "tree.json"
    write_json(path, {"é": [1.5, finite(math.nan), finite(-math.inf), finite(2.0)]})
    assert json.loads(path.read_text(encoding="utf-8")) == {"é": [1.5, None, None, 2.0]}
    assert "é" in path.read_text(encoding="utf-8")
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(path, [math.nan])
    assert json.loads(path.read_text(encoding="utf-8"))["é"][0] == 1.5


def test_a_folder_that_cannot_be_made_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(ValueError, match=r"new/file cannot be written: its folder cannot be made: Permission denied"):
        write_text(tmp_path / "new" / "file", "")


def test_where_a_file_can_be_written_nothing_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_writable(tmp_path / "new" / "folder" / "file")
    check_writable(Path("/dev/null"))
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr("os.access", lambda *_: False)
    with pytest.raises(ValueError, match=f"file cannot be written: no permission to write to {tmp_path};"):
        check_writable(tmp_path / "file")
