"""Text to token ids such that what stands in data is text to the model, never a control token.

A control token is one that a template may write and data may not: the tokenizer's special tokens, and those added
tokens that its chat template uses, but for ``<think>`` and ``</think>``, which a solution may hold. Every kind of
tokenizer reads such a token wherever its name stands in a text; a problem that quotes ``<|im_end|>`` ends the user's
turn, and a solution that does has two ends of sequence.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

from edge_grpo.policy.chat import Chat
from edge_grpo.text import Span, encode_after_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_REASONING_TAGS = ("<think>", "</think>")


class TextEncoder:
    """Encodes texts in which some ``data`` stands, without adding anything at their ends.

    Where no data is read as a control token, the ids are those of ``tokenizer.encode(text, add_special_tokens=False)``.
    Where it would be, the text is cut within that token's name, after its first character, and what lies between cuts
    is encoded as text that follows text. So it works for every tokenizer: byte-level BPE (GPT-2, Llama 3, Qwen,
    whatever was converted from tiktoken), SentencePiece's BPE and Unigram, WordPiece, and those in Python. A tokenizer
    that has the name in its vocabulary of words, or reads it from other characters, is given one character at a time.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.control_tokens = _control_tokens(tokenizer)
        names = sorted(self.control_tokens, key=len, reverse=True)  # the longest first, as tokenizers take them
        self._names = re.compile("|".join(map(re.escape, names)) or r"(?!)")
        self._ids = set(self.control_tokens.values())
        if tokenizer.unk_token_id not in (tokenizer.eos_token_id, tokenizer.bos_token_id):
            self._ids.discard(tokenizer.unk_token_id)  # it stands for whatever cannot be read

    def __call__(self, text: str, data: Sequence[Span] = ()) -> list[int]:
        """Return the ids of ``text``, in which ``data`` are the places (start, stop) of data, in order.

        Raises ValueError where data cannot be encoded without a control token.
        """
        num_own, cuts = self._scan(text, data)
        if not cuts:
            ids = self._plain(text)
            if self._num_control(ids) <= num_own:
                return ids
        else:
            ids = self._pieces(text, cuts)
            if self._num_control(ids) <= num_own:
                return ids
        characters = sorted({*cuts, *(place for start, stop in data for place in range(start, stop + 1))})
        ids = self._pieces(text, [place for place in characters if 0 < place < len(text)])
        if self._num_control(ids) > num_own:
            names = ", ".join(dict.fromkeys(self.named_in(text[start:stop]) for start, stop in data)) or "some of it"
            raise ValueError(f"the tokenizer reads a control token from data ({names}) in any way; remove it there")
        return ids

    def named_in(self, text: str) -> str:
        """Return the names of the control tokens in a text, each once, for a message."""
        return ", ".join(dict.fromkeys(match[0] for match in self._names.finditer(text)))

    def _scan(self, text: str, data: Sequence[Span]) -> tuple[int, list[int]]:
        """How many control tokens stand outside of data, and where to cut those that do not."""
        num_own, cuts, place = 0, [], 0
        while match := self._names.search(text, place):
            start, stop = match.span()
            if any(start < end and begin < stop for begin, end in data):
                place = start + 1
                cuts.append(place)
            else:
                num_own, place = num_own + 1, stop
        return num_own, cuts

    def _pieces(self, text: str, cuts: Sequence[int]) -> list[int]:
        edges = [0, *cuts, len(text)]
        ids = self._plain(text[: edges[1]])
        for start, stop in pairwise(edges[1:]):
            ids += encode_after_text(self._plain, text[start:stop])
        return ids

    def _plain(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False)
        return ids

    def _num_control(self, ids: Sequence[int]) -> int:
        return sum(token in self._ids for token in ids)


def _control_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    special, written = set(map(str, tokenizer.all_special_tokens)), _written(tokenizer)
    return {
        token.content: index
        for index, token in tokenizer.added_tokens_decoder.items()
        if token.special
        or token.content in special
        or (token.content.strip() and token.content in written and token.content not in _REASONING_TAGS)
    }


def _written(tokenizer: PreTrainedTokenizerBase) -> str:
    """What the chat templates may write: their sources, and a turn, since some put the names of tokens together."""
    templates = tokenizer.chat_template
    if not templates:
        return ""
    sources = list(templates.values()) if isinstance(templates, dict) else [templates]
    try:
        chat = Chat(tokenizer)
        turn = [chat.render([{"role": "user", "content": "."}]), chat.closing()]
    except ValueError:
        turn = []  # an unusable template is said where it is used
    return "\n".join([*sources, *turn])
