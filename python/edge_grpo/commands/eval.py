"""``edge-grpo eval``: its arguments, and the configuration that they make. What it then does is ``eval_tasks``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import get_args

from edge_grpo.commands.command import Command, add_source, add_trust, quieten_loading, source_of
from edge_grpo.config import Engine, TrainConfig, load_config
from edge_grpo.config.trust import refuse_foreign
from edge_grpo.run.files import check_writable

# The settings of the published evaluations on suites: all problems, however long, and responses of this length.
_PUBLISHED = {
    "rollout.max_completion_length": 3000,
    "eval.size": 1000000000,
    "data.max_prompt_length": 1000000000,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model",
        metavar="MODEL",
        nargs="?",
        help="run's or model's folder, hub id, .gguf file, or edge_grpo:tiny; or a result's .json, to grade it again",
    )
    data = parser.add_mutually_exclusive_group()
    data.add_argument("--data", metavar="SPEC", help="NAME[@SPLIT] as for eval.data (default: the run's eval.data)")
    data.add_argument(
        "--suite",
        metavar="DIR",
        help="several sets (the splits of a saved dataset, or the data files of a folder) with the settings of the "
        "published evaluations: all problems, template qwen_math, temperature 0.1, up to 3000 tokens",
    )
    parser.add_argument("--sets", metavar="A,B", help="only these sets of the suite")
    parser.add_argument(
        "--template",
        choices=("qwen_math", "r1", "chat", "config"),
        help="the prompt format; config, the default without --suite, is the one of training",
    )
    parser.add_argument("--k", type=int, help="responses per example (default: eval.generations)")
    parser.add_argument(
        "--temperature",
        type=float,
        metavar="T",
        help="0 is greedy; default: 0.1 with --suite, else 0 for one response and rollout.temperature for several",
    )
    parser.add_argument("--max-tokens", type=int, metavar="N", help="length limit of a response")
    parser.add_argument("--size", type=int, metavar="N", help="use at most N examples of each set")
    parser.add_argument("--seed", type=int, help="seed for choosing examples, for sampling and for the intervals")
    parser.add_argument("--engine", choices=get_args(Engine), help="short for rollout.engine=...")
    parser.add_argument("--chunk", type=int, metavar="N", help="examples generated and saved at a time (default: 100)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure, answer and outcome to FILE")
    again = parser.add_mutually_exclusive_group()
    again.add_argument("--resume", action="store_true", help="finish the interrupted evaluation in FILE")
    again.add_argument("--overwrite", action="store_true", help="replace FILE")
    parser.add_argument(
        "--self-check",
        action="store_true",
        help="grade a perfect answer sheet and wrong ones (zeros, ones, near misses) instead of a model; exit with "
        "status 1 if an answer is misjudged",
    )
    add_source(parser)
    add_trust(parser)


def run(options: argparse.Namespace, overrides: list[str]) -> int:
    if options.json:
        check_writable(options.json)
    if options.self_check and options.model:
        raise ValueError(f"--self-check takes no model; got {options.model}")
    if options.model is None and not options.self_check:
        raise ValueError("no model to evaluate; give MODEL, or --self-check to try the grader on the data alone")
    if options.resume and not options.json:
        raise ValueError("--resume needs to know which result: give --json FILE")

    from edge_grpo.commands import eval_tasks

    if options.model and options.model.endswith(".json"):
        return eval_tasks.grade_again(Path(options.model), options, load_config(source_of(options), overrides))
    config, name = _configuration(options, overrides)
    if options.self_check:
        return eval_tasks.self_check(options, config)
    quieten_loading()
    return eval_tasks.evaluate_model(name, options, config)


def _configuration(options: argparse.Namespace, overrides: list[str]) -> tuple[TrainConfig, str]:
    """The configuration to evaluate with, and the model's name; a run's folder has both."""
    source = source_of(options)
    model = options.model
    run, foreign = Path(model or ""), None
    if model and (run / "config.yaml").is_file() and not (run / "config.json").is_file():
        foreign = None if source else run / "config.yaml"
        source = source or foreign
        model = str(run / "final")
        if not Path(model).is_dir():
            raise FileNotFoundError(
                f"{run} has no final model, because the run has not ended; continue it with\n"
                f"  edge-grpo train --resume --output {run}"
            )
    given = {
        "model.path": model,
        "eval.data": options.data,
        "eval.generations": options.k,
        "rollout.max_completion_length": options.max_tokens,
        "eval.size": options.size,
        "rollout.engine": options.engine,
        "seed": options.seed,
    }
    overrides = [*overrides, *(f"{key}={value}" for key, value in given.items() if value is not None)]
    if options.suite:
        chosen = {override.partition("=")[0].strip() for override in overrides}
        overrides += [f"{key}={value}" for key, value in _PUBLISHED.items() if key not in chosen]
    config = load_config(source, overrides)
    if foreign is not None and not options.trust:
        refuse_foreign(foreign, config, overrides, trains=False)
    if config.eval.data is None and not options.suite:
        raise ValueError("no data to evaluate on; give --suite DIR, or --data SPEC such as --data arithmetic@test")
    return config, model


COMMAND = Command(
    name="eval",
    summary="evaluate a model on one data set or on a suite: avg@k, pass@k and maj@k with intervals, outcomes, lengths",
    usage="MODEL [--suite DIR | --data SPEC] [--template NAME] [--k K] [--json FILE [--resume]] [KEY=VALUE ...]",
    examples="""
        edge-grpo eval runs/tiny                         the final model of a run, on the run's held-out data
        edge-grpo eval edge_grpo:tiny --data arithmetic@test --size 500
        edge-grpo eval my-model --data openai/gsm8k:main@test data.columns.problem=question
        edge-grpo eval Qwen/Qwen2.5-Math-1.5B --suite evaluation_suite --json base.json model.precision=bfloat16
        edge-grpo eval runs/qwen --suite evaluation_suite --k 8 --temperature 0.6 --json trained.json --resume
        edge-grpo eval trained.json --json again.json    grade the same answers again, after an update of the grader
        edge-grpo eval --self-check --suite evaluation_suite         try the grader on the data, without a model
        """,
    add_arguments=add_arguments,
    run=run,
    takes_keys=True,
    optional="model",
)
