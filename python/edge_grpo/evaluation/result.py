"""What an evaluation over one or several sets has found, and the JSON file that keeps it.

Running, resuming and grading again are ``suite``; the estimates come from ``estimators``; printing is ``commands``'.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edge_grpo.config.seeds import derive_seed
from edge_grpo.evaluation.estimators import LEVEL, RESAMPLES, Estimate, averages
from edge_grpo.evaluation.evaluate import Evaluation, ExampleResult
from edge_grpo.run.files import finite, write_text
from edge_grpo.text import AnswerStyle, Reasoning

FORMAT = 2
CHUNK = 100  # problems
_KIND = "edge-grpo evaluation"


@dataclass(frozen=True)
class Protocol:
    """How a model is asked and its answers are judged. ``template`` is ``Template.to_dict``.

    A response has at most ``max_tokens``, and with its prompt at most ``window``, the model's context length (None: not
    known). ``chunk`` problems at a time are generated and saved; each chunk has its own seed, so that another size
    draws other responses. ``answer``, ``reasoning`` and ``tolerance`` mean what they mean in the configuration's
    section ``reward``.
    """

    template: Mapping[str, Any]
    generations: int
    temperature: float
    max_tokens: int
    seed: int
    engine: str
    window: int | None = None
    chunk: int = CHUNK
    answer: AnswerStyle = "box"
    reasoning: Reasoning = "auto"
    tolerance: float = 0.0

    def __post_init__(self) -> None:
        if self.chunk < 1:
            raise ValueError(f"chunk must be at least 1; got {self.chunk}")


@dataclass
class SetResult:
    """One set: its source, the rows that were left out for their length, and what has been found so far."""

    data: str
    fingerprint: str  # of the problems and accepted answers that are asked
    problems: int  # their number
    left_out: list[int]
    evaluation: Evaluation

    @property
    def is_complete(self) -> bool:
        return len(self.evaluation.results) == self.problems


@dataclass
class Result:
    """A whole evaluation. ``model`` names the weights and their fingerprint; versions are by package."""

    model: dict[str, Any]
    protocol: Protocol
    sets: dict[str, SetResult]
    versions: dict[str, str]  # of what generated
    grader: dict[str, str]  # of what graded

    @property
    def is_complete(self) -> bool:
        return all(part.is_complete for part in self.sets.values())

    def estimates(self) -> tuple[dict[str, dict[str, Estimate]], dict[str, Estimate], dict[str, Estimate]]:
        """Return every quantity with its interval: of each set, over all problems (micro), over the sets (macro)."""
        quantities = {name: part.evaluation.quantities() for name, part in self.sets.items()}
        return averages(quantities, lambda name: derive_seed(self.protocol.seed, "bootstrap", name), (0.0, 1.0))

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON. A complete result has statistics for its readers; ``from_dict`` does not read them."""
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
                own["lengths"] = {key: finite(value) for key, value in found.lengths().items()}
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
        write_text(path, text + "\n")

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


def _plain(estimates: Mapping[str, Estimate]) -> dict[str, Any]:
    return {name: {key: finite(v) for key, v in estimate._asdict().items()} for name, estimate in estimates.items()}
