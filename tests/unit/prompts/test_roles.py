"""Whose words the tokens of a chat are, in templates of every shape."""

from __future__ import annotations

import random
from typing import Any

import pytest
from chats import TEMPLATES, WithoutOffsets, WithoutTemplate, byte_fallback, chat_tokenizer

from steer.engines.fake.tokenizer import ByteTokenizer
from steer.errors import SteerError, Unsupported
from steer.prompts import ChatForm, Marked, PromptInput, encode_prompt, render
from steer.prompts.chat import read_chat
from steer.prompts.rendering import rendered_roles
from steer.prompts.roles import chat_roles, found_roles

PIECES = ("fox", "yes", "a b", "日本", "🦊", "\n", "```", "<b>", "user", "  ", "é")


def conversation(draw: random.Random, turns: int) -> list[dict[str, Any]]:
    """Questions and answers in turn, some of them with white space around what they say."""
    found = []
    for n in range(turns):
        said = f"{n}:" + "".join(draw.choice(PIECES) for _ in range(draw.randint(1, 6))) + f":{n}"
        around = draw.choice([("", ""), (" ", "\n"), ("\n\n", "  ")])
        content: Any = said.join(around)
        found.append({"role": "user" if n % 2 == 0 else "assistant", "content": content})
    return found


def words(tokenizer: Any, messages: list[dict[str, Any]], form: ChatForm) -> list[tuple[str, str]]:
    """Each message's role, and what its tokens decode to."""
    ids, _ = read_chat(tokenizer, messages, form)
    found = chat_roles(tokenizer, messages, form)
    assert found.length == len(ids)
    return [(role, tokenizer.decode(ids[start:end])) for start, end, role in found.ranges]


@pytest.mark.parametrize("template", TEMPLATES)
def test_each_message_is_found_in_the_templates_own_writing(template: str) -> None:
    tokenizer, draw = chat_tokenizer(template), random.Random(template)
    assert {"user", "assistant"} <= set(found_roles(tokenizer))
    for turns in (1, 3, 5):
        messages = conversation(draw, turns)
        found = words(tokenizer, messages, ChatForm())
        assert [(role, said.strip()) for role, said in found] == [
            (turn["role"], turn["content"].strip()) for turn in messages
        ]


@pytest.mark.parametrize("wrap", [lambda one: one, WithoutOffsets])
def test_what_a_message_says_does_not_lead_astray(wrap: Any) -> None:
    """It repeats other messages, or spells the template's own marks."""
    tokenizer = wrap(chat_tokenizer("chatml"))
    messages = [
        {"role": "system", "content": "fox"},
        {"role": "user", "content": "fox\nassistant\nfox"},
        {"role": "assistant", "content": "user"},
        {"role": "user", "content": "fox"},
    ]
    found = words(tokenizer, messages, ChatForm())
    assert found == [(turn["role"], turn["content"]) for turn in messages]


def test_messages_that_say_nothing_have_no_tokens_and_others_are_the_system() -> None:
    tokenizer = ByteTokenizer()
    messages = [
        {"role": "developer", "content": "be brief"},
        {"role": "user", "content": "  "},
        {"role": "user", "content": "who?"},
    ]
    assert words(tokenizer, messages, ChatForm()) == [("system", "be brief"), ("user", "who?")]
    assert set(found_roles(tokenizer)) == {"system", "user", "assistant", "tool"}


def test_an_answer_that_goes_on_is_the_assistants_without_its_thoughts() -> None:
    tokenizer = chat_tokenizer("chatml")
    messages = [
        {"role": "user", "content": "who?"},
        {"role": "assistant", "content": "<think>\nhm\n</think>\n\nfox"},
    ]
    form = ChatForm(open_answer=False, continue_final=True)
    assert words(tokenizer, messages, form) == [("user", "who?"), ("assistant", "fox")]


def test_a_character_of_several_tokens_has_them_all() -> None:
    tokenizer = byte_fallback.__wrapped__()
    tokenizer.chat_template = TEMPLATES["chatml"]
    messages = [{"role": "user", "content": "日"}]
    ids, _ = read_chat(tokenizer, messages)
    ((start, end, role),) = chat_roles(tokenizer, messages).ranges
    assert role == "user"
    assert tokenizer.decode(ids[start:end]).strip() == "日"
    assert end - start >= 3


def test_a_tokenizer_that_writes_chats_by_a_program_is_asked_as_it_is() -> None:
    tokenizer = WithoutTemplate()
    messages = [{"role": "user", "content": "who?"}]
    assert words(tokenizer, messages, ChatForm()) == [("user", "who?")]
    assert "user" in found_roles(tokenizer)


REWRITERS = {
    "it counts": "{% for m in messages %}{{ m.content }} has {{ m.content|length }}{% endfor %}",
    "it looks at the beginning": (
        "{% for m in messages %}{% if m.content.startswith('w') %}?{% else %}.{% endif %}"
        "{{ m.content }}{% endfor %}"
    ),
    "it says it twice": "{% for m in messages %}{{ m.content }} {{ m.content }}{% endfor %}",
    "it leaves it out": "{% for m in messages %}{{ m.role }}{% endfor %}",
    "it shouts": "{% for m in messages %}{{ m.content | upper }}{% endfor %}",
}


@pytest.mark.parametrize("name", [name for name in REWRITERS if name != "it shouts"])
def test_a_template_that_does_not_show_it_is_refused(name: str) -> None:
    tokenizer = chat_tokenizer(REWRITERS[name])
    with pytest.raises(Unsupported) as caught:
        chat_roles(tokenizer, [{"role": "user", "content": "who?"}], param="/messages")
    assert (caught.value.code, caught.value.param) == ("roles_unsupported", "/messages")


def test_a_template_that_changes_words_and_keeps_their_place_is_read() -> None:
    tokenizer = chat_tokenizer(REWRITERS["it shouts"])
    assert words(tokenizer, [{"role": "user", "content": "who?"}], ChatForm()) == [("user", "WHO?")]


def test_roles_that_a_template_does_not_know_are_not_found() -> None:
    tokenizer = chat_tokenizer(
        "{% for m in messages %}{% if m.role == 'tool' or m.role == 'system' %}"
        "{{ raise_exception('no') }}{% endif %}<turn>{{ m.content }}{% endfor %}"
    )
    assert found_roles(tokenizer) == ("user", "assistant")
    tokenizer.chat_template = None
    assert found_roles(tokenizer) == ()
    with pytest.raises(SteerError) as caught:
        chat_roles(tokenizer, [{"role": "user", "content": "who?"}])
    assert caught.value.code == "no_chat_template"


def test_an_inspections_prompt_knows_its_messages() -> None:
    class Reader:
        tokenizer = chat_tokenizer("chatml")
        info: Any = type("Info", (), {"max_length": 99, "vocab_size": 999, "name": "m"})

    asked = {"messages": [{"role": "user", "content": "who?"}]}
    prompt = encode_prompt(Reader(), PromptInput.model_validate(asked))
    assert prompt.roles is not None
    ((start, end, role),) = prompt.roles.ranges
    assert (role, Reader.tokenizer.decode(prompt.ids[start:end])) == ("user", "who?")
    assert encode_prompt(Reader(), PromptInput.model_validate({"text": "who?"})).roles is None


def test_prompts_of_data_files_know_their_messages() -> None:
    tokenizer = chat_tokenizer("chatml")
    asked = [{"role": "user", "content": "who?"}]
    for messages in (asked, [*asked, {"role": "assistant", "content": "fox"}]):
        ids, found = render(tokenizer, messages), rendered_roles(tokenizer, messages)
        assert found is not None
        assert found.length == len(ids)
        said = [tokenizer.decode(ids[start:end]) for start, end, _ in found.ranges]
        assert said == [turn["content"] for turn in messages]
        assert rendered_roles(tokenizer, Marked(messages)) == found
    assert rendered_roles(tokenizer, "who?") is None
    answered = Marked(asked, response="fox")
    found = rendered_roles(tokenizer, answered)
    ids = render(tokenizer, answered)
    assert found is not None
    assert found.length == len(ids)
    assert [(role, tokenizer.decode(ids[a:b])) for a, b, role in found.ranges] == [
        ("user", asked[0]["content"]),
        ("assistant", "fox"),
    ]
    assert rendered_roles(tokenizer, Marked("who?", response="fox")) is None
