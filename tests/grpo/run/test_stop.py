"""Ctrl-C and SIGTERM: the step is finished, a checkpoint saved, and the resumed run is as if it had not stopped."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from accelerate import Accelerator
from training import records

from edge_grpo.commands import main as cli
from edge_grpo.config import EvalConfig, to_dict
from edge_grpo.run import checkpoint
from edge_grpo.run.stop import StopRequests
from edge_grpo.trainer import Trainer, train

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore:.*use_reentrant.*")]


@pytest.fixture(autouse=True)
def heard() -> Iterator[None]:
    """Tests in the background of a shell inherit that Ctrl-C is ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def send(number: int) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_is_noted_and_the_second_is_not_ours(number, capsys):
    received = []
    before = signal.signal(signal.SIGTERM, lambda *_: received.append("as before"))
    try:
        with StopRequests() as stop:
            assert stop.agreed(Accelerator(cpu=True)) == 0
            send(number)
            assert stop.agreed(Accelerator(cpu=True)) == number
            assert "after this step and stops; again stops at once" in capsys.readouterr().err
            send(signal.SIGTERM)
            assert received == ["as before"]
            with pytest.raises(KeyboardInterrupt):
                send(signal.SIGINT)
    finally:
        signal.signal(signal.SIGTERM, before)


def test_ignored_signals_stay_ignored_and_handlers_come_back():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with StopRequests() as stop:
            send(signal.SIGINT)
            assert stop.agreed(Accelerator(cpu=True)) == 0
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGINT, before)


def test_another_thread_trains_without_handlers():
    seen = []

    def enter() -> None:
        with StopRequests():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert seen == [signal.SIG_DFL]


@pytest.fixture
def interrupted(monkeypatch):
    """Return a function that makes a signal arrive in the middle of a step."""
    step_of = Trainer.step

    def interrupt(number: int, during: int) -> None:
        def step(self: Trainer, step: int):
            if step == during:
                monkeypatch.setattr(Trainer, "step", step_of)
                send(number)
            return step_of(self, step)

        monkeypatch.setattr(Trainer, "step", step)

    return interrupt


@pytest.mark.slow
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("during", [2, 3])
def test_a_stopped_run_goes_on_as_if_it_had_not_stopped(config, tmp_path, interrupted, capsys, number, status, during):
    """In a step after which an evaluation is due, and in the last one: what was left out is made up for."""
    config = replace(config, steps=3, eval=EvalConfig(data="arithmetic:1@test", size=4, every=2))
    train(replace(config, output=str(tmp_path / "whole")))
    interrupted(number, during)
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(to_dict(config)))
    assert cli.main(["train", "--config", str(file)]) == status
    run = tmp_path / "run"
    assert checkpoint.steps(run / "checkpoints") == [during]
    assert records(run)[-1]["step"] == during
    assert not (run / "final").exists()
    said = capsys.readouterr().err
    assert f"Interrupted: step {during} is saved; continue with\n  edge-grpo train --resume --output {run}\n" in said
    assert cli.main(said.splitlines()[-1].split()[1:]) == 0
    merged: dict[int, dict] = {}
    for record in records(run):
        merged.setdefault(record["step"], {}).update(record)
    for expected in records(tmp_path / "whole"):
        got = merged.pop(expected["step"])
        for key, value in expected.items():
            if not key.startswith(("time/", "throughput/", "memory/")):
                assert got[key] == value, (expected["step"], key)
    assert merged == {}
    assert (run / "final" / "model.safetensors").read_bytes() == (
        tmp_path / "whole" / "final" / "model.safetensors"
    ).read_bytes()


TWO_PROCESSES = """
import os, signal, sys
from pathlib import Path
from edge_grpo.config import load_config
from edge_grpo.run.stop import Stopped
from edge_grpo.trainer import Trainer, train

step_of = Trainer.step

def step(self, step):
    if step == 2 and self.accelerator.process_index == 1:
        os.kill(os.getpid(), signal.SIGTERM)
    return step_of(self, step)

Trainer.step = step
try:
    train(load_config(Path(sys.argv[1])))
except Stopped as stop:
    Path(f"{sys.argv[1]}.{os.environ['RANK']}").write_text(str(stop.status))
"""


@pytest.mark.slow
def test_all_processes_stop_when_one_is_told_to(config, tmp_path):
    file, script = tmp_path / "config.yaml", tmp_path / "two.py"
    file.write_text(yaml.safe_dump(to_dict(replace(config, steps=50))))
    script.write_text(TWO_PROCESSES)
    result = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script), str(file)],
        env=os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert [Path(f"{file}.{rank}").read_text() for rank in (0, 1)] == ["143", "143"]
    saved = tmp_path / "run" / "checkpoints" / "step-000002"
    assert {f"random_state_{rank}.json" for rank in (0, 1)} < {path.name for path in saved.iterdir()}
    assert len(records(tmp_path / "run")) == 2
    train(replace(config, steps=3), resume=True)  # by one process, which says so
    assert len(records(tmp_path / "run")) == 3
