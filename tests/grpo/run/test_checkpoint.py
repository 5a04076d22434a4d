"""Checkpoints appear whole or not at all, old ones go, damaged ones are named, and none can run code."""

from __future__ import annotations

import errno
import json
import os
import pickle
import random
import resource

import numpy as np
import pytest
import torch
import yaml
from accelerate import Accelerator

from edge_grpo.config import RolloutConfig, TrainConfig, to_dict
from edge_grpo.run import checkpoint


@pytest.fixture
def prepared():
    accelerator = Accelerator(cpu=True)
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model, optimizer = accelerator.prepare(model, optimizer)
    return accelerator, model, optimizer


def train_once(model, optimizer):
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def test_a_loaded_checkpoint_continues_like_the_saved_run(tmp_path, prepared):
    accelerator, model, optimizer = prepared
    train_once(model, optimizer)
    checkpoint.save(accelerator, tmp_path, 1, model, optimizer, keep=2)
    train_once(model, optimizer)
    expected = model.weight.detach().clone()
    train_once(model, optimizer)  # away from it
    assert checkpoint.load_latest(accelerator, tmp_path, model, optimizer).step == 1
    train_once(model, optimizer)
    assert torch.equal(model.weight, expected)


def test_only_the_newest_are_kept(tmp_path, prepared):
    accelerator, model, optimizer = prepared
    for step in (1, 2, 3):
        checkpoint.save(accelerator, tmp_path, step, model, optimizer, keep=2)
    assert checkpoint.steps(tmp_path) == [2, 3]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000002", "step-000003"]


def test_what_was_collected_for_the_next_step_is_kept_and_checked(tmp_path, prepared):
    accelerator, model, optimizer = prepared
    checkpoint.save(accelerator, tmp_path, 1, model, optimizer, keep=2)
    assert checkpoint.load_rollouts(tmp_path, checkpoint.load_latest(accelerator, tmp_path, model, optimizer)) == []
    checkpoint.save(accelerator, tmp_path, 2, model, optimizer, keep=2, rollout={"samples": [1, 2]})
    record = checkpoint.load_latest(accelerator, tmp_path, model, optimizer)
    assert checkpoint.load_rollouts(tmp_path, record) == [{"samples": [1, 2]}]
    saved = tmp_path / "step-000002" / "rollout_0.json"
    saved.write_text(saved.read_text().replace("1", "3"))
    with pytest.raises(checkpoint.state.UnreadableError, match=r"rollout_0\.json.*its content has changed"):
        checkpoint.load_latest(accelerator, tmp_path, model, optimizer)


def test_an_unfinished_checkpoint_is_never_loaded(tmp_path, prepared, monkeypatch):
    accelerator, model, optimizer = prepared
    checkpoint.save(accelerator, tmp_path, 1, model, optimizer, keep=2)

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(checkpoint.os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        checkpoint.save(accelerator, tmp_path, 2, model, optimizer, keep=2)
    assert checkpoint.steps(tmp_path) == [1]
    assert checkpoint.load_latest(accelerator, tmp_path, model, optimizer).step == 1
    monkeypatch.undo()
    checkpoint.save(accelerator, tmp_path, 2, model, optimizer, keep=2)  # what was left half-written is no obstacle
    assert checkpoint.steps(tmp_path) == [1, 2]


@pytest.fixture
def small_disk():
    """No file may have more than 10 kB: the operating system refuses as on a full disk, with another number."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_keeps_the_older_checkpoint_and_no_half_of_a_new_one(tmp_path, prepared, small_disk):
    accelerator, model, optimizer = prepared
    with pytest.raises(OSError, match="File too large"):  # the random state alone has 30 kB
        checkpoint.save(accelerator, tmp_path, 2, model, optimizer, keep=2)
    assert not list(tmp_path.iterdir())


def test_a_full_disk_as_safetensors_has_it(tmp_path, prepared, small_disk, monkeypatch):
    accelerator, _, optimizer = prepared
    monkeypatch.setattr(checkpoint.state, "write_random_state", lambda *_: None)
    with pytest.raises(OSError, match="File too large") as caught:
        checkpoint.save(accelerator, tmp_path, 2, torch.nn.Linear(100, 100), optimizer, keep=2)
    assert caught.value.errno == errno.EFBIG
    assert not list(tmp_path.iterdir())


def test_nothing_to_resume_is_said(tmp_path, prepared):
    accelerator, model, optimizer = prepared
    with pytest.raises(FileNotFoundError, match="nothing to resume"):
        checkpoint.load_latest(accelerator, tmp_path / "absent", model, optimizer)


def test_random_states_are_restored(tmp_path, prepared):
    accelerator, model, optimizer = prepared
    random.gauss(0, 1)  # half of a pair is kept for the next call
    checkpoint.save(accelerator, tmp_path, 1, model, optimizer, keep=2)

    def draw():
        return random.gauss(0, 1), random.random(), np.random.rand(), float(torch.rand(1))  # noqa: NPY002

    expected = draw()
    checkpoint.load_latest(accelerator, tmp_path, model, optimizer)
    assert draw() == expected


# ---- Files that do not hold what was written -------------------------------------------------------------------------

FILES = ("model.safetensors", "optimizer.safetensors", "random_state_0.json", "trainer_state.json")


class Payload:
    """Makes a folder when it is unpickled."""

    def __init__(self, mark):
        self.mark = str(mark)

    def __reduce__(self):
        return os.mkdir, (self.mark,)


def save_twice(folder, prepared):
    accelerator, model, optimizer = prepared
    for step in (1, 2):
        train_once(model, optimizer)
        checkpoint.save(accelerator, folder, step, model, optimizer, keep=2)
    assert sorted(path.name for path in (folder / "step-000002").iterdir()) == sorted(FILES)
    return folder / "step-000002"


def write_pickle(path, mark):
    path.write_bytes(pickle.dumps(Payload(mark)))


def write_torch_archive(path, mark):
    torch.save(Payload(mark), path)


@pytest.mark.parametrize("hashed", [False, True], ids=["found by its hash", "with a fitting hash"])
@pytest.mark.parametrize("plant", [write_pickle, write_torch_archive])
@pytest.mark.parametrize("name", FILES)
def test_a_planted_pickle_is_named_and_does_not_run(tmp_path, prepared, name, plant, hashed):
    newest = save_twice(tmp_path / "run", prepared)
    plant(newest / name, tmp_path / "ran")
    if hashed and name != "trainer_state.json":
        record = json.loads((newest / "trainer_state.json").read_text())
        record["sha256"][name] = checkpoint._sha256(newest / name)
        (newest / "trainer_state.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match=rf"step-000002/{name} cannot be read") as caught:
        checkpoint.load_latest(prepared[0], tmp_path / "run", *prepared[1:])
    assert str(caught.value).endswith(f"delete {newest} to resume from step 1")
    assert not (tmp_path / "ran").exists()


def test_files_beside_those_of_a_checkpoint_are_not_read(tmp_path, prepared):
    newest = save_twice(tmp_path / "run", prepared)
    for name in ("custom_checkpoint_0.pkl", "random_states_0.pkl", "optimizer.bin", "pytorch_model.bin"):
        write_pickle(newest / name, tmp_path / "ran")
    assert checkpoint.load_latest(prepared[0], tmp_path / "run", *prepared[1:]).step == 2
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", FILES[:3])
def test_a_flipped_bit_is_found(tmp_path, prepared, name):
    newest = save_twice(tmp_path / "run", prepared)
    content = bytearray((newest / name).read_bytes())
    content[-3] ^= 1
    (newest / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"{name} cannot be read \(ValueError: its content has changed"):
        checkpoint.load_latest(prepared[0], tmp_path / "run", *prepared[1:])
    checkpoint.shutil.rmtree(newest)  # as the message says
    assert checkpoint.load_latest(prepared[0], tmp_path / "run", *prepared[1:]).step == 1


@pytest.mark.parametrize("name", FILES[:3])
def test_a_missing_file_is_named(tmp_path, prepared, name):
    newest = save_twice(tmp_path / "run", prepared)
    (newest / name).unlink()
    with pytest.raises(ValueError, match=rf"step-000002/{name} cannot be read \(FileNotFoundError"):
        checkpoint.load_latest(prepared[0], tmp_path / "run", *prepared[1:])


def test_another_models_optimizer_is_refused(tmp_path, prepared):
    accelerator, model, optimizer = prepared
    train_once(model, optimizer)
    other = torch.nn.Linear(4, 2)
    optimizer_of_other = torch.optim.AdamW(other.parameters())
    train_step = other(torch.ones(1, 4)).sum()
    train_step.backward()
    optimizer_of_other.step()
    checkpoint.save(accelerator, tmp_path, 1, model, optimizer_of_other, keep=2)
    with pytest.raises(
        ValueError, match=r"optimizer\.safetensors cannot be read .* belongs to another optimizer or model"
    ):
        checkpoint.load_latest(accelerator, tmp_path, model, optimizer)


def test_a_run_from_before_a_key_existed_is_the_same_run_at_its_default(tmp_path):
    tree = to_dict(TrainConfig())
    del tree["rollout"]["resample"]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tree))
    checkpoint.check_same_run(tmp_path, TrainConfig())
    with pytest.raises(ValueError, match=r"rollout\.resample was 0, is 2; resume with"):
        checkpoint.check_same_run(tmp_path, TrainConfig(rollout=RolloutConfig(resample=2)))


def test_a_resumed_run_may_share_engines_otherwise(tmp_path):
    """As other processes may have to; vLLM's other arguments stay."""
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(to_dict(TrainConfig())))
    checkpoint.check_same_run(tmp_path, TrainConfig(rollout=RolloutConfig(vllm={"tensor_parallel_size": 2})))
    vllm = {"tensor_parallel_size": 2, "dtype": "bfloat16"}
    with pytest.raises(ValueError, match=r"rollout\.vllm was {}, is {'dtype': 'bfloat16'}; resume with"):
        checkpoint.check_same_run(tmp_path, TrainConfig(rollout=RolloutConfig(vllm=vllm)))
