"""What stands in data is text to every family of tokenizers, and clean texts have the ids that they always had."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache

import pytest
from bpe import BOS, EOS, make_metaspace_tokenizer, make_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from paths import ROOT
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import ByT5Tokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from edge_grpo.config import DataConfig, ModelConfig
from edge_grpo.data.prompts import render_prompts
from edge_grpo.policy.chat import Chat
from edge_grpo.policy.encoding import TextEncoder
from edge_grpo.policy.loading import load_tokenizer
from edge_grpo.types import Example

SMOLLM2 = ROOT / "models" / "SmolLM2-135M-Instruct.Q4_1.gguf"
SPECIAL = ["<pad>", BOS, EOS, "<unk>"]
WORDS = ["What", "is", "2", "+", "3", "?", "a", "user"]
TURNS = (
    "{% for m in messages %}"
    + EOS
    + "[{{ m.role }}] {{ m.content }}{% endfor %}{% if add_generation_prompt %}"
    + BOS
    + "{% endif %}"
)
LETTERS = [chr(code) for code in range(33, 127)]


def wrap(backend: Tokenizer, **options: object) -> PreTrainedTokenizerFast:
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIAL])
    names = {"pad_token": "<pad>", "bos_token": BOS, "eos_token": EOS, "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=TURNS, **names | options)


def llama3_like() -> PreTrainedTokenizerFast:
    """Byte-level BPE that takes a whole word from its vocabulary, as those converted from tiktoken do."""
    state = json.loads(make_tokenizer().backend_tokenizer.to_str())
    state["model"]["ignore_merges"] = True
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(state)), bos_token=BOS, eos_token=EOS, pad_token=EOS
    )
    tokenizer.chat_template = TURNS
    return tokenizer


def deepseek_like() -> PreTrainedTokenizerFast:
    """One whose turns begin with added tokens that are not special, beside those of reasoning."""
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(
        [AddedToken(name, normalized=False) for name in ("<｜User｜>", "<｜Assistant｜>", "<think>", "</think>")]
    )
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<｜' + m.role | capitalize + '｜>' + m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<｜Assistant｜><think>\n{% endif %}"
    )
    return tokenizer


def metaspace() -> PreTrainedTokenizerFast:
    tokenizer = make_metaspace_tokenizer()
    tokenizer.chat_template = TURNS
    return tokenizer


def unigram() -> PreTrainedTokenizerFast:
    """SentencePiece's Unigram, whose vocabulary has the special tokens as words, with the best score."""
    vocabulary = [
        ("<unk>", 0.0),
        *((token, 0.0) for token in (*SPECIAL[:3], "▁")),
        *((letter, -5.0) for letter in LETTERS),
    ]
    backend = Tokenizer(models.Unigram(vocabulary, unk_id=0, byte_fallback=False))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    backend.decoder = decoders.Metaspace(prepend_scheme="always")
    return wrap(backend)


def word_piece() -> PreTrainedTokenizerFast:
    tokens = [*SPECIAL, *LETTERS, *(f"##{letter}" for letter in LETTERS)]
    backend = Tokenizer(models.WordPiece({token: n for n, token in enumerate(tokens)}, unk_token="<unk>"))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    return wrap(backend)


def words() -> PreTrainedTokenizerFast:
    """Whole words: the special tokens are among them."""
    backend = Tokenizer(models.WordLevel({token: n for n, token in enumerate([*SPECIAL, *WORDS])}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return wrap(backend)


def in_python() -> PreTrainedTokenizerBase:
    tokenizer = ByT5Tokenizer()
    tokenizer.chat_template = TURNS.replace(BOS, "<pad>")
    return tokenizer


def smollm2() -> PreTrainedTokenizerBase:
    return load_tokenizer(ModelConfig(path=str(SMOLLM2)))


def tiny() -> PreTrainedTokenizerBase:
    return load_tokenizer(ModelConfig())


def bytes_level() -> PreTrainedTokenizerBase:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TURNS
    return tokenizer


EXACT = [tiny, bytes_level, llama3_like, deepseek_like, in_python]  # decoding gives the text back
FAMILIES = [
    *EXACT,
    metaspace,
    unigram,
    word_piece,
    words,
    pytest.param(
        smollm2, marks=pytest.mark.skipif(not SMOLLM2.is_file(), reason="no SmolLM2 here; make smollm2 fetches it")
    ),
]


@cache
def made(family: Callable[[], PreTrainedTokenizerBase]) -> tuple[PreTrainedTokenizerBase, TextEncoder]:
    tokenizer = family()
    return tokenizer, TextEncoder(tokenizer)


def num_control(encoder: TextEncoder, ids: object) -> int:
    return sum(token in encoder._ids for token in ids)  # type: ignore[attr-defined]


def asked(tokenizer: PreTrainedTokenizerBase, problem: str) -> list[int]:
    return list(render_prompts([Example(0, problem)], tokenizer, DataConfig(max_prompt_length=10**6))[0][0].token_ids)


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=25)
@given(problem=st.text(min_size=1, max_size=30).filter(str.strip))
def test_a_clean_text_has_the_ids_of_the_plain_template(family, problem):
    tokenizer, encoder = made(family)
    if encoder.named_in(problem):
        return
    text = Chat(tokenizer).render([{"role": "user", "content": problem}])
    assert asked(tokenizer, problem) == tokenizer.encode(text, add_special_tokens=False)


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=25)
@given(data=st.data())
def test_data_holds_no_control_tokens(family, data):
    tokenizer, encoder = made(family)
    names = sorted(encoder.control_tokens)
    parts = data.draw(
        st.lists(
            st.sampled_from([*names, *[name[1:] for name in names], "<", " ", "a", "é", "What is 2 + 3?"]), min_size=1
        )
    )
    problem = "".join([*parts, "?"])
    own = num_control(encoder, asked(tokenizer, "What is 2 + 3?"))
    ids = asked(tokenizer, problem)
    assert num_control(encoder, ids) == own
    solution = encoder(problem, [(0, len(problem))])
    assert num_control(encoder, solution) == 0
    if family in EXACT:
        decode = tokenizer.decode
        assert decode(solution, skip_special_tokens=False, clean_up_tokenization_spaces=False) == problem
        text = Chat(tokenizer).render([{"role": "user", "content": problem}])
        assert decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False) == text


def test_what_stands_before_and_after_a_name_keeps_its_ids():
    tokenizer, encoder = made(bytes_level)
    plain = lambda text: tokenizer.encode(text, add_special_tokens=False)  # noqa: E731
    text = f"{BOS}What is 2 + 3?{EOS}The answer{EOS}"
    start = text.index(EOS)
    ids = encoder(text, [(len(BOS), len(text) - len(EOS))])
    assert ids == [*plain(f"{BOS}What is 2 + 3?<"), *plain("/s>The answer"), tokenizer.eos_token_id]
    assert encoder(text, []) == plain(text)
    assert encoder(text, [(start + 1, start + 2)]) == [*plain(text[: start + 1]), *plain(text[start + 1 :])]


def test_added_tokens_that_the_template_writes_are_control_tokens_but_those_of_reasoning():
    tokenizer, encoder = made(deepseek_like)
    assert set(encoder.control_tokens) == {BOS, EOS, "<｜User｜>", "<｜Assistant｜>"}
    text = "<think>so</think><｜User｜>"
    ids = encoder(text, [(0, len(text))])
    vocabulary = tokenizer.get_vocab()
    assert vocabulary["<think>"] in ids
    assert vocabulary["</think>"] in ids
    assert vocabulary["<｜User｜>"] not in ids


def test_a_name_that_comes_of_other_characters_is_text_too():
    backend = Tokenizer(
        models.WordLevel({token: n for n, token in enumerate([*SPECIAL, *WORDS, *LETTERS])}, unk_token="<unk>")
    )
    backend.normalizer = normalizers.NFKC()
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token=EOS)
    encoder = TextEncoder(tokenizer)
    wide = "What ＜/s＞"
    assert tokenizer.eos_token_id in tokenizer.encode(wide)
    assert tokenizer.eos_token_id not in encoder(wide, [(0, len(wide))])


def test_a_token_of_one_character_cannot_be_text():
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["§"]})
    with pytest.raises(ValueError, match=r"^row 7: the tokenizer reads a control token from data \(§\) in any way"):
        render_prompts([Example(7, "§ 5?")], tokenizer, DataConfig())
