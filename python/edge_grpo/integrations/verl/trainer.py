"""verl's synchronous trainer with entropy-driven advantages: ``trainer.v1.trainer_mode=edge_sync``."""

from __future__ import annotations

from collections import Counter
from typing import Any, get_args

import numpy as np
import torch
from omegaconf import DictConfig
from tensordict import TensorDict
from torch import Tensor
from verl.trainer.ppo.v1 import PPOTrainerSync, register_trainer, trainer_base
from verl.workers.utils.padding import response_from_nested, response_to_nested

from edge_grpo.integrations.verl.settings import check_options, read_settings, route_rollouts
from edge_grpo.types import Correction
from edge_kernels import EDAConfig, response_entropy_weights
from edge_kernels.advantages import apply_weights

MODE = "edge_sync"


@register_trainer(MODE)
class EdgePPOTrainerSync(PPOTrainerSync):
    """PPOTrainerSync whose advantages are entropy-driven and whose rollouts are corrected, as ``config.edge`` says.

    With ``edge.eda`` and ``edge.gec`` false it is verl's. Every advantage estimator of verl works: what it returns is
    multiplied by the entropy weight of the response (arXiv:2507.21848, eqs. 6 and 7), over groups of the same ``uid``.
    """

    def __init__(self, config: DictConfig) -> None:
        self.edge = read_settings(config)
        check_options(config, self.edge)
        route_rollouts(config, self.edge)  # the task runner builds the rollouts from this object, later
        super().__init__(config)

    # verl compares the mode with "sync" by name; another one gets the buffer and checkpoints of asynchronous training.
    @property
    def trainer_mode(self) -> str:
        return "sync"

    @trainer_mode.setter
    def trainer_mode(self, name: str) -> None:
        pass

    def _compute_old_log_prob(self, batch: Any, metrics: dict[str, Any]) -> Any:
        batch = super()._compute_old_log_prob(batch, metrics)
        if self.edge.eda and (self.config.algorithm.get("rollout_correction") or {}).get("bypass_mode"):
            self._score_entropy(batch)
        return batch

    def _score_entropy(self, batch: Any) -> None:
        """Compute the entropy that verl leaves out where it takes the sampler's log-probabilities for the old ones."""
        temperature = self.config.actor_rollout_ref.rollout.temperature
        batch.extra_info.update(calculate_entropy=True, compute_loss=False, temperature=temperature)
        self.actor_rollout_wg.compute_log_prob(batch)
        data = _get(batch, ["entropy", "response_mask"])
        data["entropy"] = response_from_nested(data.pop("entropy"), data["response_mask"])
        _put(batch, data.select("entropy"))

    def _compute_advantage(self, batch: Any, metrics: dict[str, Any]) -> Any:
        batch = super()._compute_advantage(batch, metrics)
        real = torch.tensor([not tag.get("is_padding", False) for tag in batch.tags])
        if self.edge.gec:
            _count_corrections(batch, real, metrics)
        if not self.edge.eda:
            return batch
        data = _get(batch, ["uid", "response_mask", "entropy", "advantages"])
        nested_mask = data["response_mask"]
        padded = data.select("response_mask", "entropy", "advantages").to_padded_tensor()
        weights = batch_weights(
            padded["entropy"],
            padded["response_mask"].bool(),
            padded["advantages"],
            uids=list(data["uid"]),
            keys=batch.keys,
            config=self.edge.bounds,
        )
        scaled = apply_weights(padded["advantages"], weights.to(padded["advantages"].dtype)[:, None])
        fields = TensorDict({"advantages": response_to_nested(scaled, nested_mask)}, batch_size=len(batch))
        for name, value in (("min", "amin"), ("mean", "mean"), ("max", "amax")):
            metrics[f"eda/weight_{name}"] = getattr(weights[real], value)().item()
        return _put(batch, fields)


def batch_weights(
    entropy: Tensor,
    mask: Tensor,
    advantages: Tensor,
    *,
    uids: list[str],
    keys: list[str],
    config: EDAConfig,
) -> Tensor:
    """Return the entropy weight of every row of a batch, (B,); one for all rows of a response.

    entropy     (B, T), floating point, nats.
    mask        (B, T), bool: the tokens that are learned from.
    advantages  (B, T), floating point: verl's. ``preserve_scale`` looks at their mean over a response's tokens.
    uids        the group of each row, whole.
    keys        verl's, ``{uid}_{session}_{number}``: an agent loop may return a response in several rows.
    """
    sessions, rows = np.unique([key.rpartition("_")[0] for key in keys], return_inverse=True)
    of_row = torch.as_tensor(rows.reshape(-1))
    group_of = torch.as_tensor(np.unique(np.array([str(uid) for uid in uids]), return_inverse=True)[1].reshape(-1))
    groups = torch.zeros(len(sessions), dtype=torch.int64).index_put((of_row,), group_of)

    def total(values: Tensor) -> Tensor:  # (B, T) -> (responses,)
        per_row = values.masked_fill(~mask, 0).double().sum(-1)
        return torch.zeros(len(sessions), dtype=torch.float64).index_add(0, of_row, per_row)

    lengths = total(torch.ones_like(entropy))
    means = (total(entropy) / lengths.clamp(min=1)).masked_fill(lengths == 0, -torch.inf)
    of_response = total(advantages) / lengths.clamp(min=1)
    return response_entropy_weights(means, groups, config, advantages=of_response)[of_row]


def _count_corrections(batch: Any, real: Tensor, metrics: dict[str, Any]) -> None:
    """Add to the metrics what the agent loop says of its responses."""
    stored = _get(batch, ["extra_fields"])["extra_fields"]
    extras = [extra for extra, counts in zip(stored, real, strict=True) if counts and "edge_correction" in extra]
    kinds = Counter(extra["edge_correction"] for extra in extras)
    metrics |= {f"correction/{kind}": float(kinds[kind]) for kind in get_args(Correction)}
    if extras:
        metrics["accuracy/before"] = float(np.mean([extra["edge_was_correct"] for extra in extras]))
        metrics["tokens/injected_share"] = float(np.mean([extra["edge_injected_share"] for extra in extras]))


def _get(batch: Any, fields: list[str]) -> TensorDict:
    stored: TensorDict = trainer_base.tq.kv_batch_get(
        keys=batch.keys, partition_id=batch.partition_id, select_fields=fields
    )
    return stored


def _put(batch: Any, fields: TensorDict) -> Any:
    return trainer_base.tq.kv_batch_put(keys=batch.keys, partition_id=batch.partition_id, fields=fields)
