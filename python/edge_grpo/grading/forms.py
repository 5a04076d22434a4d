r"""What an answer is, seen from its text: words, an option's letter, a numeral with its base, a group, an equation.

All texts are ``normalize``d. Units are ``edge_grpo.grading.units``; what the mathematics in a text is worth is
``edge_grpo.grading.symbolic``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

_BLANKS_BY_SYMBOLS = re.compile(r"(?<![A-Za-z0-9])\s+|\s+(?![A-Za-z0-9])")
_TEXT = re.compile(r"\\text\s*\{([^{}]*)\}")
_WORDS = re.compile(r"""[^\W\d_][^\W\d_\s.,;:!?'"()&/-]*(?:[\s.,;:!?'"()&/-]+[^\W\d_]+)*[\s.,;:!?'")-]*""")
_LETTERS = re.compile(r"[^\W\d_]{2,}")
_PRODUCT = re.compile(r"[b-df-hj-np-tv-z]{2,3}")  # two or three small consonants, such as xy: no word
_NUMBER_ROW = re.compile(r"[+-]?\d+(?:\s+[+-]?\d+)+")
_NUMERAL = re.compile(r"([0-9A-Z]+)\s*_\s*(?:\{\s*(\w+)\s*\}|(\d+)|\{\s*\\text\s*\{\s*(\w+)\s*\}\s*\})")
_BASE_IN_WORDS = re.compile(r"([0-9A-Z]+)\s*\(?\s*(?:in )?base[ -]*(\d+)\s*\)?")
_BASES = {"two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8, "nine": 9, "ten": 10}
_BASES |= {"eleven": 11, "twelve": 12, "sixteen": 16}
_BRACKETED_OPTION = re.compile(r"\(\s*([A-J])\s*\)\s*(?![-+*/^_!'(])(.*)|\(\s*([A-J])\s*\)\s+(-.*)")
_POINTED_OPTION = re.compile(r"([A-J])(?:\)|[.:](?=\s|$))\s*(.*)")
_ARROW = r"\s*\\(?:Long)?[Rr]ightarrow|\s*\\implies"
_OPTION_AT_END = re.compile(
    rf"(.*?[^\s,])(?:(?:\s*,|{_ARROW})?\s*\\text\s*\{{\s*\(\s*([A-J])\s*\)\s*\}}"
    rf"|(?:\s*,|{_ARROW})\s*\\text\s*\{{\s*([A-J])\s*\}}|(?:{_ARROW})\s*([A-J]))"
)
_NAMED_OPTION = re.compile(r"(?:[Oo]ption|[Cc]hoice)\s*\(?([A-J])\)?")
_THOUSANDS = re.compile(r"[+-]?\d{1,3}(?:,\d{3})+(?:\.\d+)?")
_OPENING = ("(", "[", "{", r"\{", r"\langle", r"\lfloor", r"\lceil")
_CLOSING = (")", "]", "}", r"\}", r"\rangle", r"\rfloor", r"\rceil")
_TOKEN = re.compile(r"\\[A-Za-z]+|\\.|\s+|.", re.DOTALL)
_CONJUNCTION = re.compile(r"\s*(?:,\s*)?(?<![A-Za-z\\])(?:and|or)(?![A-Za-z])\s*")
_TEXT_WITH_CONJUNCTION = re.compile(r"\\text\s*\{([^{}]*(?<![A-Za-z])(?:and|or)(?![A-Za-z])[^{}]*)\}")
_MATRIX = re.compile(r"\\begin\{([pbvBV]?)matrix\}(.*)\\end\{\1matrix\}", re.DOTALL)
_NAME = re.compile(
    r"(?:[A-Za-z]|\\[A-Za-z]+)(?:_(?:\w|\{[^{}]*\}))?(?:\([A-Za-z]\))?(?:_(?:\w|\{[^{}]*\}))?|\\text\s*\{[^{}]*\}"
)
# What an equation's left side cannot hold if it is to name what the right side is: x = 5, f(x) = 5, (m, n) = (1, 2).
_COMPUTED = re.compile(r"(?<![_\w{])\d|[+^*/-]|\\(?:frac|sqrt|times|cdot|pm)")


def without_blanks(text: str) -> str:
    """The text without the blanks that separate no letters or digits."""
    return _BLANKS_BY_SYMBOLS.sub("", text)


# ---- Words ---------------------------------------------------------------------------------------------------------


def words(text: str) -> str | None:
    """The text if it is words, without ``\\text`` and without case; None for mathematics.

    A run of two letters or more is a word (AB, cat, No), except a few small consonants (xy): a product of letters
    that stands alone is written as one, and a word is not to equal each of its anagrams.
    """
    plain = " ".join(_TEXT.sub(r" \1 ", text).split())
    has_word = _LETTERS.search(re.sub(r"\b(?:and|or)\b", "", plain))
    if not has_word or re.search(r"\d|\\", plain):
        return None
    if plain != text:
        return _folded(plain)
    if not _WORDS.fullmatch(plain) or (_PRODUCT.fullmatch(plain) and plain == text):
        return None
    return _folded(plain)


def is_number_row(text: str) -> bool:
    """Whether there are several integers with blanks between, which are no product."""
    return _NUMBER_ROW.fullmatch(text) is not None


def may_be_product(text: str) -> bool:
    """Whether words are short enough to be a product of letters, where the other answer is written as one."""
    return re.fullmatch(r"[A-Za-z]{2,3}", text) is not None


def same_words(first: str, second: str) -> bool:
    """Whether words are equal; parts between commas and "and" in any order."""
    return first == second or _parts(first) == _parts(second)


def _parts(text: str) -> list[str]:
    parts = re.split(r"[,;]|\band\b|\bor\b|&", text)
    return sorted(part.strip() for part in parts if part.strip())


def _folded(text: str) -> str:
    return text.casefold().strip().rstrip(".,;:!?").rstrip()


# ---- Options and numerals ------------------------------------------------------------------------------------------


def option(text: str) -> tuple[str, str] | None:
    """The letter of a multiple-choice answer and its value: ``(A) 5``, ``5 \\text{ (A)}``, ``B.``, ``\\text{(C)}``."""
    if match := _OPTION_AT_END.fullmatch(text):
        return match[2] or match[3] or match[4], match[1].strip()
    plain = " ".join(_TEXT.sub(r"\1 ", text).split())
    if match := _BRACKETED_OPTION.fullmatch(plain):
        return (match[1] or match[3], (match[2] or match[4] or "").strip(" ="))
    if match := _POINTED_OPTION.fullmatch(plain):
        return match[1], match[2].strip()
    if match := _NAMED_OPTION.fullmatch(plain):
        return match[1], ""
    return None


def letter(text: str) -> str | None:
    """The capital letter that an answer consists of."""
    plain = _TEXT.sub(r"\1", text).strip()
    return plain if re.fullmatch("[A-Z]", plain) else None


def numeral(text: str) -> tuple[str, int] | None:
    """The digits of a number that names its base, without leading zeros, and the base: ``1101_2``."""
    match = _NUMERAL.fullmatch(text)
    if match:
        digits, name = match[1], match[2] or match[3] or match[4]
    elif match := _BASE_IN_WORDS.fullmatch(" ".join(_TEXT.sub(r" \1 ", text).split())):
        digits, name = match[1], match[2]
    else:
        return None
    base = _BASES.get(name.lower(), int(name) if name.isdecimal() else 0)
    if not 2 <= base <= 36 or (digits.isalpha() and len(digits) == 1):
        return None
    if any(int(digit, 36) >= base for digit in digits):
        return None
    return digits.lstrip("0") or "0", base


# ---- Structure -----------------------------------------------------------------------------------------------------


Kind = Literal["list", "set", "tuple", "interval", "union", "matrix"]


@dataclass(frozen=True)
class Group:
    """Several answers in one: their texts, and what holds them together.

    ``list`` is bare (``1,2``), ``set`` has braces, ``tuple`` parentheses; ``interval`` has a square bracket, whose
    ``ends`` count. A ``union`` is of sets; a ``matrix`` is row by row, and one with a single row or column is a tuple.
    """

    kind: Kind
    items: tuple[str, ...]
    ends: str = ""


def group(text: str) -> Group | None:
    """The group that an answer is; None for a single value."""
    if match := _MATRIX.fullmatch(text):
        rows = [[cell.strip() for cell in row.split("&")] for row in match[2].split(r"\\") if row.strip()]
        if match[1] in ("v", "V") or len({len(row) for row in rows}) != 1:
            return None  # a determinant or a norm
        cells = tuple(cell for row in rows for cell in row)
        is_vector = len(cells) > 1 and (len(rows) == 1 or len(rows[0]) == 1)
        return Group("tuple", cells) if is_vector else Group("matrix", cells, f"{len(rows)}x{len(rows[0])}")
    if len(parts := split(text, (r"\cup",))) > 1:
        return Group("union", parts)
    if _THOUSANDS.fullmatch(text):
        return None
    if len(parts := items(text)) > 1:
        return Group("list", parts)
    inside = _enclosed(text)
    if inside is None:
        return None
    opening, content, closing = inside
    if opening == r"\{":
        return Group("set", items(content))
    if opening == "{" or len(parts := split(content, (",", ";"))) == 1:
        return None
    if opening in ("(", r"\langle") and closing in (")", r"\rangle"):
        return Group("tuple", parts)
    return Group("interval", parts, opening + closing)


def thousands_as_list(text: str) -> Group | None:
    """What ``100,200`` is if it is no number."""
    return Group("list", tuple(text.split(","))) if _THOUSANDS.fullmatch(text) else None


def items(text: str) -> tuple[str, ...]:
    r"""The parts of a list: between commas, "and", "or", and both values of ``\pm``."""
    text = _TEXT_WITH_CONJUNCTION.sub(r" \1 ", text)
    parts = tuple(re.split(r",\s+", text))
    if not any(map(_THOUSANDS.fullmatch, parts)) or not all("," not in p or _THOUSANDS.fullmatch(p) for p in parts):
        parts = split(text, (",", ";"))
    found = [part for comma in parts for part in _split_at_conjunctions(comma)]
    found = [part for item in found for part in _adjacent_tuples(item)]
    return tuple(value for item in found for value in _both_signs(item))


def split(text: str, separators: tuple[str, ...]) -> tuple[str, ...]:
    """The text's parts between separators outside of all brackets, without blank ones."""
    parts, part, depth = [], "", 0
    for token in _TOKEN.findall(text):
        if depth == 0 and token in separators:
            parts.append(part)
            part = ""
            continue
        depth += (token in _OPENING) - (token in _CLOSING)
        part += token
    return tuple(stripped for piece in (*parts, part) if (stripped := piece.strip()))


def members(text: str) -> tuple[str, ...]:
    """The sides of an equation, or the text alone."""
    return split(text, ("=",))


def is_name(text: str) -> bool:
    """Whether a text only names something: x, a_1, f(x), \\theta."""
    return _NAME.fullmatch(text) is not None


def has_letters(text: str) -> bool:
    """Whether a text holds variables, so that it is no number."""
    return re.search(r"[A-Za-z]", re.sub(r"\\[A-Za-z]+|(?<![A-Za-z])[ei](?![A-Za-z])", "", text)) is not None


def names_value(text: str) -> bool:
    """Whether an equation's left side names what the right side is, instead of being computed with."""
    return _COMPUTED.search(re.sub(r"_(?:\w|\{[^{}]*\})", "", text)) is None


def without_membership(text: str) -> str:
    r"""``[1,2]`` for ``x \in [1,2]``."""
    return re.sub(r"^[A-Za-z]\s*\\in(?![A-Za-z])\s*", "", text)


def _enclosed(text: str) -> tuple[str, str, str] | None:
    """Opening bracket, content and closing bracket of a text that is wholly within one pair."""
    tokens = _TOKEN.findall(text)
    if len(tokens) < 2 or tokens[0] not in _OPENING or tokens[-1] not in _CLOSING:
        return None
    depth = 0
    for index, token in enumerate(tokens):
        depth += (token in _OPENING) - (token in _CLOSING)
        if depth == 0 and index < len(tokens) - 1:
            return None
    return (tokens[0], "".join(tokens[1:-1]).strip(), tokens[-1]) if depth == 0 else None


def _split_at_conjunctions(text: str) -> Iterator[str]:
    if words(text) is not None:
        yield text  # "red and blue" is compared as words
    else:
        yield from (part.strip(" ,") for part in _CONJUNCTION.split(text) if part.strip(" ,"))


def _adjacent_tuples(text: str) -> tuple[str, ...]:
    """The tuples of ``(1,2)(3,4)``; a product of sums stays whole."""
    if not text.startswith("(") or not text.endswith(")"):
        return (text,)
    pieces, piece, depth = [], "", 0
    for token in _TOKEN.findall(text):
        depth += (token in _OPENING) - (token in _CLOSING)
        piece += token
        if depth == 0:
            pieces.append(piece.strip())
            piece = ""
    pieces = [piece for piece in pieces if piece]
    is_list = len(pieces) > 1 and all((inside := _enclosed(p)) and len(split(inside[1], (",",))) > 1 for p in pieces)
    return tuple(pieces) if is_list else (text,)


def _both_signs(text: str) -> tuple[str, ...]:
    if text.startswith(r"\{") or not re.search(r"\\(?:pm|mp)(?![A-Za-z])", text):
        return (text,)
    first = re.sub(r"\\pm(?![A-Za-z])", "+", text)
    second = re.sub(r"\\pm(?![A-Za-z])", "-", text)
    return tuple(re.sub(r"\\mp(?![A-Za-z])", sign, one).lstrip("+ ") for one, sign in ((first, "-"), (second, "+")))
