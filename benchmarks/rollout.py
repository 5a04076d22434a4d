"""Tokens per second of generation with transformers and with in-process vLLM, on the same weights and prompts.

Both sample in bfloat16, in turns, after a warm-up. vLLM's logprobs are compared with the trainer's before timing.
``make smollm2 vllm`` fetches the model and installs vLLM. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Sequence

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from benchmarks.harness import describe, machine
from edge_grpo.config import TrainConfig, load_config, recipe_path
from edge_grpo.data.prompts import render_prompts
from edge_grpo.data.sources import load_examples
from edge_grpo.policy.loading import load_model
from edge_grpo.rollout import build_engine
from edge_grpo.types import RolloutEngine, Sampling


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.rollout", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sequences", type=int, default=64, help="in groups of eight (default: 64)")
    parser.add_argument("--tokens", type=int, default=64, help="length limit of a response (default: 64)")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="overrides of the recipe smollm2-135m-vllm")
    options = parser.parse_args(arguments)
    config = load_config(
        recipe_path("smollm2-135m-vllm"),
        ["model.precision=bfloat16", f"rollout.max_completion_length={options.tokens}", *options.overrides],
    )
    where = machine()
    print(describe(where), flush=True)
    model, tokenizer = load_model(config.model)
    examples = load_examples(config.data.train, config.data.columns, limit=-(-options.sequences // 8))
    prompts = render_prompts(examples, tokenizer, config.data)[0]
    asked = [prompt.token_ids for prompt in prompts for _ in range(8)][: options.sequences]
    sampling = Sampling(max_tokens=options.tokens, temperature=config.rollout.temperature)

    plain = load_config(overrides=[f"rollout.batch_size={config.rollout.batch_size}"])
    engines = {
        "transformers": build_engine(plain, model, tokenizer),
        "vllm": build_engine(config, model, tokenizer),  # verifies its logprobs
    }
    for engine in engines.values():
        engine.generate(asked, sampling, seed=0)
    rates: dict[str, list[float]] = {name: [] for name in engines}
    for repetition in range(1, options.repetitions + 1):
        for name, engine in engines.items():
            rates[name].append(rate(engine, asked, sampling, seed=repetition))
    for engine in engines.values():
        engine.close()
    for name, values in rates.items():
        print(f"{name:14}{statistics.median(values):8.0f} tokens/s   ({min(values):.0f} to {max(values):.0f})")
    print(json.dumps({"machine": where, "sequences": len(asked), "tokens_per_s": rates, "dtype": dtype(config)}))
    return 0


def rate(engine: RolloutEngine, asked: Sequence[tuple[int, ...]], sampling: Sampling, *, seed: int) -> float:
    started = time.perf_counter()
    responses = engine.generate(asked, sampling, seed=seed)
    return sum(len(response.token_ids) for response in responses) / (time.perf_counter() - started)


def dtype(config: TrainConfig) -> str:
    return str(config.rollout.vllm.get("dtype", config.model.precision))


if __name__ == "__main__":
    raise SystemExit(main())
