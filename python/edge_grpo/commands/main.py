"""The command ``edge-grpo``: train, evaluate, compare, check, serve, report, info.

Parses arguments and prints; what it does lives in the modules that it imports late, so that help appears at once.
"""

from __future__ import annotations

import argparse
import dis
import json
import math
import os
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, get_args

from edge_grpo.config import Engine, Method, TrainConfig, describe, load_config, recipe_names, recipe_path
from edge_grpo.types import RolloutError

RUN_FILES = ("config.yaml", "metrics.jsonl", "completions.jsonl", "checkpoints", "final", "report.html")
# What the published evaluations on suites ask: every problem, however long, at this temperature and length.
_PUBLISHED = (
    "eval_temperature=0.1",
    "rollout.max_completion_length=3000",
    "data.eval_size=1000000000",
    "data.max_prompt_length=1000000000",
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its status.

    0; 1 where a strict check found something; 2 for a mistake in what was asked; 3 for an engine that could not
    generate; 130 for Ctrl-C.
    """
    parser, commands = _parser()
    options, rest = parser.parse_known_args(arguments)
    overrides = _overrides(commands[options.command], options, rest)
    try:
        status: int = options.run(options, overrides)
        return status
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        return 130
    except RolloutError as error:
        print(f"edge-grpo {options.command}: {error}", file=sys.stderr)
        return 3
    except (ValueError, TypeError, RuntimeError, FloatingPointError, FileNotFoundError, FileExistsError) as error:
        if not _is_for_the_user(error):
            raise
        print(f"edge-grpo {options.command}: {error}", file=sys.stderr)
        return 2


def _is_for_the_user(error: BaseException) -> bool:
    """Whether this package's own code raised the error on purpose; anything else is a bug and needs its traceback."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if trace is None:
        return False
    package = str(trace.tb_frame.f_globals.get("__name__")).partition(".")[0]
    if package not in ("edge_grpo", "edge_kernels"):
        return False
    return trace.tb_frame.f_code.co_code[trace.tb_lasti] == dis.opmap["RAISE_VARARGS"]


# ---- Arguments -----------------------------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    """A parser whose help can end in text that is made only when somebody asks for it."""

    ending: Callable[[], str] | None = None

    def format_help(self) -> str:
        return super().format_help() + (f"\n{self.ending()}" if self.ending else "")


def _parser() -> tuple[_Parser, dict[str, _Parser]]:
    parser = _Parser(
        prog="edge-grpo",
        description="Reinforcement learning of language models with EDGE-GRPO (arXiv:2507.21848).",
        epilog="`edge-grpo COMMAND --help` explains a command; for train it lists every configuration key.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"edge-grpo {_version('edge-grpo')}")
    found = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    commands: dict[str, _Parser] = {}

    def command(name: str, run: Callable[..., int], summary: str, usage: str, examples: str) -> _Parser:
        commands[name] = found.add_parser(
            name,
            help=summary,
            usage=f"edge-grpo {name} {usage}",
            description=f"{summary[0].upper()}{summary[1:]}.",
            epilog=f"examples:\n{textwrap.indent(textwrap.dedent(examples).strip(), '  ')}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        commands[name].set_defaults(run=run)
        return commands[name]

    train = command(
        "train",
        _train,
        "train a model, evaluate it before and after, and write a report",
        "[--recipe NAME | --config FILE] [--method METHOD] [--output DIR] [--resume | --overwrite] [KEY=VALUE ...]",
        """
        edge-grpo train --recipe tiny                    a small model that comes with the package, minutes on a CPU
        edge-grpo train --recipe tiny --method grpo      the same with plain GRPO, into its own folder, to compare
        edge-grpo train --config my.yaml optim.learning_rate=1e-5 rollout.num_generations=16
        edge-grpo train --resume --output runs/tiny      go on after the last checkpoint of an interrupted run
        edge-grpo train --resume --output runs/tiny steps=400        or of a finished one, to make more steps
        accelerate launch -m edge_grpo train --config my.yaml        on several GPUs
        """,
    )
    train.ending = _keys_help
    _add_source(train)
    train.add_argument("--method", choices=get_args(Method), help="short for method=...; see the key below")
    train.add_argument("--output", metavar="DIR", help="short for output=..., the run's folder")
    again = train.add_mutually_exclusive_group()
    again.add_argument(
        "--resume",
        action="store_true",
        help="continue the run in the output folder, by its own configuration unless --recipe or --config is given",
    )
    again.add_argument("--overwrite", action="store_true", help="delete an earlier run in the output folder first")

    evaluate = command(
        "eval",
        _eval,
        "measure a model on one data set or on a suite: avg@k, pass@k and maj@k with intervals, outcomes, lengths",
        "MODEL [--suite DIR | --data SPEC] [--template NAME] [--k K] [--json FILE [--resume]] [KEY=VALUE ...]",
        """
        edge-grpo eval runs/tiny                         the final model of a run, on the run's held-out data
        edge-grpo eval edge_grpo:tiny --data arithmetic@test --size 500
        edge-grpo eval my-model --data openai/gsm8k:main@test data.columns.problem=question
        edge-grpo eval Qwen/Qwen2.5-Math-1.5B --suite evaluation_suite --json base.json model.precision=bfloat16
        edge-grpo eval runs/qwen --suite evaluation_suite --k 8 --temperature 0.6 --json trained.json --resume
        edge-grpo eval trained.json --json again.json    grade the same answers again, after an update of the grader
        edge-grpo eval --self-check --suite evaluation_suite         does the grader fit the data? no model needed
        """,
    )
    kinds = "run folder, model folder, hub id, .gguf file, edge_grpo:tiny, or a result's .json, to grade it again"
    evaluate.add_argument("model", metavar="MODEL", nargs="?", help=kinds)
    data = evaluate.add_mutually_exclusive_group()
    data.add_argument("--data", metavar="SPEC", help="NAME[@SPLIT] as for data.eval (default: the run's data.eval)")
    data.add_argument(
        "--suite",
        metavar="DIR",
        help="several sets, the splits of a saved dataset or the data files of a folder, asked as the published "
        "evaluations do: all problems, template qwen_math, temperature 0.1, up to 3000 tokens",
    )
    evaluate.add_argument("--sets", metavar="A,B", help="only these sets of the suite")
    evaluate.add_argument(
        "--template",
        choices=("qwen_math", "r1", "chat", "config"),
        help="config is the prompt of training, the default without --suite",
    )
    evaluate.add_argument("--k", type=int, help="responses per example (default: eval_generations)")
    evaluate.add_argument(
        "--temperature", type=float, help="0 is greedy; default: 0.1 with --suite, rollout.temperature with --k, else 0"
    )
    evaluate.add_argument("--max-tokens", type=int, metavar="N", help="length limit of a response")
    evaluate.add_argument("--size", type=int, metavar="N", help="use at most N examples of each set")
    evaluate.add_argument("--seed", type=int, help="of the choice of examples, of sampling, and of the intervals")
    evaluate.add_argument("--engine", choices=get_args(Engine), help="short for rollout.engine=...")
    evaluate.add_argument("--chunk", type=int, metavar="N", help="examples generated and saved at a time (100)")
    evaluate.add_argument("--json", type=Path, metavar="FILE", help="write every figure, answer and outcome there")
    again = evaluate.add_mutually_exclusive_group()
    again.add_argument("--resume", action="store_true", help="finish the evaluation that FILE has begun")
    again.add_argument("--overwrite", action="store_true", help="replace FILE")
    evaluate.add_argument(
        "--self-check",
        action="store_true",
        help="grade a perfect sheet and wrong ones (0s, 1s, near misses), no model; status 1 if one is misjudged",
    )
    _add_source(evaluate)

    compare = command(
        "compare",
        _compare,
        "test whether one evaluation is better than another on the same problems",
        "A.json B.json [--json FILE]",
        "edge-grpo compare base.json trained.json",
    )
    compare.add_argument("first", metavar="A.json", type=Path, help="what edge-grpo eval --json wrote")
    compare.add_argument("second", metavar="B.json", type=Path, help="differences are B minus A")
    compare.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")

    check = command(
        "check",
        _check,
        "look through a dataset: what its rows lack, and what their own grader says of their solutions",
        "[DATA] [--model MODEL] [--size N] [--json FILE] [--strict] [--recipe NAME | --config FILE] [KEY=VALUE ...]",
        """
        edge-grpo check math.jsonl                       rows, answers and solutions
        edge-grpo check math.jsonl --model Qwen/Qwen2.5-Math-1.5B    and lengths, with this model's tokenizer
        edge-grpo check --config my.yaml --strict        a configuration's own data; status 1 when there is anything
        edge-grpo check openai/gsm8k:main data.columns.problem=question --json findings.json
        """,
    )
    check.add_argument("data", metavar="DATA", nargs="?", help="NAME[@SPLIT] as for data.train, which is the default")
    check.add_argument(
        "--model", metavar="MODEL", help="whose tokenizer counts lengths: folder, hub id, .gguf file, edge_grpo:tiny"
    )
    check.add_argument("--size", type=int, metavar="N", help="look at a random sample of N examples")
    check.add_argument("--json", type=Path, metavar="FILE", help="write every finding and the lengths there")
    check.add_argument("--strict", action="store_true", help="exit with status 1 if anything was found")
    _add_source(check)

    serve = command(
        "serve",
        _serve,
        "start the vLLM server of runs with rollout.engine=vllm-server, on this machine",
        "[--recipe NAME | --config FILE] [KEY=VALUE ...]",
        """
        edge-grpo serve --recipe smollm2-135m-server     then, elsewhere: edge-grpo train --recipe smollm2-135m-server
        CUDA_VISIBLE_DEVICES=1 edge-grpo serve --config my.yaml rollout.server=10.0.0.2:8000
        """,
    )
    _add_source(serve)

    report = command(
        "report",
        _report,
        "draw one or several runs into one HTML page that needs no server and no network",
        "RUN [RUN ...] [-o FILE]",
        """
        edge-grpo report runs/tiny                       writes runs/tiny/report.html
        edge-grpo report runs/tiny runs/tiny-grpo        both in the same charts: writes runs/report.html
        """,
    )
    report.add_argument("runs", metavar="RUN", nargs="+", type=Path, help="a run's folder, finished or not")
    report.add_argument("-o", "--output", metavar="FILE", type=Path, help="where to write the page")

    command("info", _info, "print versions, devices, recipes, and the kernels that serve here", "", "edge-grpo info")
    return parser, commands


def _add_source(parser: argparse.ArgumentParser) -> None:
    source = parser.add_mutually_exclusive_group()
    names = ", ".join(recipe_names())
    source.add_argument("--recipe", metavar="NAME", help=f"start from a recipe of the package: {names}")
    source.add_argument(
        "--config", metavar="FILE", type=Path, help="start from a YAML file, such as a run's config.yaml"
    )


# Positional arguments that may be left out: argparse then gives them the first KEY=VALUE.
_OPTIONAL_POSITIONALS = {"eval": "model", "check": "data"}


def _overrides(parser: argparse.ArgumentParser, options: argparse.Namespace, rest: Sequence[str]) -> list[str]:
    """The KEY=VALUE arguments, which may stand anywhere on the command line."""
    takes_keys = options.command in ("train", "eval", "check", "serve")
    name = _OPTIONAL_POSITIONALS.get(options.command)
    word = getattr(options, name) if name else None
    if name and word and "=" in word and not Path(word).exists():
        meant = next((other for other in rest if not other.startswith("-") and "=" not in other), None)
        rest = [word, *(other for other in rest if other is not meant)]
        setattr(options, name, meant)
    for argument in rest:
        if not takes_keys or argument.startswith("-") or "=" not in argument:
            hint = "; settings are given as KEY=VALUE" if takes_keys and not argument.startswith("-") else ""
            parser.error(f"unrecognized argument: {argument}{hint}")
    return list(rest)


def _keys_help() -> str:
    """Every configuration key with its default, laid out for this terminal."""
    width = max(60, min(120, shutil.get_terminal_size().columns))
    indent = 34

    def lines() -> Iterator[str]:
        yield "configuration keys, for YAML files (nested by the dots) and for KEY=VALUE, each with its default:"
        before = None
        first: dict[str, str] = {}
        for entry in describe():
            if before is not None and entry.key.rpartition(".")[0] != before.key.rpartition(".")[0]:
                yield ""
            left = f"  {entry.key}={_shown(entry.default)}"
            choices = entry.type.split("|")
            text = f"see {first[entry.help]}" if first.setdefault(entry.help, entry.key) != entry.key else entry.help
            if len(choices) > 2 and not all(choice in text for choice in choices):
                text = f"{text} ({', '.join(choices)})"
            wrapped = textwrap.wrap(text, width - indent, break_on_hyphens=False) or [""]
            if len(left) > indent - 2:
                yield left
            else:
                wrapped[0] = left.ljust(indent) + wrapped[0]
            start = 0 if len(left) > indent - 2 else 1
            yield from wrapped[:start]
            yield from (" " * indent + line for line in wrapped[start:])
            before = entry

    return "\n".join(lines()) + "\n"


def _shown(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return str(value).lower().replace("none", "null")
    if isinstance(value, str):
        return json.dumps(value) if value != value.strip() else value
    return "[]" if value == () else str(value)


# ---- Commands ------------------------------------------------------------------------------------------------------


def _quieten_loading() -> None:
    """Turn off transformers' bars for reading and writing weights: they take a moment and bury our own lines."""
    from transformers.utils import logging

    logging.disable_progress_bar()


def _train(options: argparse.Namespace, overrides: list[str]) -> int:
    config = _train_config(options, overrides)
    output = Path(config.output)
    is_main = int(os.environ.get("RANK", "0")) == 0
    if is_main and not options.resume:
        _claim(output, overwrite=options.overwrite)

    from edge_grpo.run.report import read_run, write_report

    _quieten_loading()
    from edge_grpo.trainer import train

    if is_main:
        rollout = config.rollout
        print(
            f"{config.method} on {config.model.path}: {config.steps} steps of {rollout.num_prompts} prompts x "
            f"{rollout.num_generations} responses, into {output}",
            file=sys.stderr,
        )
    try:
        summary = train(config, resume=options.resume)
    except KeyboardInterrupt:
        if is_main:
            _say_how_to_resume(output)
        return 130
    except (RuntimeError, FloatingPointError):
        if is_main and (output / "config.yaml").is_file():  # else the run has not begun
            _say_how_to_resume(output)
        raise
    if is_main:
        page = write_report([output])
        print()
        if evals := read_run(output).evals:  # from the log: a resumed run was evaluated before it was interrupted
            print(f"Held-out accuracy, {config.data.eval}")
            print(f"  before  {_percent(evals[0].accuracy, evals[0].stderr)}")
            gain = 100 * (evals[-1].accuracy - evals[0].accuracy)
            print(f"  after   {_percent(evals[-1].accuracy, evals[-1].stderr)}   {gain:+.1f} points")
        print(f"Steps     {summary.steps} in {_clock(summary.seconds)}")
        print(f"Model     {output / 'final'}")
        print(f"Report    {page}")
    return 0


def _train_config(options: argparse.Namespace, overrides: list[str]) -> TrainConfig:
    source = recipe_path(options.recipe) if options.recipe else options.config
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
    config = load_config(source, overrides)
    if options.method and not has_output and load_config(source).method != options.method:
        # The recipe's folder belongs to the recipe's method: runs that are to be compared must not share one.
        config = load_config(source, [*overrides, f"output={config.output}-{options.method.replace('+', '-')}"])
    return config


def _claim(output: Path, *, overwrite: bool) -> None:
    """Make sure that ``output`` holds no run, deleting what a run wrote (and nothing else) if so asked."""
    if output.exists() and not output.is_dir():
        raise FileExistsError(f"output must be a folder; {output} is a file")
    present = [output / name for name in RUN_FILES if (output / name).exists()]
    if present and not overwrite:
        raise FileExistsError(
            f"{output} already holds a run; continue it with --resume, replace it with --overwrite, or choose another "
            "folder with --output"
        )
    for path in present:
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def _say_how_to_resume(output: Path) -> None:
    from edge_grpo.run import checkpoint

    found = checkpoint.steps(output / "checkpoints")
    if found:
        remedy = f"step {found[-1]} is saved; continue with\n  edge-grpo train --resume --output {output}"
    else:
        remedy = "no checkpoint had been saved yet; save_every sets the number of steps between them"
    print(f"\nInterrupted: {remedy}", file=sys.stderr)


def _eval(options: argparse.Namespace, overrides: list[str]) -> int:
    from edge_grpo.commands import eval as eval_cli

    if options.self_check and options.model:
        raise ValueError(f"--self-check takes no model; got {options.model}")
    if options.model is None and not options.self_check:
        raise ValueError("no model to evaluate; give MODEL, or --self-check to try the grader on the data alone")
    if options.resume and not options.json:
        raise ValueError("--resume needs to know which result: give --json FILE")
    if options.model and options.model.endswith(".json"):
        source = recipe_path(options.recipe) if options.recipe else options.config
        return eval_cli.grade_again(Path(options.model), options, load_config(source, overrides))
    config, name = _eval_config(options, overrides)
    if options.self_check:
        return eval_cli.self_check(options, config)
    _quieten_loading()
    return eval_cli.evaluate_model(name, options, config)


def _compare(options: argparse.Namespace, _: list[str]) -> int:
    from edge_grpo.commands import eval as eval_cli

    return eval_cli.compare_results(options)


def _eval_config(options: argparse.Namespace, overrides: list[str]) -> tuple[TrainConfig, str]:
    """The configuration to evaluate with, and the model's name; a run's folder brings its own configuration along."""
    source = recipe_path(options.recipe) if options.recipe else options.config
    model = options.model
    run = Path(model or "")
    if model and (run / "config.yaml").is_file() and not (run / "config.json").is_file():
        source = source or run / "config.yaml"
        model = str(run / "final")
        if not Path(model).is_dir():
            raise FileNotFoundError(
                f"{run} has no final model, because the run has not ended; continue it with\n"
                f"  edge-grpo train --resume --output {run}"
            )
    given = {
        "model.path": model,
        "data.eval": options.data,
        "eval_generations": options.k,
        "eval_temperature": options.temperature,
        "rollout.max_completion_length": options.max_tokens,
        "data.eval_size": options.size,
        "rollout.engine": options.engine,
        "seed": options.seed,
    }
    shortcuts = [f"{key}={value}" for key, value in given.items() if value is not None]
    if options.suite:
        overrides = [*_PUBLISHED, *overrides]  # of those given twice the last one counts
    elif options.k is not None and options.k > 1 and options.temperature is None:
        base = load_config(
            source, [o for o in overrides if o.startswith(("rollout.temperature=", "eval_temperature="))]
        )
        shortcuts.append(f"eval_temperature={base.eval_temperature or base.rollout.temperature}")
    config = load_config(source, [*overrides, *shortcuts])
    if config.data.eval is None and not options.suite:
        raise ValueError("no data to evaluate on; give --suite DIR, or --data SPEC such as --data arithmetic@test")
    return config, model


def _check(options: argparse.Namespace, overrides: list[str]) -> int:
    given = {"data.train": options.data, "model.path": options.model}
    overrides = [*overrides, *(f"{key}={value}" for key, value in given.items() if value is not None)]
    source = recipe_path(options.recipe) if options.recipe else options.config
    has_model = source is not None or any(override.startswith("model.path=") for override in overrides)
    if source is None and options.data is None:
        raise ValueError("no data to check; give DATA, or a --recipe or --config whose data.train is to be checked")
    config = load_config(source, overrides)

    from rich.console import Console

    from edge_grpo.data.check import examine
    from edge_grpo.data.sources import load_examples
    from edge_grpo.grading.answers import Grader

    spec, columns = config.data.train, config.data.columns
    examples = load_examples(spec, columns, seed=config.seed, limit=options.size, allow_empty=True)
    tokenizer = None
    if has_model:
        from edge_grpo.policy.model import load_tokenizer

        tokenizer = load_tokenizer(config.model)
    reward = config.reward
    grader = Grader(workers=reward.workers, timeout=reward.timeout, tolerance=reward.tolerance)
    try:
        found = examine(examples, grader, config, tokenizer)
    finally:
        grader.close()
    console = Console(highlight=False, markup=False)
    console.print(f"{spec}: ", found.render(), sep="")
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"data": spec} | found.to_dict(), indent=2, ensure_ascii=False)
        options.json.write_text(text + "\n", encoding="utf-8")
    if tokenizer is None:
        console.print("\nLengths were not looked at; --model names the model whose tokenizer is to count them.")
    return 1 if options.strict and found.findings else 0


def _serve(options: argparse.Namespace, overrides: list[str]) -> int:
    source = recipe_path(options.recipe) if options.recipe else options.config
    config = load_config(source, overrides)

    _quieten_loading()
    from edge_grpo.rollout.server import serve

    serve(config)
    return 0


def _report(options: argparse.Namespace, _: list[str]) -> int:
    from edge_grpo.run.report import write_report

    print(write_report(options.runs, options.output))
    return 0


def _info(options: argparse.Namespace, _: list[str]) -> int:
    from edge_kernels import info

    for package in ("edge-grpo", "accelerate", "datasets", "math-verify", "reasoning-gym", "gguf"):
        print(f"{package:16}{_version(package)}")
    print("\nRecipes (edge-grpo train --recipe NAME)")
    for name in recipe_names():
        print(f"  {name:26}{_first_comment(recipe_path(name))}")
    print("\nKernels (edge-kernels info)")
    return info.main(["info"])


# ---- Words ---------------------------------------------------------------------------------------------------------


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _first_comment(path: Path) -> str:
    first = path.read_text(encoding="utf-8").partition("\n")[0]
    return first.lstrip("# ") if first.startswith("#") else ""


def _percent(share: float, stderr: float | None = None) -> str:
    known = stderr is not None and not math.isnan(stderr)
    return f"{100 * share:.1f}%" + (f" ± {100 * stderr:.1f}" if stderr is not None and known else "")


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"
