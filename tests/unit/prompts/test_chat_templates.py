"""Chats in the model's own template: their tokens, their variables, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
from chats import TEMPLATES, WithoutTemplate, chat_tokenizer

from steer.engines.fake.engine import FakeEngine
from steer.errors import SteerError, Unsupported
from steer.prompts import (
    ChatForm,
    PromptInput,
    chat_tokens,
    encode_prompt,
    has_chat_template,
    render,
    text_tokens,
)
from steer.prompts.chat import check_variables, read_chat, template_variables

ASK = [{"role": "user", "content": "who?"}]
ANSWERED = [*ASK, {"role": "assistant", "content": "fox"}]


@pytest.mark.parametrize("template", TEMPLATES)
def test_the_templates_tokens_are_taken_and_the_text_is_theirs(template: str) -> None:
    tokenizer = chat_tokenizer(template)
    wanted = tokenizer.apply_chat_template(ASK, add_generation_prompt=True, return_dict=False)
    ids, text = read_chat(tokenizer, ASK)
    assert ids == wanted == chat_tokens(tokenizer, ASK) == render(tokenizer, ASK)
    assert tokenizer.decode(ids) == text
    assert ids.count(tokenizer.bos_token_id) == text.count("<s>") <= 1


def test_control_tokens_of_a_tokenizer_that_reads_none_in_texts_stay_tokens() -> None:
    """Mistral's: the text of its chat, read again, would spell `[INST]` in letters."""
    tokenizer = WithoutTemplate()
    ids, text = read_chat(tokenizer, ASK)
    assert tokenizer.convert_ids_to_tokens([ids[0], ids[1], ids[-1]]) == [
        "<s>",
        "[INST]",
        "[/INST]",
    ]
    assert text == "<s>[INST]who?[/INST]"
    assert tokenizer.encode(text, add_special_tokens=False) != ids
    engine = FakeEngine()
    engine.tokenizer = tokenizer
    engine_prompt = encode_prompt(engine, PromptInput.model_validate({"messages": ASK}))
    assert list(engine_prompt.ids) == ids
    assert engine_prompt.tokens[engine_prompt.position("who?", param="/p")] == "?"


def test_an_inspection_reads_the_chat_that_was_asked_for() -> None:
    engine = FakeEngine()
    engine.tokenizer = chat_tokenizer("empties")
    asked = {"messages": ASK, "chat_template_kwargs": {"enable_thinking": False}}
    read = encode_prompt(engine, PromptInput.model_validate(asked))
    assert read.text is not None
    assert read.text.endswith("<think>\n\n</think>\n\n")
    with pytest.raises(Unsupported) as caught:
        encode_prompt(
            engine,
            PromptInput.model_validate({"messages": ASK, "chat_template_kwargs": {"a": 1}}),
            at="/source",
        )
    assert caught.value.param == "/source/chat_template_kwargs/a"
    with pytest.raises(ValueError, match="given as 'messages'"):
        PromptInput.model_validate({"text": "a", "chat_template_kwargs": {"enable_thinking": True}})


def test_a_control_token_that_a_user_spells_is_what_the_tokenizer_makes_of_it() -> None:
    spelled = [{"role": "user", "content": "<|im_end|>"}]
    hugging_face, mistral = chat_tokenizer("chatml"), WithoutTemplate()
    end = hugging_face.convert_tokens_to_ids("<|im_end|>")
    assert chat_tokens(hugging_face, spelled).count(end) == 2
    assert chat_tokens(mistral, spelled).count(end) == 0


def test_a_history_that_ends_with_an_answer_is_written_even_where_only_questions_end() -> None:
    assert WithoutTemplate().decode(render(WithoutTemplate(), ANSWERED)) == (
        "<s>[INST]who?[/INST]fox"
    )


@pytest.mark.parametrize(
    ("tokenizer", "known"),
    [
        (chat_tokenizer("chatml"), True),
        (chat_tokenizer({"default": TEMPLATES["chatml"], "tool_use": "x"}), True),
        (WithoutTemplate(), True),
        (chat_tokenizer(None), False),
        (chat_tokenizer({"rag": "x", "tool_use": "x"}), False),
    ],
)
def test_whether_chats_can_be_written(tokenizer: Any, known: bool) -> None:
    assert has_chat_template(tokenizer) == known
    if known:
        assert chat_tokens(tokenizer, ASK)
        return
    with pytest.raises(SteerError, match="plain texts") as caught:
        chat_tokens(tokenizer, ASK, param="/messages")
    assert (caught.value.code, caught.value.param) == ("no_chat_template", "/messages")


def test_named_templates_without_a_default_are_named() -> None:
    with pytest.raises(SteerError, match=r"rag, tool_use.*none of them is its 'default'"):
        chat_tokens(chat_tokenizer({"tool_use": "x", "rag": "x"}), ASK)


@pytest.mark.parametrize(
    ("template", "messages", "reason"),
    [
        ("gemma", [{"role": "system", "content": "be"}, *ASK], "System role not supported"),
        ("gemma", [{"role": "developer", "content": "be"}, *ASK], "System role not supported"),
        ("gemma", [*ASK, *ASK], "must alternate"),
    ],
)
def test_what_a_template_refuses_is_said_in_its_words(
    template: str, messages: Any, reason: str
) -> None:
    with pytest.raises(SteerError, match=reason) as caught:
        chat_tokens(chat_tokenizer(template), messages, param="/messages")
    assert (caught.value.code, caught.value.param) == ("invalid_messages", "/messages")


def test_a_long_complaint_is_cut() -> None:
    tokenizer = chat_tokenizer("{{ raise_exception(messages[0].content) }}")
    with pytest.raises(SteerError) as caught:
        chat_tokens(tokenizer, [{"role": "user", "content": "a" * 100_000}])
    assert len(caught.value.message) < 1000


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("chatml", "<|im_start|>system\nbe\n\nkind<|im_end|>\n<|im_start|>user\nwho?<|im_end|>\n"),
        ("folding", "<s>[INST] <<SYS>>be\n\nkind<</SYS>>who? [/INST]"),
        (
            "channels",
            "<|im_start|>system<|message|>Reasoning: medium<|im_end|><|im_start|>system<|message|>"
            "be<|im_end|><|im_start|>user<|message|>who?<|im_end|>"
            "<|im_start|>developer<|message|>kind<|im_end|>",
        ),
    ],
)
def test_a_developer_is_the_system_unless_the_template_knows_one(template: str, text: str) -> None:
    """vLLM's rule: then all system messages become one, the first."""
    said = [{"role": "system", "content": "be"}, *ASK, {"role": "developer", "content": "kind"}]
    assert read_chat(chat_tokenizer(template), said, ChatForm(open_answer=False))[1] == text


@pytest.mark.parametrize(
    ("template", "ending"),
    [
        ("chatml", "assistant\nfox"),
        ("llama3", "assistant<|header|>\n\nfox"),
        ("empties", "<think>\n\n</think>\n\nfox"),
        ("folding", "[/INST] fox"),
        ("channels", "final<|message|>fox"),
    ],
)
def test_the_last_message_is_left_open(template: str, ending: str) -> None:
    form = ChatForm(open_answer=False, continue_final=True)
    ids, text = read_chat(chat_tokenizer(template), ANSWERED, form)
    assert text.endswith(ending)
    assert chat_tokenizer(template).decode(ids) == text


@pytest.mark.parametrize(
    ("source", "variables"),
    [
        (TEMPLATES["chatml"], set()),
        (TEMPLATES["empties"], {"enable_thinking"}),
        (TEMPLATES["channels"], {"reasoning_effort"}),
        (TEMPLATES["llama3"], {"bos_token"}),
        (TEMPLATES["words"], set()),
        ("{% if not d is defined %}{% set d = 'now' %}{% endif %}{{ d }}", {"d"}),
        ("{% macro m(x) %}{{ x }}{{ y }}{% endmacro %}{{ m(1) }}", {"y"}),
        ("{% for m in messages %}{% break %}{{ strftime_now(f) }}{% endfor %}", {"f"}),
        ("{% set a = a or 1 %}{% if a %}{% set b = 1 %}{% endif %}{{ b }}", {"a"}),
        ("{% set ns = namespace(a=1) %}{{ ns.a }}{{ range(2) | list }}", set()),
        ({"default": "{{ thinking }}", "tool_use": "{{ other }}"}, {"thinking"}),
        ("{% broken", set()),
        (None, set()),
    ],
)
def test_the_variables_that_a_template_reads(source: Any, variables: set[str]) -> None:
    found = template_variables(chat_tokenizer(source))
    assert found - {"documents", "reasoning_effort"} == variables - {"reasoning_effort"}
    assert ("reasoning_effort" in found) == ("reasoning_effort" in variables)


def test_a_tokenizers_own_program_reads_its_arguments() -> None:
    assert template_variables(WithoutTemplate()) == {"reasoning_effort"}
    form = ChatForm(variables={"reasoning_effort": "high"})
    assert read_chat(WithoutTemplate(), ASK, form)[1] == "<s>effort high[INST]who?[/INST]"


def test_a_variable_that_nobody_reads_is_refused_by_name() -> None:
    tokenizer = chat_tokenizer("empties")
    check_variables(tokenizer, {"enable_thinking": False}, param="/v")
    with pytest.raises(Unsupported, match=r"'enable_thinkin'.*'enable_thinking'") as caught:
        check_variables(tokenizer, {"enable_thinkin": False}, param="/v")
    assert (caught.value.param, caught.value.code) == ("/v/enable_thinkin", "unsupported_parameter")


@pytest.mark.parametrize(("text", "begins"), [("fox", 1), ("<s>fox", 1), ("<s><s>fox", 2), ("", 1)])
def test_a_text_that_spells_its_beginning_has_no_second_one(text: str, begins: int) -> None:
    tokenizer = chat_tokenizer("llama3")
    assert text_tokens(tokenizer, text).count(tokenizer.bos_token_id) == begins
    rendered = read_chat(tokenizer, ASK)
    assert text_tokens(tokenizer, rendered[1]) == rendered[0]
