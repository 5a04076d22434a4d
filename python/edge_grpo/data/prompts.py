"""From examples to prompts: the template filled in, rendered, and as the token ids that a model reads.

Where examples come from is ``sources``; order, epochs and groups are the trainer's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from edge_grpo.config import DataConfig
from edge_grpo.policy.chat import Chat
from edge_grpo.policy.encoding import TextEncoder
from edge_grpo.text import Span, fill_with_spans
from edge_grpo.types import Example, Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_Conversation = list[tuple[Mapping[str, str], list[Span]]]  # messages, and where data stands in each


def render_prompts(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, config: DataConfig, *, as_chat: bool = True
) -> tuple[list[Prompt], int]:
    """Return the examples as prompts, and how many were left out for having more than ``max_prompt_length`` tokens.

    With a chat template the prompt is the system prompt, if any, and the user message (``prompt_template``), followed
    by the opening of the assistant's turn. Without one, or with ``as_chat`` off, it is the user message as plain text,
    after the system prompt and a blank line. Of an example that is a conversation all messages are asked, the last one
    filled into ``prompt_template``. ``token_ids`` is exactly what the model reads: a template writes its own special
    tokens; plain text begins once with the tokens that the tokenizer begins a sequence with, and does not end with
    those that end one; what stands in data is no control token (``policy.encoding``).

    Raises ValueError without examples, when every prompt is too long, for a chat template that cannot be used
    (``policy.chat``), a system prompt beside a system message of the data, and a conversation of several turns without
    a chat template.
    """
    if not examples:
        raise ValueError("examples must not be empty")
    if as_chat and config.chat_template_kwargs and not tokenizer.chat_template:
        raise ValueError("data.chat_template_kwargs is set, but the tokenizer has no chat template")
    chat = Chat(tokenizer, config.chat_template_kwargs) if as_chat and tokenizer.chat_template else None
    encoder = TextEncoder(tokenizer)
    prompts = []
    for example in examples:
        try:
            prompts.append(_render(example, config, encoder, chat))
        except ValueError as error:
            raise ValueError(f"row {example.index}: {error}") from error
    kept = [prompt for prompt in prompts if len(prompt.token_ids) <= config.max_prompt_length]
    if not kept:
        raise ValueError(
            f"all {len(examples)} prompts have more than data.max_prompt_length = {config.max_prompt_length} tokens; "
            f"the shortest has {min(len(prompt.token_ids) for prompt in prompts)}"
        )
    return kept, len(examples) - len(kept)


def _render(example: Example, config: DataConfig, encoder: TextEncoder, chat: Chat | None) -> Prompt:
    conversation = _conversation(example, config)
    if chat is None:
        text, spans = _plain_text(conversation)
        return Prompt(example, text, tuple(_plain_ids(text, spans, encoder)))
    text, spans = _chat_text(chat, conversation, encoder)
    return Prompt(example, text, tuple(encoder(text, spans)), tuple(message for message, _ in conversation))


def _conversation(example: Example, config: DataConfig) -> _Conversation:
    """The messages of a prompt, of which the system prompt and the template are no data."""
    content, spans = fill_with_spans(config.prompt_template, "problem", example.problem)
    earlier = (example.messages or ())[:-1]
    conversation: _Conversation = [(message, [(0, len(message["content"]))]) for message in earlier]
    if config.system_prompt:
        if any(message["role"] == "system" for message in earlier):
            raise ValueError("it has a system message of its own, and data.system_prompt is set; set that to null")
        conversation.insert(0, ({"role": "system", "content": config.system_prompt}, []))
    return [*conversation, ({"role": "user", "content": content}, spans)]


def _chat_text(chat: Chat, conversation: _Conversation, encoder: TextEncoder) -> tuple[str, list[Span]]:
    """The rendered prompt, and where data stands in it."""
    text, places = chat.render_with_spans([message for message, _ in conversation])
    if places is None:
        names = [
            encoder.named_in(message["content"][start:stop]) for message, data in conversation for start, stop in data
        ]
        if any(names):
            raise ValueError(
                f"it holds {', '.join(filter(None, names))}, and the chat template changes its text; remove it"
            )
        return text, []
    spans = []
    for (_, data), (offset, start, stop) in zip(conversation, places, strict=True):
        spans += [(max(start, offset + first), min(stop, offset + last)) for first, last in data]
    return text, spans


def _plain_text(conversation: _Conversation) -> tuple[str, list[Span]]:
    roles = [message["role"] for message, _ in conversation]
    if roles not in (["user"], ["system", "user"]):
        raise ValueError(f"a conversation of {', '.join(roles)} needs a model with a chat template")
    text, spans = "", []
    for message, data in conversation:
        text += "\n\n" if text else ""
        spans += [(len(text) + start, len(text) + stop) for start, stop in data]
        text += message["content"]
    return text, spans


def _plain_ids(text: str, spans: Sequence[Span], encoder: TextEncoder) -> list[int]:
    """The token ids of plain text after one beginning of sequence, where the tokenizer has one."""
    tokenizer = encoder.tokenizer
    own = encoder(text, spans)
    bos = str(tokenizer.bos_token or "")
    if bos and text.startswith(bos) and all(start >= len(bos) for start, _ in spans):
        return own
    bare: list[int] = tokenizer.encode(text, add_special_tokens=False)
    ids: list[int] = tokenizer.encode(text)
    # Some tokenizers also append an end of sequence, after which a model would not go on: it is dropped.
    for start in range(len(ids) - len(bare) + 1):
        if ids[start : start + len(bare)] == bare:
            return ids[:start] + own
    return ids if own == bare else own
