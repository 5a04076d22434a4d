"""What test_failing_processes.py runs in two processes, of which one fails: the other must not wait for it.

``failing_processes.py pushes FOLDER`` sends weights by a stand-in of vLLM's NCCL transfer and through a folder,
``failing_processes.py checkpoints FOLDER`` saves and loads, ``failing_processes.py models FOLDER`` begins to train.
"""

from __future__ import annotations

import json
import os
import resource
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

os.environ["ACCELERATE_USE_CPU"] = "true"

import pytest
import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from forked import alone
from forked import together as on_processes
from processes import LORA, adapted
from safetensors.torch import load_file, save_file
from training import untied_model

from edge_grpo.config import DataConfig, ModelConfig, TrainConfig
from edge_grpo.policy.model import PolicyModel
from edge_grpo.policy.sharding import shard
from edge_grpo.rollout import wire
from edge_grpo.rollout.server import ServerEngine
from edge_grpo.run import checkpoint
from edge_grpo.trainer import Trainer
from edge_grpo.types import RolloutError


def rank() -> int:
    return PartialState().process_index


def placed(model: Any, sharding: str) -> PolicyModel:
    policy = PolicyModel(model)
    if sharding == "fsdp2":
        shard(policy, processes=2, device=torch.device("cpu"))
    return policy


# ---- Weights for servers ---------------------------------------------------------------------------------------------


class Server:
    """Takes weights by NCCL or from a folder, unless ``trouble`` says when not."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.trouble: str | None = None
        self.weights: dict[str, torch.Tensor] = {}
        self.version = ""

    def ask(self, path: str, body: Any = None) -> Any:
        if path == "/collective_rpc":
            if self.trouble:
                raise self.failure("does not take it")
            self.weights = load_file(Path(body["kwargs"]["weights_path"]) / "model.safetensors")
        if path == "/update_weight_version":
            self.version = body["new_version"]
        return {"data": [{"max_model_len": 4096}], "world_size": 1}

    def failure(self, what: str) -> RolloutError:
        return RolloutError(f"{self.url} {what}")


class ParamMeta(NamedTuple):
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]


class Transfer:
    """Calls what vLLM 0.32's NCCLTrainerWeightTransferEngine calls, in its order."""

    def __init__(self, info: SimpleNamespace, *, client: str, source: Any) -> None:
        self.server = next(server for server in SERVERS if server.url == client)
        self.source = source

    def send_weights(self) -> None:
        metadata = self.source.metadata()
        if self.server.trouble == "at once":
            raise ConnectionError("connection refused")
        got = {}
        for meta, (name, value) in zip(metadata, self.source, strict=True):
            assert meta == (name, value.dtype, tuple(value.shape))
            if self.server.trouble == "midway" and len(got) == 2:
                raise ConnectionError("connection lost")
            got[name] = value.clone()
        self.server.weights = got


SERVERS = [Server("http://127.0.0.1:1"), Server("http://127.0.0.1:2")]


def install_transfer() -> None:
    """Make NCCLChannel import the stand-in."""
    parts = ("vllm", "vllm.distributed", "vllm.distributed.weight_transfer")
    modules = {name: ModuleType(name) for name in (*parts, f"{parts[-1]}.nccl_engine")}
    vars(modules[parts[-1]]).update(
        HTTPVLLMWeightSyncClient=lambda url, timeout: url,
        ModuleSource=type("ModuleSource", (), {"__init__": lambda self, module: None}),
        ParamMeta=ParamMeta,
        WeightTransferTrainerFactory=SimpleNamespace(trainer_init=Transfer),
    )
    vars(modules[f"{parts[-1]}.nccl_engine"]).update(NCCLTrainerInitInfo=SimpleNamespace)
    sys.modules |= modules


def engine_of(policy: PolicyModel, servers: list[Server], folder: Path | None) -> ServerEngine:
    """An engine as it is before the first push. Its constructor refuses NCCL on a CPU."""
    engine: Any = ServerEngine.__new__(ServerEngine)
    engine._process, engine._channels, engine._max_length = PartialState(), [], 8
    engine._rollout = SimpleNamespace(server_folder=folder and str(folder), timeout=9.0)
    engine.servers = servers
    engine._prepare(policy.model)
    return engine  # type: ignore[no-any-return]


def push(lora: dict[str, Any], sharding: str, expected: dict[str, torch.Tensor], folder: Path) -> None:
    install_transfer()
    policy = placed(adapted(ModelConfig(lora=lora))[0], sharding)
    for servers in (SERVERS[:1], SERVERS):
        for engine in (engine_of(policy, servers, None), engine_of(policy, servers, folder)):
            by_nccl = engine._rollout.server_folder is None
            for failing in servers:
                for trouble in ("at once", "midway"):
                    check_arrival(engine, policy, expected)
                    failing.trouble = trouble
                    text = f"{failing.url} does not take it"
                    if by_nccl:
                        text = f"{failing.url} did not take the new weights by NCCL"
                    check_failure(partial(engine.update_weights, policy), 0, text)
                    failing.trouble = None
            check_arrival(engine, policy, expected)
            if not by_nccl:
                with pytest.MonkeyPatch.context() as patch:
                    if rank() == 0:  # has no memory for the copy
                        patch.setattr(torch.Tensor, "cpu", refuse)
                    check_failure(partial(engine.update_weights, policy), 0, "no room", error=OSError)
                check_arrival(engine, policy, expected)


def refuse(*_: Any, **__: Any) -> Any:
    raise OSError("no room")


def check_arrival(engine: ServerEngine, policy: PolicyModel, expected: dict[str, torch.Tensor]) -> None:
    engine.update_weights(policy)
    for server in engine.servers if rank() == 0 else ():
        assert server.version == engine._version  # type: ignore[attr-defined]
        weights = server.weights  # type: ignore[attr-defined]
        assert weights.keys() == expected.keys()
        for name, value in weights.items():
            torch.testing.assert_close(value, expected[name], rtol=1e-6, atol=1e-7)
        weights.clear()


def check_failure(work: Callable[[], object], where: int, text: str, *, error: type[Exception] = RolloutError) -> None:
    """``work`` fails on process ``where`` and so on both, which say why."""
    if rank() == where:
        with pytest.raises(error, match=text):
            work()
    else:
        with pytest.raises(RolloutError, match=f"process {where} of this run failed.*{text}"):
            work()


def pushes(folder: Path) -> None:
    for lora in ({}, LORA):
        expected = alone(
            lambda lora=lora: wire.host_weights(adapted(ModelConfig(lora=lora))[0], keep=True), folder / "weights.pt"
        )
        for sharding in ("none", "fsdp2"):
            on_processes(2, partial(push, lora, sharding, expected, folder))


# ---- Checkpoints -----------------------------------------------------------------------------------------------------


@contextmanager
def small_files(size: int, where: int) -> Iterator[None]:
    """Within it the operating system lets process ``where`` write files of up to ``size`` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    if rank() == where:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def save_and_fail(sharding: str, folder: Path) -> None:
    AcceleratorState._reset_state(reset_partial_state=False)
    accelerator = Accelerator()
    model, tokenizer = adapted(ModelConfig())
    policy = placed(model, sharding)
    optimizer = torch.optim.AdamW(policy.parameters())
    for value in policy.parameters():
        value.grad = torch.ones_like(value)
    optimizer.step()
    split = sharding == "fsdp2"

    def save(step: int) -> None:
        checkpoint.save(accelerator, folder, step, policy, optimizer, keep=2, split=split, rollout={"of": rank()})

    def save_model() -> None:
        checkpoint.save_model(accelerator, folder / "final", model, tokenizer)

    def check_only(*names: str) -> None:
        accelerator.wait_for_everyone()  # until all have cleaned up
        assert sorted(path.name for path in folder.iterdir()) == sorted(names)
        accelerator.wait_for_everyone()

    save(1)
    for where in (0, 1):
        with small_files(1_000, where):  # the random state alone has 30 kB
            check_failure(lambda: save(2), where, "File too large", error=OSError)
        check_only("step-000001")
        if split or where == 0:  # process 1 writes nothing larger else
            large = pytest.raises((OSError, RolloutError), match=r"File too large|os error 27")
            with small_files(100_000, where), large:
                save(2)
            check_only("step-000001")
    with pytest.MonkeyPatch.context() as patch:
        if rank() == 0:
            patch.setattr(checkpoint, "write_json", refuse)
        check_failure(lambda: save(2), 0, "no room", error=OSError)
    check_only("step-000001")
    with pytest.MonkeyPatch.context() as patch:
        listed = Path.iterdir
        if rank() == 1:  # sees the folder as it was before process 0 wrote into it
            patch.setattr(Path, "iterdir", lambda path: (one for one in listed(path) if not is_of_first(one.name)))
        save(2)
        record = json.loads((folder / "step-000002" / "trainer_state.json").read_text())
        names = {path.name for path in listed(folder / "step-000002")}
        assert record["sha256"].keys() == names - {"trainer_state.json"}
        assert checkpoint.load_latest(accelerator, folder, policy, optimizer).step == 2
        if split:
            assert {"shard-00001-model-00001-of-00001.safetensors", "rollout_0.json"} < names
    check_only("step-000001", "step-000002")
    with pytest.MonkeyPatch.context() as patch:
        if rank() == 1:
            patch.setattr(checkpoint.state, "read_random_state", refuse)
        check_failure(
            lambda: checkpoint.load_latest(accelerator, folder, policy, optimizer), 1, "no room", error=OSError
        )
    with small_files(100_000, 0):
        check_failure(
            lambda: checkpoint.save_model(accelerator, folder / "final", model, tokenizer), 0, "", error=OSError
        )
    check_only("step-000001", "step-000002")
    save_model()
    check_only("step-000001", "step-000002", "final")


def is_of_first(name: str) -> bool:
    return "_0." in name or name.startswith("shard-00001") or name in ("step-000002", "model.safetensors")


def checkpoints(folder: Path) -> None:
    for sharding in ("none", "fsdp2"):
        on_processes(2, partial(save_and_fail, sharding, folder / sharding))


# ---- Models ----------------------------------------------------------------------------------------------------------


def models(folder: Path) -> None:
    """The first process alone reads weights; it, or the other, cannot use what it finds."""
    whole, damaged = untied_model(folder / "whole"), untied_model(folder / "damaged")
    weights = load_file(damaged / "model.safetensors")
    weights["model.norm.weight"][3] = torch.nan
    save_file(weights, damaged / "model.safetensors", metadata={"format": "pt"})
    config = TrainConfig(data=DataConfig(train="arithmetic:1"), output=str(folder / "run"))

    def begin(paths: tuple[Path | str, Path | str], where: int, text: str) -> None:
        model = ModelConfig(path=str(paths[rank()]), sharding="fsdp2")
        check_failure(lambda: Trainer(replace(config, model=model)), where, text, error=ValueError)

    def begin_with_two() -> None:
        model = ModelConfig(path=(ModelConfig().path, str(whole))[rank()], sharding="fsdp2")
        with pytest.raises(ValueError, match=r"process 1 has another model than process 0 \(model\."):
            Trainer(replace(config, model=model))

    on_processes(2, partial(begin, (damaged, damaged), 0, "model.norm.weight are not finite"))
    on_processes(2, partial(begin, (whole, folder / "none"), 1, "is not a folder"))
    on_processes(2, begin_with_two)


if __name__ == "__main__":
    torch.set_num_threads(1)
    {"pushes": pushes, "checkpoints": checkpoints, "models": models}[sys.argv[1]](Path(sys.argv[2]))
