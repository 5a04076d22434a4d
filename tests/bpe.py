"""A small real tokenizer, trained where it is used: byte-level BPE, as Llama 3, Qwen and SmolLM have it."""

from __future__ import annotations

from functools import cache

from tokenizers import Tokenizer, decoders, pre_tokenizers, processors, trainers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

BOS, EOS = "<s>", "</s>"
_TEXT = ["What is 2 + 3? The correct answer is 5. Wait! Something is wrong here.", "First 2 + 3 = 5, then 5 * 7 = 35."]
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}[{{ message.role }}]{{ message.content }}[end]{% endfor %}"
    "{% if add_generation_prompt %}[assistant]\n{% endif %}"
)


@cache
def _trained() -> str:
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=350, special_tokens=[BOS, EOS], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(_TEXT * 10, trainer)
    return tokenizer.to_str()


def make_tokenizer(*, template: str = "$A", chat: bool = False) -> PreTrainedTokenizerFast:
    """A tokenizer whose special tokens around a text are ``template``, such as "<s> $A </s>"."""
    backend = Tokenizer.from_str(_trained())
    backend.post_processor = processors.TemplateProcessing(single=template, special_tokens=[(BOS, 0), (EOS, 1)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=BOS, eos_token=EOS, pad_token=EOS)
    if chat:
        tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer
