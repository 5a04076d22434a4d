"""``edge-grpo report``: the page about one or several runs. Drawing it is ``edge_grpo.run.report``."""

from __future__ import annotations

import argparse
from pathlib import Path

from edge_grpo.commands.command import Command
from edge_grpo.run.report import write_report


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", metavar="RUN", nargs="+", type=Path, help="a run's folder, finished or not")
    parser.add_argument("-o", "--output", metavar="FILE", type=Path, help="where to write the page")


def run(options: argparse.Namespace, _: list[str]) -> int:
    print(write_report(options.runs, options.output))
    return 0


COMMAND = Command(
    name="report",
    summary="write an HTML page about one or several runs; it needs no server and no network",
    usage="RUN [RUN ...] [-o FILE]",
    examples="""
        edge-grpo report runs/tiny                       writes runs/tiny/report.html
        edge-grpo report runs/tiny runs/tiny-grpo        both in the same charts: writes runs/report.html
        """,
    add_arguments=add_arguments,
    run=run,
)
