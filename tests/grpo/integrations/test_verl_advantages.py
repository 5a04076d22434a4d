"""Entropy-driven advantages in verl's trainer: its own computation on a batch, times the weights of edge_kernels."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("tensordict", reason="verl's requirements: make test-verl")
pytest.importorskip("verl.trainer.ppo.v1", reason="verl's requirements: make test-verl")

from verl.trainer.ppo.v1 import PPOTrainerSync, trainer_base
from verl_runs import Queue, compose_config, nested

from edge_grpo.integrations.verl import EdgePPOTrainerSync
from edge_kernels import EDAConfig, entropy_driven_advantages, entropy_weights

PROMPT = 3  # tokens of every prompt: the entropy that workers return covers them too
LENGTHS = (5, 2, 4, 1, 3, 3, 6, 2)  # different ones, one of a single token, which has one entropy for its mean
UIDS = ("b", "a", "b", "a", "a", "b", "a", "b")  # groups of 4 that do not lie together
REWARDS = (1.0, 0.0, 0.0, 1.0, 0.0, 1.0, 0.0, 0.0)


@pytest.fixture
def queue(monkeypatch) -> Queue:
    queue = Queue()
    monkeypatch.setattr(trainer_base, "tq", queue)
    return queue


def fill(queue: Queue, masks: list[torch.Tensor] | None = None) -> list[str]:
    """Store a batch as the agent loops leave it; the keys in its order."""
    seen: dict[str, int] = {}
    for row, (uid, length, reward) in enumerate(zip(UIDS, LENGTHS, REWARDS, strict=True)):
        session = seen[uid] = seen.get(uid, -1) + 1
        scores = torch.zeros(length)
        scores[-1] = reward
        queue.rows[f"{uid}_{session}_0"] = {
            "uid": uid,
            "response_mask": torch.ones(length, dtype=torch.int64) if masks is None else masks[row],
            "responses": torch.arange(length),
            "rm_scores": scores,
            "rollout_log_probs": torch.full((length,), -0.5),
            "extra_fields": {},
        }
    return list(queue.rows)


class Workers:
    """The workers of the actor: they store the log-probabilities and entropy of whole sequences."""

    def __init__(self, queue: Queue, seed: int = 0) -> None:
        self.queue, self.generator, self.calls = queue, torch.Generator().manual_seed(seed), 0

    def compute_log_prob(self, batch):
        self.calls += 1
        assert batch.extra_info["calculate_entropy"]
        for key in batch.keys:
            length = PROMPT + len(self.queue.rows[key]["response_mask"])
            self.queue.rows[key]["log_probs"] = -torch.rand(length, generator=self.generator)
            self.queue.rows[key]["entropy"] = 0.1 + 2 * torch.rand(length, generator=self.generator)
        return batch


def advantages(cls, queue: Queue, keys: list[str], *overrides: str):
    """Run verl's two steps; the advantages by row, and the metrics."""
    trainer, metrics = cls(compose_config(*overrides)), {}
    trainer.actor_rollout_wg = Workers(queue)
    batch = trainer._compute_old_log_prob(queue.batch(keys), metrics=metrics)
    batch = trainer._compute_advantage(batch, metrics=metrics)
    assert trainer.actor_rollout_wg.calls == 1
    return nested([queue.rows[key]["advantages"] for key in keys]).to_padded_tensor(0.0), metrics


def padded(queue: Queue, keys: list[str], name: str) -> torch.Tensor:
    return nested([queue.rows[key][name] for key in keys]).to_padded_tensor(0)


GROUPS = torch.tensor([ord(uid) for uid in UIDS])


@pytest.mark.parametrize("estimator", ["grpo", "rloo"])  # of one number per response; scaled by the deviation or not
def test_advantages_are_verls_times_our_weights(queue, estimator):
    keys = fill(queue)
    option = f"algorithm.adv_estimator={estimator}"
    plain, _ = advantages(PPOTrainerSync, queue, keys, option, "trainer.v1.trainer_mode=sync")
    ours, metrics = advantages(EdgePPOTrainerSync, queue, keys, option)
    mask, entropy = padded(queue, keys, "response_mask").bool(), padded(queue, keys, "entropy")
    weights = entropy_weights(entropy, mask, GROUPS)
    torch.testing.assert_close(ours, plain * weights[:, None], rtol=1e-6, atol=1e-6)
    assert (ours - plain).abs().max() > 0.05
    assert metrics["eda/weight_max"] == pytest.approx(weights.max().item())
    assert metrics["eda/weight_min"] == pytest.approx(weights.min().item())


def test_the_whole_is_the_papers_advantage(queue):
    keys = fill(queue)
    ours, _ = advantages(EdgePPOTrainerSync, queue, keys)
    mask, entropy = padded(queue, keys, "response_mask").bool(), padded(queue, keys, "entropy")
    expected = entropy_driven_advantages(torch.tensor(REWARDS), entropy, mask, GROUPS)
    # verl adds 1e-6 to the standard deviation, 0.5 here, and we 1e-4
    torch.testing.assert_close(ours, expected[:, None] * mask, rtol=3e-4, atol=0)


def test_settings_reach_the_weights(queue):
    keys = fill(queue)
    options = ["+edge.eda_config.clip=1.2", "+edge.eda_config.preserve_scale=true", "+edge.eda_config.mean_over=batch"]
    plain, _ = advantages(PPOTrainerSync, queue, keys, "trainer.v1.trainer_mode=sync")
    ours, _ = advantages(EdgePPOTrainerSync, queue, keys, *options)
    mask, entropy = padded(queue, keys, "response_mask").bool(), padded(queue, keys, "entropy")
    config = EDAConfig(1 / 1.2, 1.2, preserve_scale=True, mean_over="batch")
    weights = entropy_weights(entropy, mask, GROUPS, config, advantages=plain[:, 0])
    torch.testing.assert_close(ours, plain * weights[:, None], rtol=1e-6, atol=1e-6)


def test_masked_tokens_and_padding_rows_have_no_part(queue):
    """Injected tokens that are masked, a response of nothing else, and verl's rows that fill up a batch."""
    masks = [torch.ones(length, dtype=torch.int64) for length in LENGTHS]
    masks[0][1:4] = 0
    masks[6][:] = 0
    keys = fill(queue, masks)
    queue.rows["pad_0_0"] = {
        "uid": "pad",
        "response_mask": torch.zeros(1, dtype=torch.int64),
        "responses": torch.zeros(1, dtype=torch.int64),
        "rm_scores": torch.zeros(1),
        "rollout_log_probs": torch.zeros(1),
        "extra_fields": {"edge_correction": "reflect"},
    }
    queue.tags["pad_0_0"] = {"is_padding": True}
    everything = [*keys, "pad_0_0"]
    plain, _ = advantages(PPOTrainerSync, queue, everything, "trainer.v1.trainer_mode=sync")
    ours, metrics = advantages(EdgePPOTrainerSync, queue, everything)
    mask, entropy = padded(queue, keys, "response_mask").bool(), padded(queue, keys, "entropy")
    weights = entropy_weights(entropy, mask, GROUPS)
    torch.testing.assert_close(ours[:8], plain[:8] * weights[:, None], rtol=1e-6, atol=1e-6)
    assert not ours[6].any()
    assert not ours[0, 1:4].any()
    assert not ours[8].any()
    assert metrics["correction/reflect"] == 0


def test_a_response_in_two_rows_has_one_weight(queue):
    """An agent loop of verl may return several rows for one session: their tokens make one mean."""
    keys = fill(queue)
    first = queue.rows["a_0_0"]
    queue.rows["a_0_1"] = {**first, "response_mask": torch.ones(3, dtype=torch.int64), "rm_scores": torch.zeros(3)}
    queue.rows["a_0_1"] |= {"responses": torch.arange(3), "rollout_log_probs": torch.full((3,), -0.5)}
    everything = [*keys, "a_0_1"]
    plain, _ = advantages(PPOTrainerSync, queue, everything, "trainer.v1.trainer_mode=sync")
    ours, _ = advantages(EdgePPOTrainerSync, queue, everything)
    entropy = [queue.rows[key]["entropy"] for key in keys]
    row = keys.index("a_0_0")
    entropy[row] = torch.cat([entropy[row], queue.rows["a_0_1"]["entropy"]])
    whole = nested(entropy).to_padded_tensor(float("nan"))
    weights = entropy_weights(whole, ~whole.isnan(), GROUPS)
    weights = torch.cat([weights, weights[row : row + 1]])
    torch.testing.assert_close(ours, plain * weights[:, None], rtol=1e-6, atol=1e-6)


def test_switched_off_it_is_verls_to_the_bit(queue):
    keys = fill(queue)
    plain, _ = advantages(PPOTrainerSync, queue, keys, "trainer.v1.trainer_mode=sync")
    ours, metrics = advantages(EdgePPOTrainerSync, queue, keys, "+edge.eda=false", "+edge.gec=false")
    assert torch.equal(ours, plain)
    assert not any(name.startswith(("eda/", "correction/")) for name in metrics)


def test_entropy_is_computed_where_verl_makes_none(queue):
    """In bypass mode the old log-probabilities are the sampler's, and no forward pass has given an entropy."""
    keys = fill(queue)
    bypass = ("algorithm.rollout_correction.bypass_mode=true", "+edge.injected=mask")
    ours, _ = advantages(EdgePPOTrainerSync, queue, keys, *bypass)
    mask, entropy = padded(queue, keys, "response_mask").bool(), padded(queue, keys, "entropy")
    expected = entropy_driven_advantages(torch.tensor(REWARDS), entropy, mask, GROUPS)
    torch.testing.assert_close(ours, expected[:, None] * mask, rtol=3e-4, atol=0)
