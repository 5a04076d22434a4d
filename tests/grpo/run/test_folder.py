"""A run's folder belongs to one run at a time, and to the next one only when that is asked for."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from edge_grpo.run import folder
from edge_grpo.run.folder import claim, discard

HOLD = """
import sys, time
from pathlib import Path
from edge_grpo.run.folder import claim
with claim(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_claim_names_its_process_and_dies_with_it(tmp_path: Path) -> None:
    run = tmp_path / "runs" / "mine"
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(run)], stdout=subprocess.PIPE)
    assert holder.stdout is not None
    assert holder.stdout.readline() == b"held\n"
    for options in ({}, {"resume": True}, {"overwrite": True}):
        message = f"mine is in use by process {holder.pid} on {socket.gethostname()}; wait"
        with pytest.raises(FileExistsError, match=message), claim(run, **options):
            pass
    (run / "config.yaml").write_text("")
    with pytest.raises(FileExistsError, match=message), claim(run):  # not: overwrite it
        pass
    (run / "config.yaml").unlink()
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    holder.stdout.close()
    with claim(run):
        assert f"process {os.getpid()} on " in (run / ".lock").read_text()
    assert list(run.iterdir()) == []


def test_a_program_that_outlives_the_run_does_not_hold_its_folder(tmp_path: Path) -> None:
    with claim(tmp_path):
        outliving = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], close_fds=False)
    try:
        with claim(tmp_path):
            pass
    finally:
        outliving.kill()
        outliving.wait()


def test_a_lock_that_is_removed_while_another_waits_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between opening the file and locking it, the owner removes it and a third process makes a new one."""
    flock, others = folder.fcntl.flock, []

    def interrupted(descriptor: int, how: int) -> None:
        if not others:
            others.append(None)
            (tmp_path / ".lock").unlink()
            others.append(claim(tmp_path))
            others[1].__enter__()
        flock(descriptor, how)

    monkeypatch.setattr(folder.fcntl, "flock", interrupted)
    with pytest.raises(FileExistsError, match="in use by process"), claim(tmp_path):
        pass
    others[1].__exit__(None, None, None)


def test_other_processes_of_a_run_share_its_claim(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with claim(tmp_path):
        monkeypatch.setenv("RANK", "1")
        with claim(tmp_path):
            pass
        assert (tmp_path / ".lock").exists()


def test_a_run_that_does_not_begin_leaves_no_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such data"), claim(tmp_path / "run"):
        raise ValueError("no such data")
    assert not (tmp_path / "run").exists()


def test_a_link_in_place_of_the_lock_is_not_followed(tmp_path: Path) -> None:
    run, precious = tmp_path / "run", tmp_path / "precious"
    run.mkdir()
    precious.write_text("mine")
    (run / ".lock").symlink_to(precious)
    with pytest.raises(ValueError, match="cannot be written to"), claim(run, resume=True):
        pass
    assert precious.read_text() == "mine"


@pytest.mark.parametrize("name", ["metrics.jsonl", "config.yaml", "identity.json"])
@pytest.mark.parametrize("options", [{"resume": True}, {"overwrite": True}])
def test_a_link_in_place_of_a_file_of_a_run_is_not_written_through(tmp_path: Path, name: str, options: dict) -> None:
    """Somebody else's folder may hold one to any file of its user; a folder of checkpoints on another disk is fine."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "checkpoints").symlink_to(tmp_path / "elsewhere")
    with claim(tmp_path, **options):
        pass
    (tmp_path / name).symlink_to(tmp_path / "precious")
    with pytest.raises(ValueError, match=rf"{name} is a link, through which"), claim(tmp_path, **options):
        pass


def test_an_output_that_cannot_be_made_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(ValueError, match=r"file/run cannot be written to: Not a directory"),
        claim(tmp_path / "file/run"),
    ):
        pass


def test_discarding_leaves_what_no_run_wrote(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "step").write_text("")
    (tmp_path / "checkpoints").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "final").mkdir()
    (tmp_path / "final" / "model").write_text("")
    (tmp_path / ".replaced" / "final").mkdir(parents=True)  # of a process that was killed here
    discard(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["elsewhere", "notes.txt"]
    assert (tmp_path / "elsewhere" / "step").exists()
