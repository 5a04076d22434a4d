"""What a command of ``edge-grpo`` is, and what several of them share: the source of their settings.

Each command has a file of its own; choosing among them is ``main``. Nothing here, nor at the top of any of those files,
imports torch: help must appear at once.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from edge_grpo.config import recipe_names, recipe_path


@dataclass(frozen=True)
class Command:
    """A command: its help, its arguments, and what it does.

    ``run`` gets the parsed options and the KEY=VALUE arguments, which exist only with ``takes_keys``, and returns the
    exit status. ``optional`` names a positional argument that may be left out. A command without ``add_help`` adds its
    own --help. One that ``needs_something`` prints its help when it is given nothing.
    """

    name: str
    summary: str
    usage: str
    examples: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace, list[str]], int]
    takes_keys: bool = False
    optional: str | None = None
    add_help: bool = True
    needs_something: bool = False


def add_source(parser: argparse.ArgumentParser) -> None:
    """Add --recipe and --config."""
    source = parser.add_mutually_exclusive_group()
    names = ", ".join(recipe_names())
    source.add_argument("--recipe", metavar="NAME", help=f"start from a recipe of the package: {names}")
    source.add_argument(
        "--config", metavar="FILE", type=Path, help="start from a YAML file, such as a run's config.yaml"
    )


def add_trust(parser: argparse.ArgumentParser) -> None:
    """Add --trust, for commands that take a run's folder with its configuration."""
    parser.add_argument(
        "--trust",
        action="store_true",
        help="let the configuration in the run's folder run code and reach other machines: its reward functions, "
        "arguments of vLLM, servers",
    )


def source_of(options: argparse.Namespace) -> Path | None:
    """Return the file that --recipe or --config names, None without either."""
    source: Path | None = recipe_path(options.recipe) if options.recipe else options.config
    return source


def quieten_loading() -> None:
    """Turn off the progress bars of transformers for reading and writing weights: they would bury our own lines."""
    from transformers.utils import logging

    logging.disable_progress_bar()
