"""``edge-grpo serve``: a vLLM server for runs elsewhere. Starting it is ``edge_grpo.rollout.serve``."""

from __future__ import annotations

import argparse

from edge_grpo.commands.command import Command, add_source, quieten_loading, source_of
from edge_grpo.config import load_config


def run(options: argparse.Namespace, overrides: list[str]) -> int:
    config = load_config(source_of(options), overrides)
    quieten_loading()
    from edge_grpo.rollout.serve import serve

    serve(config, options.index)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_source(parser)
    parser.add_argument(
        "--index", type=int, metavar="N", help="which address of rollout.server to serve, from 0, where it has several"
    )


COMMAND = Command(
    name="serve",
    summary="start a vLLM server on this machine for runs with rollout.engine=vllm-server",
    usage="[--recipe NAME | --config FILE] [--index N] [KEY=VALUE ...]",
    examples="""
        edge-grpo serve --recipe smollm2-135m-server     then, elsewhere: edge-grpo train --recipe smollm2-135m-server
        CUDA_VISIBLE_DEVICES=1 edge-grpo serve --config my.yaml rollout.server=10.0.0.2:8000
        CUDA_VISIBLE_DEVICES=1 edge-grpo serve --config my.yaml --index 1        the second address of rollout.server
        """,
    add_arguments=add_arguments,
    run=run,
    takes_keys=True,
)
