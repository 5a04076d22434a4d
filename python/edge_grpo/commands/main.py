"""The command ``edge-grpo``: which command is asked for, with which options and settings, and how it ends.

What a command takes and does is in its own file; its heavy imports come late, so that help appears at once.
"""

from __future__ import annotations

import argparse
import errno
import linecache
import os
import select
import sys
import textwrap
import traceback
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

from edge_grpo.commands import check, compare, info, report, serve, train
from edge_grpo.commands import eval as evaluate
from edge_grpo.commands.command import Command
from edge_grpo.types import RolloutError
from edge_kernels.info import reader_has_gone, version_of

COMMANDS = {module.COMMAND.name: module.COMMAND for module in (train, evaluate, compare, check, serve, report, info)}


# What the machine refuses, and no fault of this package: a full disk, a quota, a folder that may not be written to.
_REFUSALS = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ENXIO),
    *(errno.EMFILE, errno.ENFILE, errno.ENAMETOOLONG, errno.EISDIR, errno.ENOTDIR),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its status.

    0; 1 where a strict check found something; 2 for a mistake in the command or the configuration, and for a file that
    the machine refuses to write; 3 for an engine that could not generate; 130 for Ctrl-C, 141 where the reader of the
    output has gone, 143 for a training run that SIGTERM ended.
    """
    command, options, overrides = parse(sys.argv[1:] if arguments is None else arguments)
    try:
        status = command.run(options, overrides)
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        return 130
    except BrokenPipeError:
        if not any(map(_reads_nobody, (sys.stdout, sys.stderr))):
            raise
        return reader_has_gone()
    except RolloutError as error:
        print(f"edge-grpo {command.name}: {error}", file=sys.stderr)
        return 3
    except (ValueError, TypeError, RuntimeError, FloatingPointError, FileNotFoundError, FileExistsError) as error:
        if not is_deliberate(error):
            raise
        print(f"edge-grpo {command.name}: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        if error.errno not in _REFUSALS:
            raise
        where = f"{error.filename}: " if error.filename else ""
        print(f"edge-grpo {command.name}: {where}{os.strerror(error.errno)}", file=sys.stderr)
        return 2


def _reads_nobody(stream: TextIO) -> bool:
    """Return whether ``stream`` is a pipe whose other end is closed."""
    poll = select.poll()
    poll.register(stream.fileno(), 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def is_deliberate(error: BaseException) -> bool:
    """Return whether a ``raise`` statement of this package made the error, for the user; anything else is a bug."""
    *_, (frame, line) = traceback.walk_tb(error.__traceback__)
    package = str(frame.f_globals.get("__name__")).partition(".")[0]
    statement = linecache.getline(frame.f_code.co_filename, line)
    return package in ("edge_grpo", "edge_kernels") and statement.lstrip().startswith("raise ")


# ---- Arguments -----------------------------------------------------------------------------------------------------


def parse(arguments: Sequence[str]) -> tuple[Command, argparse.Namespace, list[str]]:
    """Return the command, its options, and the KEY=VALUE arguments; ends the process for help and for mistakes."""
    parser = argparse.ArgumentParser(
        prog="edge-grpo",
        description="Reinforcement learning of language models with EDGE-GRPO (arXiv:2507.21848).",
        epilog="`edge-grpo COMMAND --help` explains a command; `edge-grpo train --help all` lists every setting.",
        allow_abbrev=False,
    )
    version = version_of("edge-grpo") or "not installed"
    parser.add_argument("--version", action="version", version=f"edge-grpo {version}")
    found = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    parsers = {}
    for command in COMMANDS.values():
        own = parsers[command.name] = found.add_parser(
            command.name,
            help=command.summary,
            usage=f"edge-grpo {command.name} {command.usage}",
            description=f"{command.summary[0].upper()}{command.summary[1:]}.",
            epilog=f"examples:\n{textwrap.indent(textwrap.dedent(command.examples).strip(), '  ')}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
            add_help=command.add_help,
        )
        command.add_arguments(own)
    options, rest = parser.parse_known_args(arguments)
    command = COMMANDS[options.command]
    own = parsers[command.name]
    if command.needs_something and list(arguments) == [command.name]:
        own.print_help()
        parser.exit(2)
    for name, times in Counter(argument.partition("=")[0] for argument in arguments).items():
        if times > 1 and name.startswith("--"):
            own.error(f"{name} is given twice")
    return command, options, _overrides(own, command, options, rest)


def _overrides(
    parser: argparse.ArgumentParser, command: Command, options: argparse.Namespace, rest: Sequence[str]
) -> list[str]:
    """The KEY=VALUE arguments, which may stand anywhere on the command line."""
    word = getattr(options, command.optional) if command.optional else None
    if command.optional and word and "=" in word and not Path(word).exists():
        # Where the positional argument was left out or comes later, argparse gave it the first KEY=VALUE.
        meant = next((other for other in rest if not other.startswith("-") and "=" not in other), None)
        rest = [word, *(other for other in rest if other is not meant)]
        setattr(options, command.optional, meant)
    for argument in rest:
        if not command.takes_keys or argument.startswith("-") or "=" not in argument:
            hint = "; settings are given as KEY=VALUE" if command.takes_keys and not argument.startswith("-") else ""
            parser.error(f"unrecognized argument: {argument}{hint}")
    return list(rest)
