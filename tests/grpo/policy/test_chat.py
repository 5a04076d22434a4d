"""Chat templates: where a message stands in the prompt, what makes one unusable, and their variables."""

from __future__ import annotations

import pytest
from bpe import BOS, CHAT_TEMPLATE, EOS, make_tokenizer
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from edge_grpo.config import DataConfig, ModelConfig
from edge_grpo.data.prompts import render_prompts
from edge_grpo.policy.chat import Chat
from edge_grpo.policy.loading import eos_token_ids, load_tokenizer
from edge_grpo.types import Example

LOOP = "{% for m in messages %}"
TURN = LOOP + "[{{ m.role }}]{{ m.content }}[end]{% endfor %}"
OPENING = "{% if add_generation_prompt %}[assistant]{% endif %}"
PARTS = (  # as vision-language models have it
    BOS + LOOP + "[{{ m.role }}]{% for part in m.content %}{% if part.type == 'text' %}{{ part.text }}{% endif %}"
    "{% endfor %}" + EOS + "{% endfor %}" + OPENING
)
TRIMMED = LOOP + "[{{ m.role }}] {{ m.content | trim }} [end]{% endfor %}" + OPENING
MISTRAL = (
    LOOP
    + "{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% else %} {{ m.content }}"
    + EOS
    + "{% endif %}{% endfor %}"
)
THINKING = (  # an answer of the past has an empty think block
    LOOP
    + "[{{ m.role }}]{% if m.role == 'assistant' %}<think>\n\n</think>\n\n{% endif %}{{ m.content }}[end]{% endfor %}"
)
SWITCHED = (
    TURN
    + OPENING
    + "{% if add_generation_prompt and enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}"
)


def with_template(template: object) -> PreTrainedTokenizerBase:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def user(content: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": content}]


@given(st.lists(st.text(max_size=12), min_size=1, max_size=3))
@pytest.mark.parametrize("template", [CHAT_TEMPLATE, TRIMMED, PARTS, MISTRAL.replace("{% else %}", "{% elif 1 %}")])
def test_each_content_is_where_it_is_said_to_be(template, contents):
    chat = Chat(with_template(template))
    roles = ["user", "assistant", "user"][: len(contents)] if len(contents) != 2 else ["system", "user"]
    messages = [{"role": role, "content": content} for role, content in zip(roles, contents, strict=True)]
    text, places = chat.render_with_spans(messages)
    assert text == chat.render(messages)
    for content, (offset, start, stop) in zip(contents, places, strict=True):
        assert text[start:stop] == content[start - offset : stop - offset]
        assert text[start:stop].strip() == content.strip()


def test_a_template_for_lists_of_parts_gets_them():
    tokenizer = with_template(PARTS)
    [prompt], _ = render_prompts([Example(0, "1+1?")], tokenizer, DataConfig())
    assert prompt.text == f"{BOS}[user]1+1?{EOS}[assistant]"
    assert prompt.messages == ({"role": "user", "content": "1+1?"},)
    with_both = "{{ messages[0].content if messages[0].content is string else messages[0].content[0].text }}"
    assert Chat(with_template(with_both)).has_parts is False


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("[user][assistant]", "the chat template leaves out what the user says, given as text and as a list of parts"),
        ("{{ messages[0].content | lower }}", None),
        ("{{ messages[0].content[0] }}", "leaves out what the user says"),
        ("{{ raise_exception('never') }}", "the tokenizer's chat template failed: TemplateError: never$"),
        (
            TURN,
            r"does not open the assistant's turn: the prompt ends in '\[user\]\.\[end\]', and an answer would",
        ),
        (LOOP + "{{ m.content }}" + EOS + "{% endfor %}", "does not open the assistant's turn"),
        (TURN + OPENING, None),
        (MISTRAL, None),
        (THINKING + OPENING, None),
        (LOOP + "{{ m.content }}\n{% endfor %}", None),  # no turns at all
    ],
)
def test_the_prompt_holds_the_problem_and_ends_where_the_answer_starts(template, message):
    if message is None:
        assert Chat(with_template(template)).render(user("x"))
        return
    with pytest.raises(ValueError, match=message):
        render_prompts([Example(0, "x")], with_template(template), DataConfig())


def test_a_problem_that_the_template_changes_is_named_by_its_row():
    cut = TURN.replace("m.content", "m.content.split('=')[0]") + OPENING
    with pytest.raises(
        ValueError, match=r"row 4: the tokenizer's chat template leaves out or changes the problem: 'x = 5\?'"
    ):
        render_prompts([Example(3, "x?"), Example(4, "x = 5?")], with_template(cut), DataConfig())
    quoted = LOOP + "{{ '# ' + m.content if '#' not in m.content else m.content + m.content }}{% endfor %}" + OPENING
    [prompt], _ = render_prompts([Example(0, "#1")], with_template(quoted), DataConfig())
    assert prompt.text == "#1#1[assistant]"  # it is there, though nobody can tell which
    with pytest.raises(ValueError, match="row 5: it holds </s>, and the chat template changes its text; remove it"):
        render_prompts([Example(5, f"#1{EOS}")], with_template(quoted), DataConfig())
    deaf = LOOP + "{% if m.role != 'system' %}{{ m.content }}{% endif %}{% endfor %}" + OPENING
    with pytest.raises(ValueError, match="leaves out or changes the system's message: 'Be brief"):
        render_prompts([Example(0, "x")], with_template(deaf), DataConfig(system_prompt="Be brief."))


def test_variables_reach_the_template():
    def text(tokenizer: PreTrainedTokenizerBase, **variables: object) -> str:
        return render_prompts([Example(0, "x")], tokenizer, DataConfig(chat_template_kwargs=variables))[0][0].text

    assert text(with_template(SWITCHED)) == "[user]x[end][assistant]"
    assert text(with_template(SWITCHED), enable_thinking=False) == "[user]x[end][assistant]<think></think>"
    with pytest.raises(ValueError, match=r"no variable 'enable_thinkng', which .* sets; did you mean enable_thinking"):
        text(with_template(SWITCHED), enable_thinkng=False)
    with pytest.raises(ValueError, match="chat_template_kwargs is set, but the tokenizer has no chat template"):
        text(make_tokenizer(), enable_thinking=False)
    with pytest.raises(ValueError, match="chat_template_kwargs must not set tokenize, which this trainer does"):
        DataConfig(chat_template_kwargs={"tokenize": True})


def test_one_of_several_templates_is_chosen():
    tokenizer = with_template({"default": TURN + OPENING, "rag": TRIMMED})
    assert render_prompts([Example(0, "x")], tokenizer, DataConfig())[0][0].text == "[user]x[end][assistant]"
    rag = DataConfig(chat_template_kwargs={"chat_template": "rag"})
    assert render_prompts([Example(0, "x")], tokenizer, rag)[0][0].text == "[user] x [end][assistant]"
    tokenizer = with_template({"rag": TRIMMED, "tool_use": TURN})
    with pytest.raises(ValueError, match=r"chat templates rag, tool_use and no default; choose one, such as .*=rag"):
        render_prompts([Example(0, "x")], tokenizer, DataConfig())


# ---- Conversations of the data -------------------------------------------------------------------------------------

CONVERSATION = (
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": f"1+1?{EOS}"},
    {"role": "assistant", "content": "2"},
    {"role": "user", "content": "2+2?"},
)


def test_a_conversation_is_asked_as_it_is():
    tokenizer = make_tokenizer(chat=True)
    example = Example(0, "2+2?", messages=CONVERSATION)
    [prompt], _ = render_prompts([example], tokenizer, DataConfig(prompt_template="{problem} Box it."))
    end = f"{EOS}[end]"
    assert (
        prompt.text
        == f"{BOS}[system]Be brief.[end][user]1+1?{end}[assistant]2[end][user]2+2? Box it.[end][assistant]\n"
    )
    assert prompt.messages == (*CONVERSATION[:3], {"role": "user", "content": "2+2? Box it."})
    assert tokenizer.eos_token_id not in prompt.token_ids
    with pytest.raises(ValueError, match=r"row 0: it has a system message of its own, and data\.system_prompt is set"):
        render_prompts([example], tokenizer, DataConfig(system_prompt="Be long."))


def test_without_a_chat_template_only_one_question_can_be_asked():
    tokenizer = make_tokenizer()
    one = Example(0, "2+2?", messages=(CONVERSATION[0], CONVERSATION[3]))
    [prompt], _ = render_prompts([one], tokenizer, DataConfig())
    assert (prompt.text, prompt.messages) == ("Be brief.\n\n2+2?", None)
    with pytest.raises(ValueError, match="row 9: a conversation of system, user, assistant, user needs a model with a"):
        render_prompts([Example(9, "2+2?", messages=CONVERSATION)], tokenizer, DataConfig())


# ---- Ends of sequence and padding ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (PARTS.replace(EOS, "<turn>"), ["</s>", "<turn>"]),
        (TRIMMED.replace("[end]", "<turn>"), ["</s>"]),  # a blank comes first
        ("[user][assistant]", ["</s>"]),  # without the answer nothing is known of what follows it
        (BOS + TURN.replace("m.content", "'?'"), ["</s>"]),
        (
            {"a": TURN.replace("[end]", "<turn>") + OPENING, "b": TURN.replace("[end]", BOS) + OPENING},
            ["</s>", "<turn>", "<s>"],
        ),
    ],
)
def test_the_beginning_of_a_prompt_is_no_end_of_an_answer(template, expected):
    tokenizer = with_template(template)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<turn>"]})
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=400, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    )
    model.generation_config.eos_token_id = None
    assert list(eos_token_ids(model, tokenizer)) == tokenizer.convert_tokens_to_ids(expected)


def test_padding_falls_back_to_what_ends_a_sequence(tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path / "eos")
    assert load_tokenizer(ModelConfig(path=_folder(tmp_path / "eos"))).pad_token == EOS
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path / "none")
    with pytest.raises(ValueError, match="has neither a pad nor an eos token; give it one"):
        load_tokenizer(ModelConfig(path=_folder(tmp_path / "none")))
    tokenizer.chat_template = TURN.replace("[end]", EOS) + OPENING
    tokenizer.save_pretrained(tmp_path / "turn")
    assert load_tokenizer(ModelConfig(path=_folder(tmp_path / "turn"))).pad_token == EOS


def _folder(path) -> str:
    (path / "config.json").write_text('{"model_type": "llama"}')
    return str(path)
