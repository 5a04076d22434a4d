"""verl's own trainer and rollout worker on the CPU, with stand-ins for what needs a GPU or a cluster.

Real are the configuration (composed by Hydra from verl's files), PPOTrainer, the worker, the agent loop, DataProto,
TensorDict and every computation. Stand-ins: the queue is a dict instead of TransferQueue, the LLM server answers from a
list, and the reward worker is a function.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_module
from omegaconf import DictConfig
from paths import ROOT
from verl.utils import tensordict_utils as tu
from verl.utils.tensordict_utils import list_of_dict_to_tensordict
from verl.workers.rollout.replica import TokenOutput

TINY = ROOT / "python" / "edge_grpo" / "tiny"
OVERRIDES = (
    "actor_rollout_ref.rollout.name=vllm",
    f"actor_rollout_ref.model.path={TINY}",
    "actor_rollout_ref.rollout.n=4",
    "algorithm.adv_estimator=grpo",
    "data.max_prompt_length=64",
    "data.max_response_length=96",  # first attempts: 32
    "trainer.v1.trainer_mode=edge_sync",
    "+edge.correction.max_length=64",
)


def compose_config(*overrides: str) -> DictConfig:
    with initialize_config_module("verl.trainer.config", version_base=None):
        return compose("ppo_trainer", [*OVERRIDES, *overrides])


def environment(tmp_path: Path) -> dict[str, str]:
    """The variables of a process that sees this package as pip would have installed it, if only by its metadata."""
    tomllib = pytest.importorskip("tomllib", reason="in the standard library from Python 3.11 on")
    table = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["entry-points"]
    info = tmp_path / "edge_grpo_here-0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: edge-grpo-here\nVersion: 0\n")
    lines = [f"{name} = {target}" for name, target in table["verl.plugins"].items()]
    (info / "entry_points.txt").write_text("\n".join(["[verl.plugins]", *lines, ""]))
    places = [str(tmp_path), str(ROOT), str(ROOT / "python"), *sys.path]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(places), "PYTHONWARNINGS": "default"}


class Queue:
    """TransferQueue's key-value interface over a dict of rows, without a cluster."""

    def __init__(self) -> None:
        self.rows: dict[str, dict[str, Any]] = {}
        self.tags: dict[str, dict[str, Any]] = {}

    def init(self, *args: Any) -> None:
        pass

    def kv_batch_put(self, keys: list[str], partition_id: str, fields: Any = None, tags: Any = None) -> Any:
        for place, key in enumerate(keys):
            if fields is not None:
                row = {name: tu.get(fields, name)[place] for name in fields.keys()}  # noqa: SIM118
                self.rows.setdefault(key, {}).update(row)
            if tags is not None:
                self.tags.setdefault(key, {}).update(tags[place])
        return self.batch(keys, partition_id)

    def kv_batch_get(self, keys: list[str], partition_id: str, select_fields: list[str]) -> Any:
        names = [name for name in select_fields if all(name in self.rows[key] for key in keys)]
        return list_of_dict_to_tensordict([{name: self.rows[key][name] for name in names} for key in keys])

    async def async_kv_put(self, key: str, partition_id: str, tag: dict[str, Any]) -> None:
        self.tags.setdefault(key, {}).update(tag)

    async def async_kv_batch_put(self, **arguments: Any) -> None:
        self.kv_batch_put(**arguments)

    def batch(self, keys: list[str], partition_id: str = "train") -> Any:
        tags = [self.tags.get(key, {}) for key in keys]
        return Batch(keys, tags, partition_id)


class Batch(SimpleNamespace):
    """What a trainer reads of TransferQueue's KVBatchMeta."""

    def __init__(self, keys: list[str], tags: list[dict[str, Any]], partition_id: str) -> None:
        super().__init__(keys=keys, tags=tags, partition_id=partition_id, extra_info={})

    def __len__(self) -> int:
        return len(self.keys)


class Server:
    """An LLM server that answers by ``answer``, given the prompt's ids; it keeps what it was asked."""

    def __init__(self, answer: Callable[[list[int]], list[int]]) -> None:
        self.answer = answer
        self.asked: list[tuple[list[int], dict[str, Any]]] = []

    async def generate(
        self, request_id: str, *, prompt_ids: list[int], sampling_params: dict[str, Any], **options: Any
    ) -> TokenOutput:
        self.asked.append((list(prompt_ids), dict(sampling_params)))
        ids = self.answer(prompt_ids)[: sampling_params["max_tokens"]]
        steps = {"global_steps": 1, "min_global_steps": 1, "max_global_steps": 1}
        return TokenOutput(token_ids=ids, log_probs=[-0.5] * len(ids), stop_reason="completed", extra_fields=steps)


class RewardWorker:
    """An actor handle whose ``compute_score`` is a function of the response's ids."""

    def __init__(self, score: Callable[[list[int]], float]) -> None:
        self.judged: list[list[int]] = []
        self.score = score
        self.compute_score = SimpleNamespace(remote=self._compute_score)

    async def _compute_score(self, data: Any) -> dict[str, Any]:
        assert data.non_tensor_batch["reward_model"][0]["ground_truth"]  # the columns of the dataset arrive
        length = int(data.non_tensor_batch["response_len"][-1])
        ids = data.batch["responses"][-1, :length].tolist()
        self.judged.append(ids)
        score = self.score(ids)
        return {"reward_score": score, "reward_extra_info": {"acc": score > 0.5, "score": score}}


def nested(rows: list[torch.Tensor]) -> torch.Tensor:
    return torch.nested.as_nested_tensor(rows, layout=torch.jagged)
