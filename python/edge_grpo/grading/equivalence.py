"""Whether two answers are mathematically equal, as math-verify sees it. Runs only in workers of ``answers``.

Nothing here has a limit of time or memory: the process has.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import lru_cache
from typing import Any

from math_verify import LatexExtractionConfig, parse, verify

from edge_grpo.types import Outcome

_WHOLE_ANSWER = [LatexExtractionConfig(boxed_match_priority=0)]


def load() -> Callable[[str, str], Outcome]:
    """``compare``, warmed up: the first comparison builds the grammar."""
    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that it has no limits of its own
    compare(r"\frac{1}{2}", "0.5")
    return compare


def compare(gold: str, read: str) -> Outcome:
    """The outcome of an answer that was ``read`` where ``gold`` is right; both are ``answers.normalize``d."""
    gold_parsed, read_parsed = parsed(gold), parsed(read)
    if not read_parsed:
        return "unparseable" if gold_parsed else "wrong"
    try:
        return "correct" if verify(gold_parsed, read_parsed, timeout_seconds=None, raise_on_error=True) else "wrong"
    except MemoryError:
        raise
    except Exception:  # sympy raises nearly anything, RecursionError included, on what a model may write
        return "wrong"


@lru_cache(4096)
def parsed(answer: str) -> list[Any]:
    """The mathematical readings of an answer, none if it is not mathematics.

    Only LaTeX parsing of the whole answer: math-verify's search for a plain number would take a part for the whole
    (the -17 out of ``(19,-1)(53,-17)``).
    """
    try:
        readings = parse(f"\\boxed{{{answer}}}", _WHOLE_ANSWER, parsing_timeout=None, raise_on_error=True)
    except MemoryError:
        raise
    except Exception:
        return []
    return [reading for reading in readings if not isinstance(reading, str)]
