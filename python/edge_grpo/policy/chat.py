"""A model's chat template: what it makes of a conversation, where each message stands in it, and whether it is usable.

Token ids of the text are ``encoding``'s; which conversation is asked, ``edge_grpo.data.prompts``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from edge_grpo.config.checks import did_you_mean

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Messages = Sequence[Mapping[str, str]]
Place = tuple[int, int, int]

# A message's content while it is looked for: private characters, which no template knows.
_HOLE = "\ue000{}\ue001"
_HOLES = re.compile("\ue000([0-9]+)\ue001")
_REASONING_TAGS = re.compile("</?think>")
_ANY = "."  # a message of the user


class Chat:
    """The chat template of ``tokenizer`` with values for its variables, such as ``{"enable_thinking": False}``.

    ``variables`` may hold ``chat_template``, the name of one of several templates, or a template. Raises ValueError
    without a template, for several without a default, for a variable that the template does not have, for a template
    that leaves out what the user says, and for one that does not open the assistant's turn.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, variables: Mapping[str, Any] | None = None) -> None:
        self.tokenizer = tokenizer
        self.variables = dict(variables or {})
        self.source = self._find_source()
        names = set(re.findall(r"[A-Za-z_]\w*", self.source))
        for name in self.variables.keys() - {"chat_template"} - names:
            raise ValueError(
                f"the chat template has no variable {name!r}, which data.chat_template_kwargs sets"
                f"{did_you_mean(name, names)}"
            )
        self._skeletons: dict[tuple[str, ...], list[str]] = {}
        self.has_parts = self._find_form()  # vision-language models have lists of parts for a message's content
        self._check_opening()

    def render(self, messages: Messages, *, add_generation_prompt: bool = True) -> str:
        """Return the conversation as text, by default followed by the opening of the assistant's turn."""
        if self.has_parts:
            messages = [{**one, "content": [{"type": "text", "text": one["content"]}]} for one in messages]  # type: ignore[dict-item]
        try:
            text = self.tokenizer.apply_chat_template(
                [dict(one) for one in messages],
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                **self.variables,
            )
        except Exception as error:  # templates raise through jinja2, or fail in their own ways
            system = any(one["role"] == "system" for one in messages)
            hint = "; if it takes no system message, set data.system_prompt to null" if system else ""
            raise ValueError(f"the tokenizer's chat template failed: {type(error).__name__}: {error}{hint}") from error
        assert isinstance(text, str)
        return text

    def render_with_spans(self, messages: Messages) -> tuple[str, list[Place] | None]:
        """Return the prompt, and where each message's content stands in it; blanks around a content may be gone.

        A place is (offset, start, stop): character i of the content is character offset + i of the prompt, where that
        lies from start to stop. Raises ValueError where a message is left out. Where the template changes a content in
        another way, there is no telling, and the places are None.
        """
        text = self.render(messages)
        roles = tuple(one["role"] for one in messages)
        pieces = self._skeletons.get(roles)
        if pieces is None:
            holes = [{"role": role, "content": _HOLE.format(number)} for number, role in enumerate(roles)]
            pieces = self._skeletons[roles] = _HOLES.split(self.render(holes))
        places = _places(text, pieces, [one["content"] for one in messages])
        if places is None:
            for one in messages:
                if (content := one["content"].strip()) not in text:
                    what = "the problem" if one["role"] == "user" else f"the {one['role']}'s message"
                    raise ValueError(f"the tokenizer's chat template leaves out or changes {what}: {content[:80]!r}")
        return text, places

    def closing(self) -> str:
        """Return what the template writes after an assistant's message; nothing where it leaves the message out."""
        answer = _HOLE.format(0)
        turn = [{"role": "user", "content": _ANY}, {"role": "assistant", "content": answer}]
        return self.render(turn, add_generation_prompt=False).partition(answer)[2]

    def _find_source(self) -> str:
        templates = self.tokenizer.chat_template
        if not templates and "chat_template" not in self.variables:
            raise ValueError("the tokenizer has no chat template")
        asked = self.variables.get("chat_template")
        if isinstance(templates, dict):
            if asked is None and "default" not in templates:
                raise ValueError(
                    f"the tokenizer has the chat templates {', '.join(templates)} and no default; choose one, such as "
                    f"data.chat_template_kwargs.chat_template={next(iter(templates))}"
                )
            return str(templates.get(asked or "default", asked))
        return str(asked or templates)

    def _find_form(self) -> bool:
        """Whether contents are lists of parts: where what the user says is else left out of the prompt, or refused."""
        refused = None
        for self.has_parts in (False, True):
            try:
                if _HOLE.format(0) in self.render([{"role": "user", "content": _HOLE.format(0)}]):
                    return self.has_parts
            except ValueError as error:
                refused = refused or error
        raise refused or ValueError(
            "the chat template leaves out what the user says, given as text and as a list of parts; use the template "
            "of a model for text"
        )

    def _check_opening(self) -> None:
        """Raise ValueError for a prompt that does not end where the answer starts."""
        asked = [{"role": "user", "content": _ANY}]
        prompt, closed = self.render(asked), self.render(asked, add_generation_prompt=False)
        if prompt != closed:
            return
        answer = _HOLE.format(0)
        whole = self.render([*asked, {"role": "assistant", "content": answer}], add_generation_prompt=False)
        before, found, _ = whole.partition(answer)
        missing = _REASONING_TAGS.sub("", before[len(prompt) :]).strip() if before.startswith(prompt) else ""
        eos = self.tokenizer.eos_token
        if (found and missing) or (eos and prompt.rstrip().endswith(str(eos))):
            raise ValueError(
                f"the chat template does not open the assistant's turn: the prompt ends in {prompt[-40:]!r}, and an "
                f"answer would follow {before[-40:]!r}; give the tokenizer a template that knows add_generation_prompt"
            )


def _places(text: str, pieces: Sequence[str], contents: Sequence[str]) -> list[Place] | None:
    """Where the contents stand in a text that is the skeleton with each of them once, in order; None for another."""
    if [int(number) for number in pieces[1::2]] != list(range(len(contents))) or not text.startswith(pieces[0]):
        return None
    places, position = [], len(pieces[0])
    for content, after in zip(contents, pieces[2::2], strict=True):
        for shown in (content, content.strip(), content.rstrip(), content.lstrip()):
            if text.startswith(shown + after, position):
                places.append((position - content.index(shown), position, position + len(shown)))
                position += len(shown) + len(after)
                break
        else:
            return None
    return places if position == len(text) else None
