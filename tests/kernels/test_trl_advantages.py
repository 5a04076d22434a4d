"""Group advantages against TRL 1.16 itself: the statement of its trainer that forms them, cut out and executed."""

from __future__ import annotations

import ast
import inspect
import textwrap
from types import SimpleNamespace

import pytest
import torch

from edge_kernels import group_advantages

grpo_trainer = pytest.importorskip("trl.trainer.grpo_trainer", reason="TRL is the other side of the comparison here")


def statement() -> ast.stmt:
    """Return TRL's statement that makes ``advantages`` of ``rewards_per_func``, found by what it tests."""
    source = inspect.getsource(grpo_trainer.GRPOTrainer._generate_and_score_completions)
    found = [
        node
        for node in ast.walk(ast.parse(textwrap.dedent(source)))
        if isinstance(node, ast.If) and "sum_then_normalize" in ast.unparse(node.test)
    ]
    assert len(found) == 1, "TRL moved its advantages; find them again"
    return found[0]


ADVANTAGES = compile(ast.Module([statement()], []), "trl advantages", "exec")


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_every_scale_is_trls(scale: str) -> None:
    rewards = torch.tensor([1, 0.1, 0, 0.7, 0.1, 0.1, 0.1, 0.1, -2, 5, 3, 3])  # three groups, one of equal rewards
    names = {
        "self": SimpleNamespace(
            multi_objective_aggregation="sum_then_normalize", scale_rewards=scale, reward_weights=torch.ones(1)
        ),
        "rewards_per_func": rewards[:, None],
        "unscorable_mask": torch.zeros(12, dtype=torch.bool),
        "num_generations": 4,
        "device": "cpu",
    }
    exec(ADVANTAGES, vars(grpo_trainer), names)
    actual = group_advantages(rewards, torch.arange(12) // 4, scale_rewards=scale)
    torch.testing.assert_close(actual, names["advantages"], rtol=1e-5, atol=1e-6)
