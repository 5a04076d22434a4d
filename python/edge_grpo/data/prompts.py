"""From examples to prompts: the template filled in, rendered, and as the token ids that a model reads.

Where examples come from is ``sources``; order, epochs and groups are the trainer's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from edge_grpo.config import DataConfig
from edge_grpo.text import fill
from edge_grpo.types import Example, Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def render_prompts(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, config: DataConfig, *, as_chat: bool = True
) -> tuple[list[Prompt], int]:
    """Return the examples as prompts, and how many were left out for having more than ``max_prompt_length`` tokens.

    With a chat template the prompt is the system prompt, if any, and the user message (``prompt_template``), followed
    by the opening of the assistant's turn. Without one, or with ``as_chat`` off, it is the user message as plain text,
    after the system prompt and a blank line. ``token_ids`` is exactly what the model reads: a template writes its own
    special tokens; plain text begins once with the tokens that the tokenizer begins a sequence with, and does not end
    with those that end one.

    Raises ValueError without examples, when every prompt is too long, and when the template takes no system prompt.
    """
    if not examples:
        raise ValueError("examples must not be empty")
    messages = [fill(config.prompt_template, "problem", example.problem) for example in examples]
    if as_chat and tokenizer.chat_template:
        texts = [_chat_text(message, tokenizer, config.system_prompt) for message in messages]
        token_ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
    else:
        system = f"{config.system_prompt}\n\n" if config.system_prompt else ""
        texts = [system + message for message in messages]
        token_ids = [_plain_ids(text, tokenizer) for text in texts]
    prompts = [
        Prompt(example, text, tuple(ids))
        for example, text, ids in zip(examples, texts, token_ids, strict=True)
        if len(ids) <= config.max_prompt_length
    ]
    if not prompts:
        shortest = min(len(ids) for ids in token_ids)
        raise ValueError(
            f"all {len(examples)} prompts have more than data.max_prompt_length = {config.max_prompt_length} tokens; "
            f"the shortest has {shortest}"
        )
    return prompts, len(examples) - len(prompts)


def _chat_text(message: str, tokenizer: PreTrainedTokenizerBase, system_prompt: str | None) -> str:
    chat = [{"role": "user", "content": message}]
    if system_prompt:
        chat.insert(0, {"role": "system", "content": system_prompt})
    try:
        text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # templates raise through jinja2, or fail in their own ways
        hint = "; if it takes no system message, set data.system_prompt to null" if system_prompt else ""
        raise ValueError(f"the tokenizer's chat template failed: {type(error).__name__}: {error}{hint}") from error
    assert isinstance(text, str)
    return text


def _plain_ids(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The token ids of plain text after one beginning of sequence, where the tokenizer has one."""
    bare: list[int] = tokenizer.encode(text, add_special_tokens=False)
    if tokenizer.bos_token and text.startswith(str(tokenizer.bos_token)):
        return bare
    ids: list[int] = tokenizer.encode(text)
    # Some tokenizers also append an end of sequence, after which a model would not go on: it is dropped.
    for start in range(len(ids) - len(bare) + 1):
        if ids[start : start + len(bare)] == bare:
            return ids[: start + len(bare)]
    return ids
