r"""What a completion earns: the boxed answer's accuracy, its format, and the user's own functions, as a weighted sum.

``judge`` decides alone whether an answer is right; ``Rewarder`` applies it and everything else to a batch. Finding the
answer in a text is ``edge_grpo.text``.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import logging
import math
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from .config import RewardConfig
from .text import bare_answer, boxes, last_box
from .types import Example, Outcome, Prompt, Reward

_log = logging.getLogger(__name__)

RewardFunction = Callable[..., Any]

# Longer answers are not given to math-verify: no answer of the usual benchmarks has more than 204 characters, and the
# time that LaTeX takes to parse grows much faster than its length.
MAX_ANSWER_LENGTH = 1000
_TIMEOUT_SECONDS = 5
_CACHE_SIZE = 4096

_BLANKS_BY_SYMBOLS = re.compile(r"(?<![A-Za-z0-9])\s+|\s+(?![A-Za-z0-9])")
_INTEGER = re.compile(r"[+-]?\d+")
_SCIENTIFIC = re.compile(r"([+-]?\d+(?:\.\d*)?)[eE]([+-]?\d+)")
_TEXT_COMMAND = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|operatorname)\s*\{([^{}]*)\}")
# Words, or several bare numbers in a row: math-verify would read "tea" as t * e * a, which equals "eat", and "0 1" as
# a product or a mixed number.
_WORDS = re.compile(r"""(?=.*[A-Za-z]{4})[A-Za-z][A-Za-z\s.,;:!?'"-]*""", re.DOTALL)
_NUMBER_ROW = re.compile(r"[+-]?\d+(?:\s+[+-]?\d+)+")


class Rewarder:
    """Judges batches of completions. Use it from one thread at a time; ``close`` when done.

    A function of the user is named by a dotted path, ``package.module:function`` (the working directory is searched
    last), and is called as in TRL: ``f(prompts=[...], completions=[...], **columns)`` with one list entry per
    completion and the dataset's columns by name (``problem``, ``answer``, ``solution`` and the row's others). Of these
    it receives those that it has parameters for, or all with ``**kwargs``. It returns one number per completion; None
    says that the function does not apply and counts as 0.
    """

    def __init__(self, config: RewardConfig) -> None:
        self.config = config
        self._functions = {path: _import_function(path) for path in config.functions}
        self._judge = lru_cache(_CACHE_SIZE)(judge)

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Raise ValueError for a prompt that cannot be judged: one without an answer, when accuracy has a weight."""
        if not self.config.accuracy:
            return
        missing = [prompt.example.index for prompt in prompts if prompt.example.answer is None]
        if missing:
            rows = ", ".join(map(str, missing[:5])) + (", ..." if len(missing) > 5 else "")
            raise ValueError(
                f"reward.accuracy is {self.config.accuracy}, but {len(missing)} of {len(prompts)} examples have no "
                f"answer to compare with (row {rows}); name the column with data.columns.answer, remove the rows, or "
                "set reward.accuracy to 0 and judge with reward.functions"
            )

    def __call__(self, prompts: Sequence[Prompt], completions: Sequence[str]) -> list[Reward]:
        r"""Return what each completion earns for its prompt (prompts repeat over a group).

        ``parts`` always has "accuracy" and "format", 0 or 1, and an entry per function, named by its path, whatever
        their weights. A completion whose prompt has no answer is "unparseable": nothing is known about it (and
        ``check``'s ValueError is raised if accuracy has a weight). Judging never raises; a user function that fails
        raises RuntimeError naming it, the first sample it fails on, and the cause.
        """
        if len(prompts) != len(completions):
            raise ValueError(
                f"prompts and completions must be of one length; got {len(prompts)} and {len(completions)}; repeat "
                "a prompt for each of its completions"
            )
        if not prompts:
            return []
        self.check(prompts)
        outcomes = [
            self._judge(accepted_answers(prompt.example), last_box(completion))
            for prompt, completion in zip(prompts, completions, strict=True)
        ]
        parts = {
            "accuracy": [float(outcome == "correct") for outcome in outcomes],
            "format": [float(has_good_format(completion)) for completion in completions],
        }
        weights = {"accuracy": self.config.accuracy, "format": self.config.format} | self.config.functions
        for path, function in self._functions.items():
            parts[path] = _call(path, function, prompts, completions)
        rewards = []
        for index, outcome in enumerate(outcomes):
            own = {name: values[index] for name, values in parts.items()}
            total = math.fsum(weights[name] * value for name, value in own.items())
            rewards.append(Reward(total, own, outcome))
        return rewards

    def close(self) -> None:
        self._judge.cache_clear()


# ---- Accuracy and format -------------------------------------------------------------------------------------------


def accepted_answers(example: Example) -> tuple[str, ...]:
    """Every answer that counts as right: ``extra["accepted_answers"]`` where a row has several, else its answer."""
    several = example.extra.get("accepted_answers")
    if several:
        return tuple(several)
    return () if example.answer is None else (example.answer,)


def has_good_format(completion: str) -> bool:
    r"""Whether there is exactly one ``\boxed{...}``, closed and not blank."""
    found = boxes(completion)
    return len(found) == 1 and found[0] is not None and bool(found[0].strip())


def judge(accepted: Sequence[str], answer: str | None) -> Outcome:
    r"""Whether ``answer``, the content of a completion's last box, equals one of the accepted answers.

    "unparseable" is an answer that cannot be read: no box, an open or blank one, or text that no parser understands
    (while an accepted answer is understood); also anything when ``accepted`` is empty. Equal after ``normalize``,
    integers, words and rows of numbers are decided here; the rest by math-verify, which gets five seconds for each
    comparison on the main thread. On other threads it runs without a limit, since the limit is a signal; nor can a
    single long operation on huge integers be interrupted anywhere.
    """
    read = normalize(answer) if answer is not None else ""
    if not read:
        return "unparseable"
    outcomes = [_compare_texts(gold, read) for gold in accepted]
    for number, gold in enumerate(accepted):  # only when no text is equal, since math-verify takes its time
        if "correct" in outcomes:
            return "correct"
        outcomes[number] = outcomes[number] or _math_verify(normalize(gold), read)
    for outcome in ("correct", "timed_out", "wrong"):
        if outcome in outcomes:
            return outcome
    return "unparseable"


def normalize(answer: str) -> str:
    r"""An answer without what never changes its meaning: delimiters, ``\left``, sizes of fractions, runs of blanks."""
    text = bare_answer(answer)
    text = re.sub(r"\\[dt]frac(?![A-Za-z])", r"\\frac", text)
    text = re.sub(r"\\(?:left|right)(?:\s*\.|(?![A-Za-z]))", "", text)
    text = re.sub(r"\\!|(?<=\d)\\,(?=\d{3}(?!\d))", "", text).replace("{,}", ",")  # 10,\!000 and 10\,000 and 10{,}000
    text = re.sub(r"\\[,;:]|~", " ", text)
    text = " ".join(text.split())
    if text.endswith(".") and not text.endswith(".."):
        text = text[:-1].rstrip()
    if match := _SCIENTIFIC.fullmatch(text):
        return f"{match[1]} \\times 10^{{{match[2].lstrip('+')}}}"
    return text


def _compare_texts(gold: str, read: str) -> Outcome | None:
    """The outcome where the texts alone decide, else None."""
    right = normalize(gold)
    if _BLANKS_BY_SYMBOLS.sub("", read) == _BLANKS_BY_SYMBOLS.sub("", right):
        return "correct"
    if _INTEGER.fullmatch(read) and _INTEGER.fullmatch(right):
        return "correct" if _canonical_integer(read) == _canonical_integer(right) else "wrong"
    right_words, read_words = _without_text_command(right), _without_text_command(read)
    is_literal = "\n" in gold.strip() or _WORDS.fullmatch(right_words) or _NUMBER_ROW.fullmatch(right_words)
    if is_literal or right_words == read_words:
        return "correct" if right_words.casefold() == read_words.casefold() else "wrong"
    if len(read) > MAX_ANSWER_LENGTH:
        return "unparseable"
    return None


def _canonical_integer(text: str) -> tuple[bool, str]:
    """Sign and digits, compared as text because Python refuses to convert integers of thousands of digits."""
    digits = text.lstrip("+-").lstrip("0")
    return text.startswith("-") and bool(digits), digits


def _without_text_command(text: str) -> str:
    match = _TEXT_COMMAND.fullmatch(text)
    return " ".join(match[1].split()) if match else text


def _math_verify(gold: str, read: str) -> Outcome:
    from math_verify import verify

    try:
        with _time_limit(_TIMEOUT_SECONDS):
            gold_parsed, read_parsed = _parse(gold), _parse(read)
            if not read_parsed:
                return "unparseable" if gold_parsed else "wrong"
            is_equal = verify(gold_parsed, read_parsed, timeout_seconds=None, raise_on_error=True)
            return "correct" if is_equal else "wrong"
    except _TimeIsUp:
        return "timed_out"
    except Exception:  # sympy raises nearly anything, RecursionError included, on what a model may write
        _log.debug("math-verify failed to compare %r with %r", read, gold, exc_info=True)
        return "wrong"


@lru_cache(_CACHE_SIZE)
def _parse(answer: str) -> list[Any]:
    """The mathematical readings of an answer, none if it is not mathematics.

    Only LaTeX parsing of the whole answer: math-verify's search for a plain number would take a part for the whole
    (the -17 out of ``(19,-1)(53,-17)``).
    """
    from math_verify import LatexExtractionConfig, parse

    try:
        readings = parse(
            f"\\boxed{{{answer}}}",
            [LatexExtractionConfig(boxed_match_priority=0)],
            parsing_timeout=None,
            raise_on_error=True,
        )
    except Exception:
        _log.debug("math-verify failed to parse %r", answer, exc_info=True)
        return []
    return [reading for reading in readings if not isinstance(reading, str)]


class _TimeIsUp(BaseException):
    """Not an Exception, which sympy catches in many places."""


@contextlib.contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """Raise _TimeIsUp in the block after ``seconds``, on the main thread; elsewhere there is no limit.

    math-verify's own limit raises once, and an exception raised while a destructor or a callback of the garbage
    collector runs is lost; this one comes again every second until the block is left.
    """
    if not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: object) -> None:
        raise _TimeIsUp

    # It warns that it has no limit of its own.
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    handler = signal.signal(signal.SIGALRM, stop)
    timer = signal.setitimer(signal.ITIMER_REAL, seconds, 1.0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, signal.SIG_DFL if handler is None else handler)
        signal.setitimer(signal.ITIMER_REAL, *timer)


# ---- User functions ------------------------------------------------------------------------------------------------


def _import_function(path: str) -> RewardFunction:
    module_name, _, attribute = path.partition(":")
    here = str(Path.cwd())
    if here not in sys.path and "" not in sys.path:
        sys.path.append(here)  # console scripts do not search the working directory; last, so that it shadows nothing
    try:
        found: Any = importlib.import_module(module_name)
    except Exception as error:
        raise ValueError(
            f"reward function {path!r}: importing {module_name!r} failed with {type(error).__name__}: {error}; give a "
            "module that is installed or lies in the working directory"
        ) from error
    for name in attribute.split("."):
        if not hasattr(found, name):
            names = [key for key in dir(found) if not key.startswith("_") and callable(getattr(found, key))]
            raise ValueError(f"reward function {path!r}: there is no {name!r}; there are {', '.join(names) or 'none'}")
        found = getattr(found, name)
    if not callable(found):
        raise TypeError(f"reward function {path!r} must be callable; got {type(found).__name__}")
    function: RewardFunction = found
    return function


def _call(path: str, function: RewardFunction, prompts: Sequence[Prompt], completions: Sequence[str]) -> list[float]:
    arguments = _arguments(path, function, prompts, completions)
    try:
        values = function(**arguments)
    except Exception as error:
        index, cause = _first_failure(function, arguments, len(prompts)) or (None, error)
        where = "on the batch as a whole, on no sample alone"
        if index is not None:
            where = f"on {_sample(index, prompts, completions)}"
        raise RuntimeError(f"reward function {path!r} failed {where}: {type(cause).__name__}: {cause}") from cause
    if isinstance(values, (str, bytes, Mapping)) or not hasattr(values, "__len__"):
        raise TypeError(
            f"reward function {path!r} must return a list with a number per completion; got {type(values).__name__}"
        )
    if len(values) != len(prompts):
        raise ValueError(
            f"reward function {path!r} must return a number per completion; got {len(values)} for {len(prompts)}"
        )
    rewards = []
    for index, value in enumerate(values):
        try:
            number = 0.0 if value is None else float(value)
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number):
            raise ValueError(
                f"reward function {path!r} must return finite numbers or None; got {value!r} for "
                f"{_sample(index, prompts, completions)}"
            )
        rewards.append(number)
    return rewards


def _arguments(
    path: str, function: RewardFunction, prompts: Sequence[Prompt], completions: Sequence[str]
) -> dict[str, list[Any]]:
    """What the function is called with: of everything there is, the parameters that it has."""
    examples = [prompt.example for prompt in prompts]
    arguments: dict[str, list[Any]] = {
        name: [example.extra.get(name) for example in examples]
        for name in dict.fromkeys(key for example in examples for key in example.extra)
    }
    arguments |= {name: [getattr(example, name) for example in examples] for name in ("problem", "answer", "solution")}
    arguments |= {"prompts": [prompt.text for prompt in prompts], "completions": list(completions)}
    try:
        parameters = inspect.signature(function).parameters.values()
    except ValueError:  # some callables written in C have no signature
        return arguments
    missing = [
        parameter.name
        for parameter in parameters
        if parameter.name not in arguments
        and parameter.default is parameter.empty
        and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    ]
    if missing:
        raise ValueError(
            f"reward function {path!r} requires {', '.join(missing)}; there are {', '.join(sorted(arguments))}"
        )
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return arguments
    names = {parameter.name for parameter in parameters}
    return {name: value for name, value in arguments.items() if name in names}


def _first_failure(
    function: RewardFunction, arguments: Mapping[str, Sequence[Any]], count: int
) -> tuple[int, Exception] | None:
    """The first sample that the function fails on alone, with the exception."""
    for index in range(count):
        try:
            function(**{name: [values[index]] for name, values in arguments.items()})
        except Exception as error:
            return index, error
    return None


def _sample(index: int, prompts: Sequence[Prompt], completions: Sequence[str], limit: int = 200) -> str:
    text = completions[index]
    shown = text if len(text) <= limit else f"{text[:limit]}..."
    return f"sample {index} (row {prompts[index].example.index}), completion {shown!r}"
