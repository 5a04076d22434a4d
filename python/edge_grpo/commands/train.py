"""``edge-grpo train``: a run from its configuration to its report, and what a user is told about it.

Training is ``edge_grpo.trainer``; what is written into the run's folder is ``edge_grpo.run``.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from pathlib import Path
from typing import Any, get_args

from edge_grpo.commands.command import Command, add_source, add_trust, quieten_loading, source_of
from edge_grpo.config import Method, TrainConfig, keys_help, load_config
from edge_grpo.config.trust import reaching_out, refuse_foreign
from edge_grpo.run.folder import claim, is_main_process
from edge_grpo.run.history import Point, read_run
from edge_grpo.text import clock, percent

_LAST_WORDS = 5.0  # seconds that the main process has for them


class _KeysHelp(argparse.Action):
    """Prints the command's help with the most used configuration keys, or with all of them, and exits."""

    def __call__(self, parser: argparse.ArgumentParser, _: Any, values: Any, option_string: str | None = None) -> None:
        width = max(60, min(120, shutil.get_terminal_size().columns))
        print(f"{parser.format_help()}\n{keys_help(width, every=values == 'all')}", end="")
        parser.exit()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-h",
        "--help",
        action=_KeysHelp,
        nargs="?",
        metavar="all",
        help="show this help and the most used configuration keys; --help all shows every key",
    )
    add_source(parser)
    parser.add_argument("--method", choices=get_args(Method), help="short for method=...; see the key below")
    parser.add_argument(
        "--preset",
        metavar="NAME",
        help="set several keys at once, after the recipe's or file's and before KEY=VALUE; published: what the "
        "published EDGE-GRPO code does otherwise than the paper",
    )
    parser.add_argument("--output", metavar="DIR", help="short for output=..., the run's folder")
    again = parser.add_mutually_exclusive_group()
    again.add_argument(
        "--resume",
        action="store_true",
        help="continue the run in the output folder, with its own configuration unless --recipe or --config is given",
    )
    again.add_argument(
        "--overwrite",
        action="store_true",
        help="replace an earlier run in the output folder, once the new one has loaded",
    )
    again.add_argument(
        "--dry-run",
        action="store_true",
        help="load everything, make a step, print what the run would take, and write nothing",
    )
    parser.add_argument(
        "--accept-changes",
        action="store_true",
        help="resume although the run's data, model or reward functions have changed",
    )
    add_trust(parser)


def run(options: argparse.Namespace, overrides: list[str]) -> int:
    if options.accept_changes and not options.resume:
        raise ValueError("--accept-changes is for --resume, which compares a run with what it was")
    config = _configuration(options, overrides)
    output = Path(config.output)
    is_main = is_main_process()
    if options.dry_run:
        return _dry_run(config, is_main=is_main)
    with claim(output, resume=options.resume, overwrite=options.overwrite):
        pass  # train claims it again; a refusal need not wait until torch is imported
    earlier = _identity(output) if options.overwrite else None

    quieten_loading()
    from edge_grpo.trainer import train

    if is_main:
        rollout = config.rollout
        print(
            f"{config.method} on {config.model.path}: {config.steps} steps of {rollout.num_prompts} prompts x "
            f"{rollout.num_generations} responses, into {output}",
            file=sys.stderr,
        )
    try:
        summary = train(
            config, resume=options.resume, overwrite=options.overwrite, accept_changes=options.accept_changes
        )
    except KeyboardInterrupt as stop:
        if is_main:
            _say_how_to_resume(config, earlier)
        _let_main_speak(is_main)
        return getattr(stop, "status", 130)
    except (RuntimeError, OSError):
        if is_main and _identity(output) is not None:  # else the run has not begun
            _say_how_to_resume(config, earlier)
        _let_main_speak(is_main)
        raise
    if is_main:
        from edge_grpo.report.page import write_report

        page = write_report([output])
        print()
        if evals := read_run(output).evals:  # from the log: a resumed run was evaluated before it was interrupted
            print(f"Held-out accuracy, {config.eval.data}")
            print(f"  before  {_accuracy(evals[0])}")
            gain = 100 * (evals[-1].accuracy - evals[0].accuracy)
            print(f"  after   {_accuracy(evals[-1])}   {gain:+.1f} points")
        print(f"Steps     {summary.steps} in {clock(summary.seconds)}")
        print(f"Model     {output / 'final'}")
        print(f"Report    {page}")
    return 0


def _dry_run(config: TrainConfig, *, is_main: bool) -> int:
    quieten_loading()
    from edge_grpo.trainer import plan

    lines = plan(config).lines()
    if is_main:
        print("\n".join(lines))
    return 0


def _configuration(options: argparse.Namespace, overrides: list[str]) -> TrainConfig:
    source = source_of(options)
    overrides = list(overrides)
    if options.method:
        overrides.append(f"method={options.method}")
    if options.output:
        overrides.append(f"output={options.output}")
    has_output = any(override.partition("=")[0].strip() == "output" for override in overrides)
    if options.resume and source is None:
        if not has_output:
            raise ValueError("--resume needs to know which run: give --output DIR, or the --recipe or --config it used")
        output = Path(load_config(None, [o for o in overrides if o.partition("=")[0].strip() == "output"]).output)
        source = output / "config.yaml"
        if not source.is_file():
            raise FileNotFoundError(f"nothing to resume: {output} holds no config.yaml of a run")
        if not options.trust:
            refuse_foreign(source, load_config(source, overrides, preset=options.preset), overrides)
    config = load_config(source, overrides, preset=options.preset)
    if not has_output:
        # The recipe's folder is for the recipe's own settings: runs to be compared must not share one.
        differs = options.method and load_config(source, preset=options.preset).method != options.method
        names = [options.preset or "", options.method.replace("+", "-") if differs else ""]
        folder = "-".join([config.output, *filter(None, names)])
        config = load_config(source, [*overrides, f"output={folder}"], preset=options.preset)
    return config


def _accuracy(evaluation: Point) -> str:
    error = "" if evaluation.stderr is None else f" ± {100 * evaluation.stderr:.1f}"
    return percent(evaluation.accuracy) + error


def _identity(output: Path) -> tuple[int, int] | None:
    """What tells the runs begun in a folder apart, each of which writes its own config.yaml; None without one."""
    try:
        status = (output / "config.yaml").stat()
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns


def _let_main_speak(is_main: bool) -> None:
    """Let the main process end first: a launcher ends the others as soon as one has ended with an error."""
    if not is_main:
        time.sleep(_LAST_WORDS)


def _say_how_to_resume(config: TrainConfig, earlier: tuple[int, int] | None) -> None:
    """Say what is left of an interrupted run; ``earlier`` is the run that it was to overwrite."""
    from edge_grpo.run import checkpoint

    output = Path(config.output)
    trust = " --trust" if reaching_out(config) else ""
    found = checkpoint.steps(output / "checkpoints")
    if earlier is not None and _identity(output) == earlier:
        remedy = f"the run had not begun; the earlier one in {output} is as it was"
    elif found:
        remedy = f"step {found[-1]} is saved; continue with\n  edge-grpo train --resume --output {output}{trust}"
    else:
        remedy = "no checkpoint had been saved yet; save_every sets the number of steps between them"
    print(f"\nInterrupted: {remedy}", file=sys.stderr)


COMMAND = Command(
    name="train",
    summary="train a model, evaluate it before and after, and write a report",
    usage="[--recipe NAME | --config FILE] [--method METHOD] [--preset NAME] [--output DIR] "
    "[--resume | --overwrite | --dry-run] [KEY=VALUE ...]",
    examples="""
        edge-grpo train --recipe tiny                    the small model shipped with the package, minutes on a CPU
        edge-grpo train --recipe tiny --method grpo      the same with plain GRPO, into its own folder, to compare
        edge-grpo train --config my.yaml optim.learning_rate=1e-5 rollout.num_generations=16
        edge-grpo train --recipe tiny --dry-run          what it would take: memory, disk, the time of a step
        edge-grpo train --resume --output runs/tiny      continue an interrupted run from its last checkpoint
        edge-grpo train --resume --output runs/tiny steps=400        continue a finished run for more steps
        accelerate launch -m edge_grpo train --config my.yaml        on several GPUs
        """,
    add_arguments=add_arguments,
    run=run,
    takes_keys=True,
    add_help=False,
    needs_something=True,
)
