"""What ``edge-grpo eval`` does: asks a model, grades a result again, or tries the grader on answer sheets.

Results go to standard output (``tables``); progress, warnings and hints go to standard error.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import platform
import sys
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import PreTrainedTokenizerBase

from edge_grpo.commands.tables import print_checks, print_result
from edge_grpo.config import TrainConfig
from edge_grpo.data.sources import load_examples, suite_sets
from edge_grpo.data.templates import Template, find_template, foreign_marks
from edge_grpo.evaluation import suite
from edge_grpo.evaluation.result import CHUNK, Protocol, Result
from edge_grpo.evaluation.sheets import check_sheets
from edge_grpo.grading.answers import Grader
from edge_grpo.policy.loading import load_model, weights_fingerprint
from edge_grpo.rollout import build_engine
from edge_grpo.run.files import write_json
from edge_grpo.text import percent
from edge_grpo.types import Example, Prompt

_PUBLISHED_TEMPERATURE = 0.1


def evaluate_model(name: str, options: argparse.Namespace, config: TrainConfig) -> int:
    """Ask a model, print the result, and keep it in ``options.json`` chunk by chunk."""
    temperature = _temperature(options, config)
    path: Path | None = options.json
    saved = _saved(path, options) if path is not None else None
    template = _template(options, config)
    sources = _sources(options, config)
    examples = _examples(sources, config)
    model, tokenizer = load_model(config.model)
    prompts, left_out = _prompts(examples, template, tokenizer, config)
    window: int | None = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    longest_prompt, longest = _lengths(prompts, config.rollout.max_completion_length, window)
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
        generations=config.eval.generations,
        temperature=temperature,
        max_tokens=config.rollout.max_completion_length,
        seed=config.seed,
        engine=config.rollout.engine,
        window=window,
        chunk=CHUNK if options.chunk is None else options.chunk,
        answer=config.reward.answer if template.name == "config" else "box",  # the others ask for a box
        reasoning=config.reward.reasoning,
        tolerance=config.reward.tolerance,
    )
    result = suite.begin(about, protocol, prompts, sources, left_out)
    if saved is not None and path is not None:
        suite.resume(result, saved, path)
    if not result.is_complete:
        module: torch.nn.Module = model
        module.to(device)
        engine = build_engine(_with_room_for(config, longest_prompt, longest), model, tokenizer)
        try:
            with _grader(config) as grader, _Bar(result) as bar:

                def after_chunk(set_name: str) -> None:
                    bar.show(set_name)
                    if path is not None:
                        result.save(path)

                suite.run(result, prompts, template, engine, tokenizer, grader, after_chunk=after_chunk)
        except KeyboardInterrupt:
            if path is not None and path.is_file():
                _say(f"\nInterrupted: the results so far are in {path}; add --resume to the command to finish it")
            raise
        finally:
            engine.close()
    print_result(result)
    if path is None and options.suite:
        _say("nothing was written; --json FILE keeps the result, to compare it with another")
    return 0


def grade_again(source: Path, options: argparse.Namespace, config: TrainConfig) -> int:
    """Grade the answers of an earlier result with the current grader, without a model."""
    asking = ("template", "sets", "k", "temperature", "max_tokens", "size", "seed", "engine", "chunk", "resume")
    if given := [f"--{name.replace('_', '-')}" for name in asking if getattr(options, name) not in (None, False)]:
        raise ValueError(f"{source} is graded again with its own settings; {', '.join(given)} cannot change them")
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
        print_result(result)
    print(f"{sum(before != after for before, after in pairs)} of {len(pairs)} outcomes changed")
    return 0


def self_check(options: argparse.Namespace, config: TrainConfig) -> int:
    """Grade a perfect answer sheet and several wrong ones; the status is 1 if any answer is misjudged."""
    _refuse_to_replace(options)
    template = _template(options, config)
    with _grader(config) as grader:
        checks = {
            name: check_sheets(examples, template, grader)
            for name, examples in _examples(_sources(options, config), config).items()
        }
    print_checks(checks)
    if options.json:
        write_json(options.json, {name: dataclasses.asdict(check) for name, check in checks.items()})
    return 0 if all(check.is_sound for check in checks.values()) else 1


def _refuse_to_replace(options: argparse.Namespace) -> None:
    if options.json and options.json.exists() and not options.overwrite:
        raise FileExistsError(f"{options.json} exists already; replace it with --overwrite, or name another file")


def _saved(path: Path, options: argparse.Namespace) -> Result | None:
    """The result to continue, None to begin a new one."""
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
    """The specifications of the sets to ask by name; without a suite one set, named by its specification."""
    if not options.suite:
        if options.sets:
            raise ValueError("--sets chooses among the sets of a suite; give --suite DIR")
        assert config.eval.data is not None
        return {config.eval.data: config.eval.data}
    found = suite_sets(options.suite)
    chosen = [name.strip() for name in options.sets.split(",")] if options.sets else list(found)
    if unknown := [name for name in chosen if name not in found]:
        raise ValueError(f"{options.suite} has no set {', '.join(map(repr, unknown))}; there are {', '.join(found)}")
    return {name: found[name] for name in chosen}


def _prompts(
    examples: Mapping[str, Sequence[Example]],
    template: Template,
    tokenizer: PreTrainedTokenizerBase,
    config: TrainConfig,
) -> tuple[dict[str, list[Prompt]], dict[str, list[int]]]:
    """The prompts of each set, and the rows that were left out for their length."""
    if marks := foreign_marks(template, tokenizer):
        _say(f"warning: {' and '.join(marks)} of template {template.name} are ordinary text to this tokenizer")
    limit = config.data.max_prompt_length
    prompts: dict[str, list[Prompt]] = {}
    left_out: dict[str, list[int]] = {}
    for name, own in examples.items():
        prompts[name], left_out[name] = template.render(own, tokenizer, limit)
        if left_out[name]:
            _say(f"{name}: left out {len(left_out[name])} prompts of more than {limit} tokens")
    return prompts, left_out


def _lengths(prompts: Mapping[str, Sequence[Prompt]], max_tokens: int, window: int | None) -> tuple[int, int]:
    """The tokens of the longest prompt and of the longest sequence, where ``window`` is the model's context length."""
    lengths = [len(prompt.token_ids) for own in prompts.values() for prompt in own]
    longest = max(lengths) + max_tokens
    if window is None or longest <= window:
        return max(lengths), longest
    if max(lengths) >= window:
        raise ValueError(
            f"the longest prompt has {max(lengths)} tokens and leaves no room for a response within the model's "
            f"context of {window}; leave such prompts out: data.max_prompt_length={window - 1}"
        )
    short = sum(length + max_tokens > window for length in lengths)
    _say(
        f"warning: {short} of {len(lengths)} prompts leave less than {max_tokens} tokens within the model's context of "
        f"{window}; their responses end there"
    )
    return max(lengths), window


def _temperature(options: argparse.Namespace, config: TrainConfig) -> float:
    """Return the temperature asked for; else the published 0.1 for a suite, and the configuration's for other data."""
    default = _PUBLISHED_TEMPERATURE if options.suite else config.eval_temperature
    temperature: float = default if options.temperature is None else options.temperature
    if not 0 <= temperature < math.inf:
        raise ValueError(f"--temperature must be a number of at least 0; got {temperature}")
    if temperature == 0 and config.eval.generations > 1:
        raise ValueError(
            f"{config.eval.generations} responses at --temperature 0 would repeat one greedy response; "
            "set --temperature above 0, or --k to 1"
        )
    return temperature


def _with_room_for(config: TrainConfig, prompt: int, whole: int) -> TrainConfig:
    """The configuration of an engine for sequences of at most ``whole`` tokens, ``prompt`` of them in the prompt."""
    data = dataclasses.replace(config.data, max_prompt_length=prompt)
    rollout = dataclasses.replace(config.rollout, max_completion_length=whole - prompt)
    return dataclasses.replace(config, data=data, rollout=rollout, method="grpo")  # no correction to make room for


def _examples(sources: Mapping[str, str], config: TrainConfig) -> dict[str, list[Example]]:
    return {
        name: load_examples(spec, config.data.columns, seed=config.seed, limit=config.eval.size)
        for name, spec in sources.items()
    }


def _grader(config: TrainConfig) -> closing[Grader]:
    return closing(Grader(timeout=config.reward.timeout, tolerance=config.reward.tolerance))


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
        correct = f"{percent(part.evaluation.accuracy)} correct" if part else ""
        self.progress.update(self.task, description=set_name, completed=done, correct=correct)


def _say(message: str) -> None:
    print(message, file=sys.stderr)
