"""One step of rollouts and advantages on a local Ray cluster: started by test_verl_cluster.py, prints what came out.

Real are Ray, TransferQueue, verl's reward workers, its replay buffer, our manager and its worker actor, and the
trainer. Stand-ins: the LLM server is an object in the worker, and the actor's forward pass gives made-up numbers.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
import transfer_queue as tq
from transformers import AutoTokenizer
from verl.experimental.reward_loop import RewardLoopManager
from verl.trainer.ppo.v1 import get_trainer_cls
from verl.utils import tensordict_utils as tu
from verl.utils.import_utils import load_class_from_fqn
from verl.utils.tensordict_utils import list_of_dict_to_tensordict
from verl_runs import TINY, Server, compose_config

from edge_kernels import entropy_weights

REWARD = """
def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    return {"score": float(f"boxed{{{ground_truth}}}" in solution_str), "length": len(solution_str)}
"""


class WrongServer(Server):
    """Answers 0, or the right 7 to its first question about the second prompt."""

    def __init__(self) -> None:
        super().__init__(self._answer)
        self.has_been_right = False

    def _answer(self, prompt_ids: list[int]) -> list[int]:
        tokenizer = AutoTokenizer.from_pretrained(TINY)
        right = "5 + 2" in tokenizer.decode(prompt_ids) and not self.has_been_right
        self.has_been_right |= right
        ids: list[int] = tokenizer.encode(f"So \\boxed{{{7 if right else 0}}}.", add_special_tokens=False)
        return [*ids, tokenizer.eos_token_id]


class Workers:
    """The workers of the actor: they store made-up log-probabilities and entropy of whole sequences."""

    def compute_log_prob(self, batch: Any) -> Any:
        generator = torch.Generator().manual_seed(0)
        stored = tq.kv_batch_get(keys=batch.keys, partition_id=batch.partition_id, select_fields=["input_ids"])
        lengths = stored["input_ids"].offsets().diff().tolist()
        rows = [
            {
                "log_probs": -torch.rand(length, generator=generator),
                "entropy": 0.1 + 2 * torch.rand(length, generator=generator),
            }
            for length in lengths
        ]
        return tq.kv_batch_put(
            keys=batch.keys, partition_id=batch.partition_id, fields=list_of_dict_to_tensordict(rows)
        )


def prompts() -> Any:
    def column(values: list[Any]) -> np.ndarray:
        array = np.empty(len(values), dtype=object)
        array[:] = values
        return array

    batch = tu.get_tensordict(
        {
            "raw_prompt": column([[{"role": "user", "content": sum_}] for sum_ in ("3 + 4 = ", "5 + 2 = ")]),
            "uid": column(["first", "second"]),
            "index": column([0, 1]),
            "data_source": column(["sums", "sums"]),
            "reward_model": column([{"ground_truth": "7", "style": "rule"}] * 2),
            "extra_info": column([{"index": 0}, {"index": 1}]),
        }
    )
    tu.assign_non_tensor_data(batch, "global_steps", 1)
    return batch


def main(folder: Path) -> None:
    (folder / "reward.py").write_text(REWARD)
    config = compose_config(
        "+edge.correction.mix={answer: 1.0}",
        "+edge.correction.scope=collapsed",
        "+edge.injected=mask",
        "transfer_queue.enable=true",
        "transfer_queue.backend.SimpleStorage.num_data_storage_units=1",
        "actor_rollout_ref.rollout.agent.num_workers=1",
        "reward.num_workers=1",
        f"reward.custom_reward_function.path={folder / 'reward.py'}",
    )
    ray.init(num_cpus=8, include_dashboard=False, logging_level="ERROR")
    tq.init(config.transfer_queue)
    trainer = get_trainer_cls(config.trainer.v1.trainer_mode)(config)
    trainer.global_steps, trainer.actor_rollout_wg = 1, Workers()
    trainer.reward_loop_manager = RewardLoopManager(config=config)
    agent = config.actor_rollout_ref.rollout.agent
    trainer.agent_loop_manager = load_class_from_fqn(agent.agent_loop_manager_class, "AgentLoopManager").create(
        config=config,
        llm_client=WrongServer(),
        teacher_client=None,
        reward_loop_worker_handles=trainer.get_reward_handles(),
    )
    trainer._submit_batch_to_rollout(prompts())
    batch, _ = trainer.replay_buffer.sample(global_steps=1, partition_id="train", batch_size=2)
    metrics: dict[str, Any] = {}
    batch = trainer._compute_old_log_prob(batch, metrics=metrics)
    batch = trainer._compute_advantage(batch, metrics=metrics)
    fields = ["uid", "response_mask", "entropy", "advantages", "rm_scores", "extra_fields"]
    stored = tq.kv_batch_get(keys=batch.keys, partition_id="train", select_fields=fields)
    mask = stored["response_mask"].to_padded_tensor(0).bool()
    weights = entropy_weights(
        stored["entropy"].to_padded_tensor(0.0), mask, torch.tensor([len(uid) for uid in stored["uid"]])
    )
    lengths = stored["response_mask"].offsets().diff()
    found = {
        "uids": list(stored["uid"]),
        "kinds": [extra["edge_correction"] for extra in stored["extra_fields"]],
        "rewards": stored["rm_scores"].to_padded_tensor(0.0).sum(1).tolist(),
        "masked": (lengths - mask.sum(1)).tolist(),
        "advantages": stored["advantages"].to_padded_tensor(0.0)[:, 0].tolist(),  # of the first tokens
        "weights": weights.tolist(),
        "metrics": {name: metrics[name] for name in ("correction/answer", "accuracy/before", "eda/weight_max")},
    }
    print(json.dumps(found))
    tq.close()
    ray.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
