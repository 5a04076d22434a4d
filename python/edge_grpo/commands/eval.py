"""What the commands ``edge-grpo eval`` and ``edge-grpo compare`` do once their arguments are read, and what they print.

Results go to standard output; progress, warnings and hints go to standard error.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import platform
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from edge_grpo.config import TrainConfig
from edge_grpo.data.sources import load_examples, suite_sets
from edge_grpo.data.templates import Template, find_template, foreign_marks
from edge_grpo.evaluation import suite
from edge_grpo.evaluation.compare import Comparison, Row, compare
from edge_grpo.evaluation.estimators import Estimate
from edge_grpo.evaluation.suite import Protocol, Result, SheetCheck
from edge_grpo.grading.answers import Grader
from edge_grpo.policy.model import load_model, weights_fingerprint
from edge_grpo.rollout import build_engine
from edge_grpo.types import Example, Prompt

_ROWS_SHOWN = 12


def evaluate_model(name: str, options: argparse.Namespace, config: TrainConfig) -> int:
    """Ask a model, print what came out, and keep it in ``options.json`` chunk by chunk."""
    path: Path | None = options.json
    saved = _saved(path, options) if path is not None else None
    template = _template(options, config)
    sources = _sources(options, config)
    examples = _examples(sources, config)
    model, tokenizer = load_model(config.model)
    if marks := foreign_marks(template, tokenizer):
        _say(f"warning: {' and '.join(marks)} of template {template.name} are ordinary text to this tokenizer")
    prompts: dict[str, list[Prompt]] = {}
    left_out: dict[str, list[int]] = {}
    for set_name, own in examples.items():
        prompts[set_name], left_out[set_name] = template.render(own, tokenizer, config.data.max_prompt_length)
        if left_out[set_name]:
            limit = config.data.max_prompt_length
            _say(f"{set_name}: left out {len(left_out[set_name])} prompts of more than {limit} tokens")
    max_tokens = config.rollout.max_completion_length
    lengths = [len(prompt.token_ids) for own in prompts.values() for prompt in own]
    window: int | None = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    longest = max(lengths) + max_tokens  # of prompt and response together
    if window is not None and longest > window:
        if max(lengths) >= window:
            raise ValueError(
                f"the longest prompt has {max(lengths)} tokens and leaves no room for a response within the {window} "
                f"that the model was made for; leave such prompts out: data.max_prompt_length={window - 1}"
            )
        short = sum(length + max_tokens > window for length in lengths)
        _say(
            f"warning: {short} of {len(lengths)} prompts leave less than {max_tokens} tokens within the {window} that "
            "the model was made for; their responses end there"
        )
        longest = window
    device = "cuda" if torch.cuda.is_available() else "cpu"
    about = {
        "name": name,
        "weights": weights_fingerprint(model),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "precision": config.model.precision,
        "device": torch.cuda.get_device_name() if device == "cuda" else f"cpu ({platform.machine()})",
    }
    protocol = Protocol(
        template=template.to_dict(),
        generations=config.eval_generations,
        temperature=config.eval_temperature,
        max_tokens=max_tokens,
        seed=config.seed,
        engine=config.rollout.engine,
        window=window,
        chunk=suite.CHUNK if options.chunk is None else options.chunk,
    )
    result = suite.begin(about, protocol, prompts, sources, left_out)
    if saved is not None and path is not None:
        suite.resume(result, saved, path)
    if not result.is_complete:
        module: torch.nn.Module = model
        module.to(device)
        engine = build_engine(_with_room_for(config, max(lengths), longest), model, tokenizer)
        try:
            with _grader(config) as grader, _Bar(result) as bar:

                def after_chunk(set_name: str) -> None:
                    bar.show(set_name)
                    if path is not None:
                        result.save(path)

                suite.run(result, prompts, template, engine, tokenizer, grader, after_chunk=after_chunk)
        except KeyboardInterrupt:
            if path is not None and path.is_file():
                _say(f"\nInterrupted: what was found is in {path}; add --resume to the command to finish it")
            raise
        finally:
            engine.close()
    _print_result(result)
    if path is None and options.suite:
        _say("nothing was written; --json FILE keeps the result, to compare it with another")
    return 0


def grade_again(source: Path, options: argparse.Namespace, config: TrainConfig) -> int:
    """Grade the answers of an earlier result with the present grader, without a model."""
    asking = ("template", "sets", "k", "temperature", "max_tokens", "size", "seed", "engine", "chunk", "resume")
    if given := [f"--{name.replace('_', '-')}" for name in asking if getattr(options, name) not in (None, False)]:
        raise ValueError(f"{source} is graded again as it was asked; {', '.join(given)} cannot change that")
    saved = Result.load(source)
    _refuse_to_replace(options)
    data = {name: part.data for name, part in saved.sets.items()}
    if options.suite:
        data |= {name: spec for name, spec in suite_sets(options.suite).items() if name in data}
    elif options.data and len(data) == 1:
        data = dict.fromkeys(data, options.data)
    examples = {}
    for name, spec in data.items():
        part = saved.sets[name]
        limit = part.problems + len(part.left_out)
        examples[name] = load_examples(spec, config.data.columns, seed=saved.protocol.seed, limit=limit)
    with _grader(config) as grader:
        result = suite.grade_again(saved, examples, grader)
    pairs = [
        (before, after)
        for name in saved.sets
        for old, new in zip(saved.sets[name].evaluation.results, result.sets[name].evaluation.results, strict=True)
        for before, after in zip(old.outcomes, new.outcomes, strict=True)
    ]
    if options.json:
        result.save(options.json)
    if result.is_complete:
        _print_result(result)
    print(f"{sum(before != after for before, after in pairs)} of {len(pairs)} outcomes changed")
    return 0


def self_check(options: argparse.Namespace, config: TrainConfig) -> int:
    """Grade a perfect and several wrong answer sheets; the status is 1 if any answer is misjudged."""
    _refuse_to_replace(options)
    template = _template(options, config)
    with _grader(config) as grader:
        checks = {
            name: suite.check_sheets(examples, template, grader)
            for name, examples in _examples(_sources(options, config), config).items()
        }
    _print_checks(checks)
    if options.json:
        _write(options.json, {name: dataclasses.asdict(check) for name, check in checks.items()})
    return 0 if all(check.is_sound for check in checks.values()) else 1


def compare_results(options: argparse.Namespace) -> int:
    """Print whether the second result is better than the first, and by how much."""
    if options.json and options.json.resolve() in (options.first.resolve(), options.second.resolve()):
        raise ValueError(f"--json {options.json} is one of the results; name another file")
    first, second = Result.load(options.first), Result.load(options.second)
    found = compare(first, second)
    _print_comparison(found, first, second)
    if options.json:
        _write(options.json, {"first": str(options.first), "second": str(options.second)} | found.to_dict())
    return 0


# ---- What is asked -------------------------------------------------------------------------------------------------


def _refuse_to_replace(options: argparse.Namespace) -> None:
    if options.json and options.json.exists() and not options.overwrite:
        raise FileExistsError(f"{options.json} exists already; replace it with --overwrite, or name another file")


def _saved(path: Path, options: argparse.Namespace) -> Result | None:
    """The result to go on with, None to begin anew."""
    if not path.exists() or options.overwrite:
        return None
    if not options.resume:
        raise FileExistsError(
            f"{path} exists already; finish it with --resume, replace it with --overwrite, or name another file"
        )
    return Result.load(path)


def _template(options: argparse.Namespace, config: TrainConfig) -> Template:
    return find_template(options.template or ("qwen_math" if options.suite else "config"), config.data)


def _sources(options: argparse.Namespace, config: TrainConfig) -> dict[str, str]:
    """The sets to ask by name; without a suite one set, called by its own specification."""
    if not options.suite:
        if options.sets:
            raise ValueError("--sets chooses among the sets of a suite; give --suite DIR")
        assert config.data.eval is not None
        return {config.data.eval: config.data.eval}
    found = suite_sets(options.suite)
    chosen = [name.strip() for name in options.sets.split(",")] if options.sets else list(found)
    if unknown := [name for name in chosen if name not in found]:
        raise ValueError(f"{options.suite} has no set {', '.join(map(repr, unknown))}; there are {', '.join(found)}")
    return {name: found[name] for name in chosen}


def _with_room_for(config: TrainConfig, prompt: int, whole: int) -> TrainConfig:
    """The configuration of an engine for sequences of at most ``whole`` tokens, ``prompt`` of them the prompt's."""
    data = dataclasses.replace(config.data, max_prompt_length=prompt)
    rollout = dataclasses.replace(config.rollout, max_completion_length=whole - prompt)
    return dataclasses.replace(config, data=data, rollout=rollout, gec=False)  # no correction to make room for


def _examples(sources: Mapping[str, str], config: TrainConfig) -> dict[str, list[Example]]:
    return {
        name: load_examples(spec, config.data.columns, seed=config.seed, limit=config.data.eval_size)
        for name, spec in sources.items()
    }


@contextmanager
def _grader(config: TrainConfig) -> Iterator[Grader]:
    reward = config.reward
    grader = Grader(workers=reward.workers, timeout=reward.timeout, tolerance=reward.tolerance)
    try:
        yield grader
    finally:
        grader.close()


class _Bar:
    """The progress over all sets, on a terminal only."""

    def __init__(self, result: Result) -> None:
        self.result = result
        console = Console(stderr=True)
        self.progress = Progress(
            TextColumn("{task.description}"),
            MofNCompleteColumn(),
            BarColumn(bar_width=20),
            TimeRemainingColumn(),
            TextColumn("{task.fields[correct]}"),
            console=console,
            disable=not console.is_terminal,
        )
        total = sum(part.problems for part in result.sets.values())
        self.task = self.progress.add_task("eval", total=total, correct="")

    def __enter__(self) -> _Bar:
        self.progress.start()
        self.show("eval")
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    def show(self, set_name: str) -> None:
        done = sum(len(part.evaluation.results) for part in self.result.sets.values())
        part = self.result.sets.get(set_name)
        correct = f"{_percent(part.evaluation.accuracy)} correct" if part else ""
        self.progress.update(self.task, description=set_name, completed=done, correct=correct)


# ---- Printing ------------------------------------------------------------------------------------------------------


def _print_result(result: Result) -> None:
    protocol = result.protocol
    k = protocol.generations
    how = "greedy" if protocol.temperature == 0 else f"temperature {protocol.temperature:g}"
    each = "1 response" if k == 1 else f"{k} responses"
    per_set, micro, macro = result.estimates()
    print(
        f"{result.model['name']}: template {protocol.template['name']}, {each} each, {how}, at most "
        f"{protocol.max_tokens} tokens, {protocol.engine}"
    )
    quantities = list(micro)
    shown = [quantities[0], *(name for name in (f"pass@{k}", f"maj@{k}") if name in quantities)]
    names = [f"avg@{k}" if name == "accuracy" and k > 1 else name for name in shown]
    table = _table("set", "problems", *names, "wrong", "unparseable", "timed out", "tokens", "cut off")
    for name, part in result.sets.items():
        found, lengths = part.evaluation.outcomes, part.evaluation.lengths()
        _row(
            table,
            name,
            str(part.problems),
            *(_interval(per_set[name][quantity]) for quantity in shown),
            *(_share(found[outcome], part.problems * k) for outcome in ("wrong", "unparseable", "timed_out")),
            _whole(lengths["mean"]),
            _percent(lengths["truncated"]),
        )
    if len(result.sets) > 1:
        table.add_section()
        total = sum(part.problems for part in result.sets.values())
        _row(table, "all problems (micro)", str(total), *(_interval(micro[quantity]) for quantity in shown))
        _row(table, "mean of sets (macro)", "", *(_interval(macro[quantity]) for quantity in shown))
    _console().print(table)
    others = [name for name in quantities if name not in shown]
    if others:
        print("  ".join(f"{name} {_percent(micro[name].value)}" for name in others) + "  over all problems")
    print("In parentheses 95 % bootstrap intervals over problems; tokens are means per response.")
    for name, part in result.sets.items():
        if part.left_out:
            print(f"{name}: {len(part.left_out)} prompts were too long and are not counted: {_rows(part.left_out)}")


def _print_comparison(found: Comparison, first: Result, second: Result) -> None:
    print(f"A  {first.model['name']}\nB  {second.model['name']}")
    k = first.protocol.generations, second.protocol.generations
    names = [f"avg@{size}" if size > 1 else "accuracy" for size in k]
    table = _table("set", "problems", f"A {names[0]}", f"B {names[1]}", "B - A", "B better", "B worse", "p")

    def add(name: str, row: Row) -> None:
        counts = [str(row.problems), _percent(row.first), _percent(row.second), _interval(row.difference, signed=True)]
        tested = not math.isnan(row.p_value)
        changed = [str(row.better), str(row.worse), _p_value(row.p_value)] if tested else ["", "", ""]
        _row(table, name, *counts, *changed)

    for name, row in found.sets.items():
        add(name, row)
    if len(found.sets) > 1:
        table.add_section()
        add("all problems (micro)", found.micro)
        add("mean of sets (macro)", found.macro)
    _console().print(table)
    for quantity, difference in found.others.items():
        print(f"{quantity}, all problems: {_interval(difference, signed=True)} points")
    print(
        "B - A in points with paired 95 % bootstrap intervals; p from the exact sign-flip test over problems"
        + (" (McNemar's)" if k == (1, 1) else "")
        + (", not adjusted for testing several sets." if len(found.sets) > 1 else ".")
    )
    for note in found.notes:
        print(f"note: {note}")


def _print_checks(checks: Mapping[str, SheetCheck]) -> None:
    table = _table(
        "set", "problems", "perfect", "wrong", "all 0", "all 1", "x 1.001", "misjudged", "text only", "no answer"
    )
    for name, check in checks.items():
        total = sum(check.gold.values())
        _row(
            table,
            name,
            str(total + len(check.unanswered)),
            *(_share(sheet["correct"], total) for sheet in check.sheets),
            str(len(check.rejected) + len(check.accepted)),
            str(len(check.text_only)),
            str(len(check.unanswered)),
        )
    _console().print(table)
    for name, check in checks.items():
        for rows, what in (
            (check.rejected, "the grader rejects the data's own answer"),
            (check.accepted, "the grader accepts a wrong answer"),
            (check.text_only, "not read as mathematics, so equal text alone is accepted"),
            (check.unanswered, "no answer"),
        ):
            if rows:
                print(f"{name}: {what}: {_rows(rows)}")


def _table(first: str, *others: str) -> Table:
    table = Table(box=None, padding=(0, 1), pad_edge=False)
    table.add_column(first, no_wrap=True)
    for name in others:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _row(table: Table, *cells: str) -> None:
    table.add_row(*map(Text, cells))  # Text: a name in square brackets is no markup


def _console() -> Console:
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=160)


def _interval(estimate: Estimate, *, signed: bool = False) -> str:
    if math.isnan(estimate.value):
        return "-"
    value, low, high = (f"{100 * number:{'+' if signed else ''}.1f}" for number in estimate)
    return f"{value} ({low} to {high})" if signed else f"{value}% ({low}-{high})"


def _percent(share: float) -> str:
    return "-" if math.isnan(share) else f"{100 * share:.1f}%"


def _share(count: int, total: int) -> str:
    return _percent(count / total if total else math.nan)


def _whole(number: float) -> str:
    return "-" if math.isnan(number) else f"{number:,.0f}"


def _p_value(value: float) -> str:
    return f"{value:.3f}" if value >= 0.001 else f"{value:.0e}"


def _rows(rows: Sequence[int]) -> str:
    more = f", and {len(rows) - _ROWS_SHOWN} more" if len(rows) > _ROWS_SHOWN else ""
    return f"row{'s' if len(rows) > 1 else ''} {', '.join(map(str, rows[:_ROWS_SHOWN]))}{more}"


def _write(path: Path, tree: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(tree, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def _say(message: str) -> None:
    print(message, file=sys.stderr)
