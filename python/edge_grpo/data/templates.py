r"""The prompts of published evaluations, and where a response to each of them has its answer.

``qwen_math`` and ``r1`` are whole texts, the same for every model; ``chat`` is a user message within the model's own
chat template; ``config`` is the prompt of a run. Grading the answer is ``edge_grpo.grading.answers``.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

from edge_grpo.config import DataConfig
from edge_grpo.data.prompts import render_prompts
from edge_grpo.text import boxes
from edge_grpo.types import Example, Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TemplateName = Literal["qwen_math", "r1", "chat", "config"]

_INSTRUCTION = r"Please reason step by step, and put your final answer within \boxed{}."
_QWEN_MATH = (
    f"<|im_start|>system\n{_INSTRUCTION}<|im_end|>\n<|im_start|>user\n{{problem}}<|im_end|>\n<|im_start|>assistant\n"
)
_R1 = (
    "A conversation between User and Assistant. The User asks a question, and the Assistant solves it. The Assistant "
    "first thinks about the reasoning process in the mind and then provides the User with the answer. The reasoning "
    "process is enclosed within <think> </think> and answer is enclosed within <answer> </answer> tags, respectively, "
    "i.e., <think> reasoning process here </think> <answer> answer here </answer>.\nUser: {problem}\nAssistant: <think>"
)
_TAGGED_ANSWER = re.compile(r"</think>\s*<answer>(.*?)</answer>", re.DOTALL)


@dataclass(frozen=True)
class Template:
    """How a problem becomes a prompt, and a completion an answer.

    ``text`` holds {problem}. With ``is_whole`` it is all that the model reads, otherwise the user message of the
    tokenizer's chat template, after ``system`` where there is one and with its ``variables``. With ``is_tagged``
    the answer is in ``<answer>`` tags after ``</think>``, otherwise in the last ``\\boxed{}``.
    """

    name: TemplateName
    text: str
    system: str | None = None
    is_whole: bool = False
    is_tagged: bool = False
    variables: Mapping[str, Any] = field(default_factory=dict)

    @property
    def ending(self) -> str | None:
        """The text that ends a response, None for none; what follows it does not count."""
        return "</answer>" if self.is_tagged else None

    def render(
        self, examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, max_prompt_length: int
    ) -> tuple[list[Prompt], list[int]]:
        """Return the prompts, and the rows of the examples that were left out for having too many tokens.

        Raises ValueError for "chat" without a chat template.
        """
        if self.name == "chat" and not tokenizer.chat_template:
            raise ValueError("template chat needs a tokenizer with a chat template; use qwen_math, r1 or config")
        config = DataConfig(
            prompt_template=self.text,
            system_prompt=self.system,
            max_prompt_length=max_prompt_length,
            chat_template_kwargs=dict(self.variables),
        )
        prompts, _ = render_prompts(examples, tokenizer, config, as_chat=not self.is_whole)
        kept = {prompt.example.index for prompt in prompts}
        return prompts, [example.index for example in examples if example.index not in kept]

    def boxed(self, completion: str) -> str:
        r"""The completion as the grader reads it: with the answer in its last ``\boxed{}``, or with no box."""
        if not self.is_tagged:
            return completion
        match = _TAGGED_ANSWER.search(completion)
        if match is None:
            return ""
        return match[1] if boxes(match[1]) else f"\\boxed{{{match[1].strip()}}}"

    def answer_with(self, answer: str) -> str:
        """The shortest completion that gives ``answer``."""
        return f" </think> <answer>\\boxed{{{answer}}}</answer>" if self.is_tagged else f"\\boxed{{{answer}}}"

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain values, ``variables`` where there are any."""
        values = dataclasses.asdict(self)
        return values if self.variables else {key: value for key, value in values.items() if key != "variables"}


TEMPLATES = {
    "qwen_math": Template("qwen_math", _QWEN_MATH, is_whole=True),
    "r1": Template("r1", _R1, is_whole=True, is_tagged=True),
    "chat": Template("chat", f"{{problem}}\n\n{_INSTRUCTION}"),
}


def find_template(name: str, data: DataConfig) -> Template:
    """Return the template of that name; "config" is the prompt of the configuration ``data``."""
    if name == "config":
        return Template("config", data.prompt_template, data.system_prompt, variables=data.chat_template_kwargs)
    if name not in TEMPLATES:
        raise ValueError(f"template must be one of {', '.join([*TEMPLATES, 'config'])}; got {name!r}")
    template = TEMPLATES[name]
    return template if template.is_whole else replace(template, variables=data.chat_template_kwargs)


def foreign_marks(template: Template, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Return the marks such as <|im_start|> of a whole-text template that this tokenizer reads as ordinary text."""
    if not template.is_whole:
        return []
    marks = dict.fromkeys(re.findall(r"<\|\w+\|>", template.text))
    return [mark for mark in marks if len(tokenizer.encode(mark, add_special_tokens=False)) != 1]
