"""``edge-grpo report``: the page about runs, and a table of groups of them. Both come from ``edge_grpo.report``."""

from __future__ import annotations

import argparse
from pathlib import Path

from edge_grpo.commands.command import Command
from edge_grpo.run.files import check_writable


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", metavar="RUN", nargs="+", type=Path, help="a run's folder, finished or not")
    parser.add_argument("-o", "--output", metavar="FILE", type=Path, help="where to write the page")
    parser.add_argument(
        "--group",
        metavar="KEYS",
        help="runs with equal values of these configuration keys (comma-separated) are one group; default: all keys in "
        "which the runs differ, but for the seed; none: every run by itself",
    )
    parser.add_argument(
        "--baseline",
        metavar="GROUP",
        help="the group that the others are compared with, or part of its name; default: that of method grpo, else the "
        "first",
    )


def run(options: argparse.Namespace, _: list[str]) -> int:
    if options.output:
        check_writable(options.output)
    from edge_grpo.commands.tables import print_groups
    from edge_grpo.report.page import read_groups, write_page

    keys = None
    if options.group is not None:
        keys = [] if options.group == "none" else [key.strip() for key in options.group.split(",") if key.strip()]
    # runs/* names the page of an earlier call too, which lies beside the runs.
    folders = [path for path in options.runs if not (path.suffix == ".html" and path.is_file())]
    groups, baseline = read_groups(folders or options.runs, group=keys, baseline=options.baseline)
    page = write_page(groups, baseline, options.output)
    print_groups(groups, baseline)
    print(page)
    return 0


COMMAND = Command(
    name="report",
    summary="write an HTML page about one or several runs, or groups of runs; it needs no server and no network",
    usage="RUN [RUN ...] [--group KEYS] [--baseline GROUP] [-o FILE]",
    examples="""
        edge-grpo report runs/tiny                       writes runs/tiny/report.html
        edge-grpo report runs/tiny runs/tiny-grpo        both in the same charts: writes runs/report.html
        edge-grpo report runs/*                          runs that differ in their seed alone become one group: mean and
                                                         band over seeds, differences to a baseline, paired by seed
        edge-grpo report runs/* --group method --baseline gec
        """,
    add_arguments=add_arguments,
    run=run,
)
