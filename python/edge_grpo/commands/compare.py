"""``edge-grpo compare``: whether one evaluation is better than another, by ``edge_grpo.evaluation.compare``."""

from __future__ import annotations

import argparse
from pathlib import Path

from edge_grpo.commands.command import Command
from edge_grpo.run.files import check_writable, write_json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("first", metavar="A.json", type=Path, help="a result of edge-grpo eval --json")
    parser.add_argument("second", metavar="B.json", type=Path, help="another; differences are B minus A")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to FILE")


def run(options: argparse.Namespace, _: list[str]) -> int:
    if options.json:
        check_writable(options.json)
    from edge_grpo.commands.tables import print_comparison
    from edge_grpo.evaluation.compare import compare
    from edge_grpo.evaluation.result import Result

    if options.json and options.json.resolve() in (options.first.resolve(), options.second.resolve()):
        raise ValueError(f"--json {options.json} is one of the results; name another file")
    first, second = Result.load(options.first), Result.load(options.second)
    found = compare(first, second)
    print_comparison(found, first, second)
    if options.json:
        write_json(options.json, {"first": str(options.first), "second": str(options.second)} | found.to_dict())
    return 0


COMMAND = Command(
    name="compare",
    summary="test whether one evaluation is better than another on the same problems",
    usage="A.json B.json [--json FILE]",
    examples="edge-grpo compare base.json trained.json",
    add_arguments=add_arguments,
    run=run,
)
