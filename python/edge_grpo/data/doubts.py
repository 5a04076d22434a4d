"""What of a run cannot work, or probably is not meant, given its settings, its data and its tokenizer together.

What a setting may be by itself is ``config``'s; what a data set lacks row by row is ``check``'s.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from edge_grpo.config import TrainConfig
from edge_grpo.types import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_CHAT_NAME = re.compile(r"(?i)instruct|chat|(?<![a-z])it(?![a-z])")
_CHAT_MARKS = ("<|im_start|>", "<|start_header_id|>", "<start_of_turn>", "<|user|>", "<|assistant|>", "[INST]")


def doubts(
    config: TrainConfig,
    prompts: Sequence[Prompt],
    eval_prompts: Sequence[Prompt],
    tokenizer: PreTrainedTokenizerBase,
) -> list[str]:
    """Return a sentence for each thing that is probably not meant.

    Raises ValueError where ``correction.mix`` asks for answers or solutions and no row has one.
    """
    found = _lacking(config, prompts)
    updates = config.steps * config.optim.epochs * config.optim.minibatches
    if config.optim.warmup_steps >= updates:
        found.append(
            f"optim.warmup_steps is {config.optim.warmup_steps}, and the run makes {updates} optimizer steps: the "
            "learning rate reaches its peak at the end or never"
        )
    if config.loss.epsilon_low >= 1 and config.loss.loss_type != "cispo":
        found.append(
            f"loss.epsilon_low is {config.loss.epsilon_low}: ratios are never below 0, so none is clipped from below"
        )
    trained = {prompt.example.problem for prompt in prompts}
    if seen := sum(prompt.example.problem in trained for prompt in eval_prompts):
        found.append(
            f"{seen} of {len(eval_prompts)} held-out problems ({config.eval.data}) are trained on too "
            f"({config.data.train}): their accuracy says nothing about other problems"
        )
    if not tokenizer.chat_template and (why := _looks_like_chat(config, tokenizer)):
        found.append(
            f"the tokenizer of {config.model.path} has no chat template, though {why}: prompts are plain text; save "
            "the model's template with its tokenizer (chat_template.jinja), or write it in data.prompt_template"
        )
    return found


def _lacking(config: TrainConfig, prompts: Sequence[Prompt]) -> list[str]:
    """Corrections that rows have no text for; they become other kinds, or none."""
    found = []
    correction = config.correction_config
    for column, kinds in (("answer", ("answer",)), ("solution", ("solution", "hint"))):
        asked = [f"correction.mix.{kind}=0" for kind in kinds if correction.mix.get(kind)]
        missing = sum(getattr(prompt.example, column) is None for prompt in prompts)
        if not (config.use_gec and asked and missing):
            continue
        lack = (
            f"correction.mix asks for {column}s, and {missing} of {len(prompts)} rows of {config.data.train} have none"
        )
        if missing == len(prompts):
            raise ValueError(
                f"{lack}; name their column with data.columns.{column}=COLUMN, or set {' and '.join(asked)}"
            )
        found.append(f"{lack}: their corrections are of another kind")
    return found


def _looks_like_chat(config: TrainConfig, tokenizer: PreTrainedTokenizerBase) -> str | None:
    if name := _CHAT_NAME.search(config.model.path.rpartition("/")[2]):
        return f"its name has {name[0]!r}"
    marks = [mark for mark in _CHAT_MARKS if mark in tokenizer.get_vocab()]
    return f"its vocabulary has {marks[0]}" if marks else None
