"""Small real tokenizers, made where they are used: byte-level BPE, as Llama 3 and Qwen have it, and Llama 2's kind."""

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


def byte_tokens(tokenizer: PreTrainedTokenizerFast, data: bytes) -> list[str]:
    """The tokens that stand for single bytes, of either kind of tokenizer."""
    if "<0x00>" in tokenizer.get_vocab():
        return [f"<0x{byte:02X}>" for byte in data]
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in visible]
    return [chr(byte) if byte in visible else chr(256 + others.index(byte)) for byte in data]


def make_metaspace_tokenizer() -> PreTrainedTokenizerFast:
    """One as Llama 2 and Mistral have it: a blank is put before every text, and other characters fall back to bytes."""
    bytes_ = [f"<0x{value:02X}>" for value in range(256)]
    letters = sorted({letter for text in _TEXT for letter in text.replace(" ", "▁")})
    words = ["▁Wait", "▁is", "▁The", "▁correct", "▁answer"]
    merges = [(word[: i + 1], word[i + 1]) for word in words for i in range(len(word) - 1)]
    pieces = dict.fromkeys([*letters, *(piece for left, right in merges for piece in (left + right,))])
    vocabulary = {token: index for index, token in enumerate([BOS, EOS, "<unk>", *bytes_, *pieces])}
    tokenizer = Tokenizer(BPE(vocab=vocabulary, merges=merges, byte_fallback=True, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, pad_token=EOS)


def make_tokenizer(*, template: str = "$A", chat: bool = False) -> PreTrainedTokenizerFast:
    """A tokenizer whose special tokens around a text are ``template``, such as "<s> $A </s>"."""
    backend = Tokenizer.from_str(_trained())
    backend.post_processor = processors.TemplateProcessing(single=template, special_tokens=[(BOS, 0), (EOS, 1)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=BOS, eos_token=EOS, pad_token=EOS)
    if chat:
        tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer
