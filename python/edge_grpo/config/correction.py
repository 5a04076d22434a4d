"""The keys of guided error correction; those of everything else are in ``keys``."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, get_args

from edge_grpo.config.checks import did_you_mean, real, refuse, whole
from edge_grpo.text import fill, last_box

Kind = Literal["reflect", "answer", "solution", "hint"]
Scope = Literal["all", "collapsed", "one"]
LongSolution = Literal["shorter", "truncate", "skip"]
Superseded = Literal["credit", "mask"]


def _published_mix() -> dict[str, float]:
    return {"reflect": 0.5, "answer": 0.25, "solution": 0.25}


@dataclass(frozen=True)
class CorrectionConfig:
    # relative weights: reflect (the policy continues), answer (appended), solution (replaces all), hint (the first part
    # of the solution replaces all, and the policy continues); others are 0
    mix: dict[str, float] = field(default_factory=_published_mix)
    reflection_text: str = " Wait! Something is wrong here."  # what reflect and answer append
    answer_text: str = " The correct answer is \\boxed{{{answer}}}."  # what answer appends after it, with {answer}
    max_length: int = 256  # tokens that a correction may add to a response
    truncated: bool = True  # whether responses cut off by the length limit are corrected too
    max_prompt_length: int | None = None  # nothing is corrected where the prompt has more tokens (published code: 255)
    scope: Scope = "all"  # correct all wrong responses, those of collapsed groups, or one per group with none right
    max_per_group: int | None = None  # correct at most this many responses of a group, drawn at random
    long_solution: LongSolution = "shorter"  # a solution over the limit: try answer, then reflect; truncate it; or skip
    hint_min: float = 0.25  # smallest share of a solution's tokens in a hint; each hint draws its own
    hint_max: float = 0.75  # largest share; equal to hint_min for one share always
    # tokens of the wrong attempt that reflect and answer keep in the loss: credit them with the corrected response's
    # reward (paper), or mask them, so that they have no loss
    superseded: Superseded = "credit"

    def __post_init__(self) -> None:
        problems = [
            f"mix takes {', '.join(get_args(Kind))}; got {kind!r}{did_you_mean(kind, get_args(Kind))}"
            for kind in self.mix
            if kind not in get_args(Kind)
        ]
        weights = {f"mix[{kind!r}]": weight for kind, weight in self.mix.items()}
        problems += real("finite", **weights) or real(">= 0", **weights)
        if not problems and not any(self.mix.values()):
            problems.append(f"mix must not be all 0; got {self.mix}; method grpo or eda trains without correction")
        problems += whole(1, max_length=self.max_length)
        if not 0 < self.hint_min <= self.hint_max < 1:
            problems.append(
                "hint_min and hint_max must be shares between 0 and 1, the smaller first; got "
                f"{self.hint_min} and {self.hint_max}; solution in mix injects a whole solution"
            )
        for name in ("max_per_group", "max_prompt_length"):
            if (value := getattr(self, name)) is not None:
                problems += whole(1, **{name: value})
        if not self.reflection_text.strip() and (self.mix.get("reflect") or self.mix.get("answer")):
            problems.append("reflection_text must not be empty; set reflect and answer to 0 in mix to leave it out")
        filled = fill(self.answer_text, "answer", "7")
        if filled == fill(self.answer_text, "answer", "8"):
            problems.append(f"answer_text must contain {{answer}}; got {self.answer_text!r}")
        elif "\\boxed" in filled and last_box(fill(self.answer_text, "answer", "x + 7")) != "x + 7":
            problems.append(
                f"answer_text must put {{answer}} into a readable \\boxed{{}}; got {self.answer_text!r}, which makes "
                f"{filled!r} of the answer 7; double the braces that must remain: \\boxed{{{{{{answer}}}}}}"
            )
        refuse(problems)

    @property
    def reflect(self) -> float:
        """The probability of appending the reflection prompt and letting the policy go on."""
        return self._probability("reflect")

    @property
    def answer(self) -> float:
        """The probability of appending the reflection prompt and the right answer."""
        return self._probability("answer")

    @property
    def solution(self) -> float:
        """The probability of replacing the response by the reference solution."""
        return self._probability("solution")

    @property
    def hint(self) -> float:
        """The probability of replacing the response by the first part of the solution, which the policy continues."""
        return self._probability("hint")

    def _probability(self, kind: Kind) -> float:
        return self.mix.get(kind, 0.0) / sum(self.mix.values())
