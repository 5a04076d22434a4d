"""``edge-grpo check``: whether a dataset is fit to train on. What is checked is ``edge_grpo.data.check``."""

from __future__ import annotations

import argparse
from contextlib import closing
from pathlib import Path

from edge_grpo.commands.command import Command, add_source, source_of
from edge_grpo.config import load_config
from edge_grpo.run.files import check_writable, write_json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("data", metavar="DATA", nargs="?", help="NAME[@SPLIT] as for data.train, which is the default")
    parser.add_argument(
        "--model",
        metavar="MODEL",
        help="the model whose tokenizer counts lengths: folder, hub id, .gguf file, edge_grpo:tiny",
    )
    parser.add_argument("--size", type=int, metavar="N", help="check a random sample of N examples")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every finding and the lengths to FILE")
    parser.add_argument("--strict", action="store_true", help="exit with status 1 if anything was found")
    add_source(parser)


def run(options: argparse.Namespace, overrides: list[str]) -> int:
    if options.json:
        check_writable(options.json)
    given = {"data.train": options.data, "model.path": options.model}
    overrides = [*overrides, *(f"{key}={value}" for key, value in given.items() if value is not None)]
    source = source_of(options)
    has_model = source is not None or any(override.startswith("model.path=") for override in overrides)
    if source is None and options.data is None:
        raise ValueError("no data to check; give DATA, or a --recipe or --config whose data.train is to be checked")
    config = load_config(source, overrides)

    from rich.console import Console

    from edge_grpo.data.check import examine
    from edge_grpo.data.sources import load_examples
    from edge_grpo.grading.answers import Grader

    spec, columns = config.data.train, config.data.columns
    examples = load_examples(
        spec, columns, seed=config.seed, limit=options.size, allow_empty=True, style=config.reward.answer
    )
    tokenizer = None
    if has_model:
        from edge_grpo.policy.loading import load_tokenizer

        tokenizer = load_tokenizer(config.model)
    with closing(Grader(timeout=config.reward.timeout, tolerance=config.reward.tolerance)) as grader:
        found = examine(examples, grader, config, tokenizer)
    console = Console(highlight=False, markup=False)
    console.print(f"{spec}: ", found.render(), sep="")
    if options.json:
        write_json(options.json, {"data": spec} | found.to_dict())
    if tokenizer is None:
        console.print(
            "\nLengths and control tokens were not checked; --model names the model whose tokenizer counts them."
        )
    return 1 if options.strict and found.findings else 0


COMMAND = Command(
    name="check",
    summary="check a dataset: what its rows lack, which solutions the grader rejects, what is too long",
    usage="[DATA] [--model MODEL] [--size N] [--json FILE] [--strict] [--recipe NAME | --config FILE] [KEY=VALUE ...]",
    examples="""
        edge-grpo check math.jsonl                       rows, answers and solutions
        edge-grpo check math.jsonl --model Qwen/Qwen2.5-Math-1.5B    and lengths, with this model's tokenizer
        edge-grpo check --config my.yaml --strict        the data of a configuration; status 1 if anything is found
        edge-grpo check openai/gsm8k:main data.columns.problem=question --json findings.json
        edge-grpo check "downloads/MATH/train/**/*.json"        one set in many files; the solution's box is the answer
        """,
    add_arguments=add_arguments,
    run=run,
    takes_keys=True,
    optional="data",
)
