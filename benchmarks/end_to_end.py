"""One optimizer step of SmolLM2-135M with our loss and with TRL's, same weights and batch: time and peak memory.

The forward pass of the model, the loss, the backward pass and AdamW, on the same completions every step. The log-ratios
are 0 and the advantages sum to 0, so the loss is 0 for every contender: what has to agree is the gradient's norm and
the completions' mean logprob at each step. ``make smollm2`` fetches the model.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from benchmarks import peers
from benchmarks.harness import OURS, Config, Result, Run, explain, fresh, main, take_turns

MODEL = Path(__file__).resolve().parent.parent / "models" / "SmolLM2-135M-Instruct.Q4_1.gguf"
TRL_LOGITS = "TRL, from logits"
CONTENDERS = (OURS, peers.TRL_HEAD, TRL_LOGITS)
TOLERANCE = 1e-3  # of gradient norms and mean logprobs, relative


def configs(quick: bool) -> Sequence[Config]:
    size = {"sequences": 2, "prompt": 8, "completion": 24} if quick else {}
    base = {"sequences": 4, "prompt": 64, "completion": 256, "dtype": "float32", "pages": "huge", "repetitions": 3}
    return [{**base, **size, "contenders": list(CONTENDERS)}]


def measure(config: Config) -> list[Result]:
    """Return the times of each contender, from fresh processes and the same weights, with their values compared."""
    where = {"work": "optimizer step of SmolLM2-135M", "dtype": config["dtype"], "pages": config["pages"]}
    shape = "{sequences} x ({prompt} + {completion}) tokens".format(**config)
    if not MODEL.is_file():
        return [{**where, "contenders": {}, "missing": {"SmolLM2-135M": "make smollm2 fetches it"}}]
    if "contender" in config:
        return [{**where, "contenders": {config["contender"]: _step(config)}}]
    from edge_grpo.config import ModelConfig
    from edge_grpo.policy.loading import load_model

    rows: dict[str, Result] = {}
    with tempfile.TemporaryDirectory() as folder:
        model, _ = load_model(ModelConfig(path=str(MODEL)))
        model.save_pretrained(folder)
        del model
        for name in config["contenders"]:
            (result,) = fresh("end_to_end", {**config, "contender": name, "folder": folder})
            rows[name] = result["contenders"][name] if "contenders" in result else {"failed": result["failed"]}
    ours = rows[OURS].get("values")
    for row in rows.values():
        for name, value in row.get("values", {}).items():
            if ours and not abs(value - ours[name]) <= TOLERANCE * abs(ours[name]):
                row["note"] = f"DISAGREES in {name}"
    return [{**where, "work": f"{where['work']}, {shape}", "contenders": rows}]


def _step(config: Config) -> Result:
    try:
        model = AutoModelForCausalLM.from_pretrained(config["folder"], dtype=getattr(torch, config["dtype"])).train()
        loss_of = {OURS: _ours, peers.TRL_HEAD: _trl_head, TRL_LOGITS: _trl_logits}[config["contender"]](model)
    except ImportError as error:
        return {"failed": explain(error)}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, foreach=False)
    generator = torch.Generator().manual_seed(0)
    length = config["prompt"] + config["completion"]
    input_ids = torch.randint(100, 40_000, (config["sequences"], length), generator=generator)
    batch = peers.make_batch(config["sequences"], config["completion"], 1)
    batch = batch._replace(targets=input_ids[:, config["prompt"] :])
    seen: list[tuple[float, float]] = []

    def step() -> None:
        loss, logprobs = loss_of(input_ids, batch)
        loss.backward()
        norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)  # at the end, so that gradients count as memory of the step
        seen.append((norm.item(), logprobs.mean().item()))

    step()  # allocates AdamW's moments
    row = take_turns({config["contender"]: Run(step)}, config["repetitions"])[config["contender"]]
    last = len(seen)
    return {**row, "values": {f"gradient norm of step {last}": seen[-1][0], "mean logprob": seen[-1][1]}}


LossOf = Callable[[Tensor, peers.Batch], tuple[Tensor, Tensor]]  # input_ids, batch -> loss, logprobs


def _ours(model: PreTrainedModel) -> LossOf:
    from edge_grpo.policy.model import hidden_states, lm_head
    from edge_kernels import linear_edge_grpo_loss

    def loss(input_ids: Tensor, batch: peers.Batch) -> tuple[Tensor, Tensor]:
        hidden = hidden_states(model, input_ids, torch.ones_like(input_ids))
        hidden = hidden[:, -batch.targets.shape[1] - 1 : -1]
        weight = lm_head(model).weight
        out = linear_edge_grpo_loss(hidden, weight, batch.targets, batch.mask, advantages=batch.advantages)
        return out.loss, out.logprobs

    return loss


def _trl_head(model: PreTrainedModel) -> LossOf:
    """What ``GRPOTrainer`` of TRL 1.16 does, on a CPU too."""
    from trl.trainer.utils import add_fused_lm_head

    add_fused_lm_head(model, outputs=("log_probs", "entropy"))

    def loss(input_ids: Tensor, batch: peers.Batch) -> tuple[Tensor, Tensor]:
        num_tokens = batch.targets.shape[1]
        labels = input_ids.clone()
        labels[:, :-num_tokens] = -100
        mask = torch.ones_like(input_ids)
        out: Any = model(input_ids=input_ids, attention_mask=mask, labels=labels, fused_lm_head=True)
        answer = peers.answer(out.log_probs[:, -num_tokens:], out.entropy[:, -num_tokens:], batch)
        return answer.loss, out.log_probs[:, -num_tokens:].detach()

    return loss


def _trl_logits(model: PreTrainedModel) -> LossOf:
    """The logits of the completions, then TRL's helpers: what trainers without a fused head do."""
    _, loss_from_logits = peers.LOGITS[peers.TRL]()

    def loss(input_ids: Tensor, batch: peers.Batch) -> tuple[Tensor, Tensor]:
        keep = batch.targets.shape[1] + 1
        mask = torch.ones_like(input_ids)
        logits = model(input_ids=input_ids, attention_mask=mask, use_cache=False, logits_to_keep=keep).logits
        answer = loss_from_logits(logits[:, :-1], batch, False)
        assert answer.logprobs is not None
        return answer.loss, answer.logprobs

    return loss


if __name__ == "__main__":
    sys.exit(main("end_to_end", __doc__, configs))
