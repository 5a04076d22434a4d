r"""What people and models write, as the LaTeX that the comparison reads: one table of rules, applied in order.

Nothing here decides whether answers are equal, and no rule changes what an answer means. Taking off delimiters and
boxes is ``edge_grpo.text``.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable
from fractions import Fraction
from functools import lru_cache

from edge_grpo.text import bare_answer

# Of longer answers only blanks and delimiters are normalized, and they are not given to math-verify. No answer of the
# usual benchmarks has more than 204 characters, and the time that parsing takes grows much faster than the length.
MAX_ANSWER_LENGTH = 1000

_SUPERSCRIPTS = dict(zip("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁽⁾ⁿⁱ", "0123456789+-()ni", strict=True))
_SUBSCRIPTS = dict(zip("₀₁₂₃₄₅₆₇₈₉₊₋₍₎", "0123456789+-()", strict=True))
_CHARACTERS = str.maketrans(
    dict.fromkeys("\u00ad\u200b\u200c\u200d\u200e\u200f\u2060\ufeff", "")  # no width
    | dict.fromkeys("‐‑‒–—―−﹣－", "-")
    | {"’": "'", "‘": "'", "′": "'", "″": "''", "“": '"', "”": '"', "…": r"\ldots ", "⋯": r"\ldots "}
    | {"°": r"^\circ ", "º": r"^\circ ", "℃": r"^\circ C", "℉": r"^\circ F", "％": r"\%"}
    | {"×": r"\times ", "·": r"\cdot ", "⋅": r"\cdot ", "∙": r"\cdot ", "÷": "/", "⁄": "/", "∕": "/", "±": r"\pm "}
    | {"∓": r"\mp ", "≤": r"\leq ", "⩽": r"\leq ", "≥": r"\geq ", "⩾": r"\geq ", "≠": r"\neq ", "≈": r"\approx "}
    | {"∞": r"\infty ", "∅": r"\emptyset ", "∪": r"\cup ", "∩": r"\cap ", "∈": r"\in ", "∖": r"\setminus "}
    | {"ℝ": r"\mathbb{R}", "ℤ": r"\mathbb{Z}", "ℕ": r"\mathbb{N}", "ℚ": r"\mathbb{Q}", "ℂ": r"\mathbb{C}"}
    | {"∠": r"\angle ", "⌊": r"\lfloor ", "⌋": r"\rfloor ", "⌈": r"\lceil ", "⌉": r"\rceil ", "∣": r"\mid "}
    | {"⟨": r"\langle ", "⟩": r"\rangle ", "≡": r"\equiv ", "ℏ": r"\hbar ", "ϕ": r"\phi ", "ϵ": r"\epsilon "}
)
_GREEK = re.compile(r"[αβγδεζηθικλμνξπρστυφχψωΓΔΘΛΞΠΣΥΦΨΩ]")
_VULGAR_FRACTION = re.compile(r"(\d*)\s*([¼½¾⅐⅑⅒⅓⅔⅕⅖⅗⅘⅙⅚⅛⅜⅝⅞])")
_ROOT = re.compile(r"([√∛∜])\s*(?:\(([^()]*)\)|(\d+(?:\.\d+)?|[A-Za-z]))")
_ROOTS = {"√": "", "∛": "[3]", "∜": "[4]"}

# Names that are written without a backslash, where every word of an answer is one of them.
_FUNCTIONS = "sqrt sin cos tan cot sec csc arcsin arccos arctan sinh cosh tanh ln log exp"
_NAMES = (
    f"{_FUNCTIONS} pi infty alpha beta gamma delta epsilon theta lambda mu rho sigma tau phi omega pm leq geq neq cdot"
)
_PLAIN = {name: "\\" + name for name in _NAMES.split()} | dict.fromkeys(("infinity", "inf", "oo"), r"\infty")
_WORD = re.compile(r"(?<![A-Za-z\\])[A-Za-z]{2,}")
_TEXT = r"text(?:bf|it|rm|normal|sf|tt)?|mbox|hbox|math(?:rm|bf|it|sf|tt)"
_SCALES = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}


def normalize(answer: str) -> str:
    r"""An answer in one spelling of the many that mean the same: ``½`` and ``\dfrac12`` as ``\frac{1}{2}``."""
    text = " ".join(bare_answer(answer).split())
    return text if len(text) > MAX_ANSWER_LENGTH else _normalized(text)


@lru_cache(1 << 14)
def _normalized(text: str) -> str:
    text = bare_answer(_without_unicode(text))
    for pattern, replacement in _RULES:
        text = pattern.sub(replacement, text)
    return _with_commands(_without_braces(" ".join(text.split())))


def _without_unicode(text: str) -> str:
    """The text with LaTeX or ASCII for characters that mathematics and typography have."""
    if text.isascii():
        return text
    text = re.sub(f"[{''.join(_SUPERSCRIPTS)}]+", lambda m: f"^{{{''.join(_SUPERSCRIPTS[c] for c in m[0])}}}", text)
    text = re.sub(f"[{''.join(_SUBSCRIPTS)}]+", lambda m: f"_{{{''.join(_SUBSCRIPTS[c] for c in m[0])}}}", text)
    text = _VULGAR_FRACTION.sub(_vulgar_fraction, text.translate(_CHARACTERS))
    text = _ROOT.sub(lambda m: rf"\sqrt{_ROOTS[m[1]]}{{{m[2] if m[2] is not None else m[3]}}}", text)
    text = _GREEK.sub(lambda m: f"{_greek_command(m[0])} ", text)
    return unicodedata.normalize("NFKC", text)  # full-width and styled letters, digits and signs; every kind of blank


def _greek_command(letter: str) -> str:
    name = unicodedata.name(letter).rpartition("LETTER ")[2].removeprefix("FINAL ").lower().replace("lamda", "lambda")
    return "\\" + (name.capitalize() if letter.isupper() else name)


def _vulgar_fraction(match: re.Match[str]) -> str:
    value = Fraction(unicodedata.numeric(match[2])).limit_denominator(10)
    return rf"{match[1]}\frac{{{value.numerator}}}{{{value.denominator}}}"


def _mixed_number(match: re.Match[str]) -> str:
    sign, whole, over, under = match["sign"], int(match["whole"]), int(match["over"]), int(match["under"])
    return rf"{sign}\frac{{{whole * under + over}}}{{{under}}}"


def _recurring_decimal(match: re.Match[str]) -> str:
    """``0.1\\overline{6}`` as the fraction that it is."""
    whole, start, block = match["whole"] or "0", match["start"], match["block"]
    nines = 10 ** len(block) - 1
    value = (int(whole + start) * nines + int(block)) / Fraction(nines * 10 ** len(start))
    return rf"\frac{{{value.numerator}}}{{{value.denominator}}}"


def _without_separators(match: re.Match[str]) -> str:
    return re.sub(r"[^\d.+-]", "", match[0])


def _without_commas(match: re.Match[str]) -> str:
    return match[0].replace(",", "")


def _scaled(match: re.Match[str]) -> str:
    return rf"{match[1]} \times 10^{{{_SCALES[match[3]]}}}{match[2] or ''}"


_Replacement = str | Callable[[re.Match[str]], str]
_DIGITS = r"\d{1,18}"
_LETTER = r"((?<![A-Za-z\\])[A-Za-z]|\\[A-Za-z]+)"
_TABLE: list[tuple[str, _Replacement]] = [
    # What surrounds an answer.
    (r"^(\*\*|__|\*|`+)(?P<inside>[^*_`]+)\1$", r"\g<inside>"),
    (r"^\s*(?:=|\\approx(?![A-Za-z])|\\simeq(?![A-Za-z]))\s*", ""),
    # Layout.
    (r"\\(?:left|right)(?:\s*\.|(?![A-Za-z]))|\\[Bb]igg?[lrm]?(?![A-Za-z])", ""),
    (r"\\(?:displaystyle|textstyle|scriptstyle|limits|nolimits)(?![A-Za-z])", ""),
    (r"\\!|(?<=\d)\\,(?=\d{3}(?!\d))", ""),  # 10,\!000 and 10\,000
    (r"\{,\}", ","),
    (r"(?<!\\)\\(?=\s|$)|\\[,;:>]|\\q?quad(?![A-Za-z])|~", " "),
    (r"(?:\s|\\\\)+$", ""),
    (r"\\[dtc]frac(?![A-Za-z])", r"\\frac"),
    (r"\\[dt]binom(?![A-Za-z])", r"\\binom"),
    (r"\\frac\s*(\d)\s*(\d)", r"\\frac{\1}{\2}"),
    (r"\\frac\s*(\d)\s*\{", r"\\frac{\1}{"),
    (r"\\frac\s*\{([^{}]*)\}\s*(\d)", r"\\frac{\1}{\2}"),
    (r"\\sqrt\s*(\d)", r"\\sqrt{\1}"),
    (r"\\mathrm\s*\{([dei])\}", r"\1"),
    (r"\{\\(?:rm|bf|it)\s+([^{}]*)\}", r"\\text{\1}"),
    (rf"\\(?:{_TEXT})\s*\{{", r"\\text{"),
    # Synonyms.
    (r"\\textdollar(?![A-Za-z])\s*", r"\\$"),
    (r"\*\*", "^"),
    (r"<=|\\le(?:qslant)?(?![A-Za-z])", r"\\leq "),
    (r">=|\\ge(?:qslant)?(?![A-Za-z])", r"\\geq "),
    (r"(?<=\s)!=|\\ne(?![A-Za-z])", r"\\neq "),  # 5!=120 has a factorial
    (r"\\infin(?![A-Za-z])", r"\\infty "),
    (r"\\lt(?![A-Za-z])", "<"),
    (r"\\gt(?![A-Za-z])", ">"),
    (r"\\(?:varnothing|empty|O)(?![A-Za-z])|\\\{\s*\\\}", r"\\emptyset "),
    (r"\\lbrace(?![A-Za-z])", r"\\{"),
    (r"\\rbrace(?![A-Za-z])", r"\\}"),
    (r"\\colon(?![A-Za-z])", ":"),
    (r"\\[lr]?vert(?![A-Za-z])", "|"),
    (r"\\c?dots(?![A-Za-z])|\\ldots(?=[A-Za-z])|(?<!\.)\.{3}(?!\.)", r"\\ldots "),
    (r"\\degree(?![A-Za-z])|\^\s*\{\s*\\circ\s*\}|\^\s*\\circ|(?<=\d)\s*\\circ(?![A-Za-z])", r"^\\circ "),
    # math-verify drops an apostrophe, and takes \prime for a power.
    (rf"{_LETTER}(?:''|\^\s*\{{\s*\\prime\s*\\prime\s*\}})", r"\1_{ppr}"),
    (rf"{_LETTER}(?:'(?![A-Za-z'])|\^\s*(?:\{{\s*\\prime\s*\}}|\\prime(?![A-Za-z])))", r"\1_{pr}"),
    # Numbers.
    (r"^[+-]?\d{1,3}(?:[ ']\d{3})+(?:\.\d+)?$", _without_separators),  # 1 234
    (r"(?<![\w.}\\])\.(?=\d)", "0."),
    (r"^\+\s*(?=\d)", ""),
    (
        rf"(?P<whole>\d{{0,9}})\.(?P<start>\d{{0,9}})\\(?:overline|bar|dot)\s*\{{(?P<block>{_DIGITS})\}}",
        _recurring_decimal,
    ),
    (rf"(?P<whole>\d{{1,9}})\.(?P<start>\d{{0,9}})\((?P<block>{_DIGITS})\)", _recurring_decimal),
    (r"(?P<whole>\d{1,9})\.(?P<start>\d{0,9}?)(?P<block>\d{1,9}?)(?P=block){2,}\s*\\ldots", _recurring_decimal),
    (
        rf"^(?P<sign>[+-]?)\s*(?P<whole>{_DIGITS})\s*\\frac\{{(?P<over>{_DIGITS})\}}\{{(?P<under>{_DIGITS})\}}(?!\d)",
        _mixed_number,
    ),
    (
        rf"^(?P<sign>[+-]?)\s*(?P<whole>{_DIGITS})\s+(?P<over>{_DIGITS})\s*/\s*(?P<under>{_DIGITS})(?![\d.])",
        _mixed_number,
    ),
    (r"(?<![\w.])(\d+(?:\.\d*)?)[eE]\+?(-?\d+)(?![\w.])", r"\1 \\times 10^{\2}"),
    (rf"(?<![\w.])(\d[\d.,]*)\s*(\\text\{{)?\s*({'|'.join(_SCALES)})(?![A-Za-z])", _scaled),
    (r"\\text\{\s*\}", ""),
    (r"^\\text\{([^{}]*[^{}A-Za-z][^{}]*)\}$", r"\1"),
    (r"\\frac\{\\text\{([^{}]*)\}\}\{\\text\{([^{}]*)\}\}", r"\\text{\1/\2}"),
    (r"([_^])([A-Za-z0-9])(?![A-Za-z0-9])", r"\1{\2}"),
    (
        r"^(-?\\\$\s*\d{1,3}(?:,\d{3})+|-?\d{1,3}(?:,\d{3})+(?=\s*[\\%A-Za-z])|-?\d{1,3}(?:,\d{3})+\.)(?![^,]*,)",
        _without_commas,
    ),
    (r"(?<=\d)\s*\((?=\d)", r" \\cdot ("),  # math-verify reads 2(3) as a mixed number
    # What ends a sentence.
    (r"^(.*[^.\s])\s*\.$", r"\1"),
    (r"\s*[,;]$", ""),
]
_RULES = [(re.compile(pattern), replacement) for pattern, replacement in _TABLE]


def _without_braces(text: str) -> str:
    """The text without braces around all of it."""
    while text.startswith("{") and _closing(text, 0, "{}") == len(text) - 1:
        text = text[1:-1].strip()
    return text


def _with_commands(text: str) -> str:
    r"""The text with ``\pi`` for ``pi`` and so on, if it has no word that is not such a name."""
    words = _WORD.findall(re.sub(r"\\text\{[^{}]*\}|_\{[^{}]*\}", "", text))
    if not words or not all(word in _PLAIN for word in words):
        return text
    text = _WORD.sub(lambda match: _PLAIN.get(match[0], match[0]) + " ", text)
    opening = r"\sqrt ("
    while (start := text.find(opening)) >= 0:
        inside = start + len(opening)
        stop = _closing(text, inside - 1)
        if stop is None:
            return text
        text = rf"{text[:start]}\sqrt{{{text[inside:stop]}}}{text[stop + 1 :]}"
    return " ".join(re.sub(r"\\sqrt (\d+(?:\.\d+)?|[A-Za-z])", r"\\sqrt{\1}", text).split())


def _closing(text: str, start: int, brackets: str = "()") -> int | None:
    """Where the bracket that opens at ``start`` closes."""
    depth = 0
    for index in range(start, len(text)):
        if text[index] in brackets and text[index - 1 : index] != "\\":
            depth += 1 if text[index] == brackets[0] else -1
            if depth == 0:
                return index
    return None
