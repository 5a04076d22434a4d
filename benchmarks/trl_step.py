"""A training step of SmolLM2-135M in TRL's GRPOTrainer: plain, with Liger's fused loss, and with ours; time and memory.

Every contender trains in a process of its own, from the same weights on the same completions, which are random tokens
in the place of the sampler's, so that nothing but scoring, loss, backward pass and optimizer is timed. Gradient norms
are compared at every step. ``make smollm2`` fetches the model. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

from benchmarks.end_to_end import MODEL
from benchmarks.harness import describe, machine

PLAIN, LIGER, FUSED, ENTROPY = (
    "TRL",
    "TRL, Liger's loss",
    "TRL, our loss",
    "TRL, our loss and entropy-driven advantages",
)
SWITCHES: dict[str, dict[str, Any]] = {FUSED: {"eda": False, "gec": False}, ENTROPY: {"gec": False}}
CONTENDERS = (PLAIN, LIGER, FUSED, ENTROPY)
TOLERANCE = 1e-3  # of gradient norms, relative


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.trl_step", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sequences", type=int, default=8, help="completions of a step, one group (default: 8)")
    parser.add_argument("--micro-batch", type=int, default=4, help="sequences of a forward pass (default: 4)")
    parser.add_argument("--prompt", type=int, default=64, help="tokens of the prompt (default: 64)")
    parser.add_argument("--completion", type=int, default=256, help="tokens of a completion (default: 256)")
    parser.add_argument("--steps", type=int, default=3, help="timed steps, after one that is not (default: 3)")
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=CONTENDERS)
    parser.add_argument("--contender", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.contender:
        print(json.dumps(train(options)))
        return 0
    if not MODEL.is_file():
        print("SmolLM2-135M is not there; make smollm2 fetches it")
        return 1
    from edge_grpo.config import ModelConfig
    from edge_grpo.policy.loading import load_model

    where = machine()
    print(describe(where), flush=True)
    rows: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        model, tokenizer = load_model(ModelConfig(path=str(MODEL)))
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        del model
        for name in options.contenders:
            command = [sys.executable, "-W", "ignore", "-m", "benchmarks.trl_step", *sys.argv[1:]]
            done = subprocess.run(
                [*command, "--contender", name, "--folder", folder],
                stdout=subprocess.PIPE,
                text=True,
                check=False,
                env={**os.environ, "CI": "1", "TRANSFORMERS_VERBOSITY": "error", "TQDM_DISABLE": "1"},
            )
            rows[name] = json.loads(done.stdout.splitlines()[-1]) if not done.returncode else {"failed": True}
            print(row(name, rows[name], rows.get(PLAIN, {})), flush=True)
    print(json.dumps({"machine": where, "contenders": rows}))
    return int(any("failed" in result for result in rows.values()))


def row(name: str, result: dict[str, Any], plain: dict[str, Any]) -> str:
    if "failed" in result:
        return f"{name:46} failed"
    times = result["seconds"]
    text = f"{name:46}{statistics.median(times):8.2f} s ({min(times):.2f} to {max(times):.2f})"
    text += f"   {result['peak_bytes'] / 2**20:8.0f} MiB at the peak"
    pairs = zip(result["gradient_norms"], plain.get("gradient_norms", []), strict=False)
    if name != ENTROPY and any(abs(ours - theirs) > TOLERANCE * theirs for ours, theirs in pairs):
        text += "   DISAGREES in gradient norms"
    return text


def train(options: argparse.Namespace) -> dict[str, Any]:
    """Return the seconds of each timed step, the peak memory, and all gradient norms of one contender."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    from edge_grpo.integrations.trl import EdgeGRPOConfig, EdgeGRPOTrainer

    classes = {PLAIN: (GRPOTrainer, GRPOConfig), LIGER: (with_liger(), GRPOConfig)}
    trainer_class, config_class = classes.get(options.contender, (EdgeGRPOTrainer, EdgeGRPOConfig))
    generator = torch.Generator().manual_seed(0)
    ends: list[float] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            ends.append(-time.perf_counter())

        def on_step_end(self, *_: Any, **__: Any) -> None:
            ends[-1] += time.perf_counter()

    class Random(trainer_class):  # type: ignore[misc, valid-type]
        def _tokenize_prompts(self, prompts: list[Any]) -> tuple[list[list[int]], None, dict[str, Any]]:
            prompt = torch.randint(100, 40_000, (options.prompt,), generator=generator).tolist()
            return [prompt] * len(prompts), None, {}

        def _generate_single_turn(self, prompt_ids: list[Any], *_: Any) -> tuple[list[list[int]], None]:
            shape = (len(prompt_ids), options.completion)
            return torch.randint(100, 40_000, shape, generator=generator).tolist(), None

    def reward(completion_ids: list[list[int]], **_: Any) -> list[float]:
        return [sum(ids) % 101 / 101 for ids in completion_ids]  # all different, so that every step has a gradient

    trainer = Random(
        model=AutoModelForCausalLM.from_pretrained(options.folder, dtype=torch.float32),
        reward_funcs=reward,
        args=config_class(
            output_dir=options.folder,
            max_steps=1 + options.steps,
            per_device_train_batch_size=options.micro_batch,
            gradient_accumulation_steps=options.sequences // options.micro_batch,
            num_generations=options.sequences,
            max_completion_length=options.completion,
            gradient_checkpointing=False,
            logging_steps=1,
            report_to=[],
            save_strategy="no",
            use_cpu=True,
            bf16=False,
            **SWITCHES.get(options.contender, {}),
        ),
        train_dataset=Dataset.from_list([{"prompt": "a"}] * 8),
        processing_class=AutoTokenizer.from_pretrained(options.folder),
        callbacks=[Clock()],
    )
    trainer.train()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB, model and optimizer included
    norms = [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]
    return {"seconds": ends[1:], "peak_bytes": peak * 1024, "gradient_norms": norms}


def with_liger() -> Any:
    """GRPOTrainer with Liger's fused loss, which has no entropy; TRL itself offers Liger's layers only."""
    import torch
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss
    from trl import GRPOTrainer

    class WithLiger(GRPOTrainer):
        def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Any:
            ids, mask = inputs["completion_ids"], inputs["completion_mask"]
            hidden = model.base_model(
                input_ids=torch.cat([inputs["prompt_ids"], ids], dim=1),
                attention_mask=torch.cat([inputs["prompt_mask"], mask], dim=1),
                use_cache=False,
            ).last_hidden_state[:, -ids.shape[1] - 1 : -1]
            # "bnpo" divides by the tokens of the micro-batch: with completions of one length that is TRL's "dapo".
            function = LigerFusedLinearGRPOLoss(
                beta=0.0, use_ref_model=False, loss_type="bnpo", temperature=self.temperature, compiled=False
            )
            loss, _ = function(hidden, model.lm_head.weight, ids, mask, inputs["advantages"])
            return loss / self.current_gradient_accumulation_steps

    return WithLiger


if __name__ == "__main__":
    raise SystemExit(main())
