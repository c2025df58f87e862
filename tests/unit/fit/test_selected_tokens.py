"""Which tokens of prompts are read: the selection language against a search in the text."""

from __future__ import annotations

from itertools import accumulate, pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from chats import TEMPLATES, chat_tokenizer
from float64_reference import Seen, f64, selected
from hypothesis import given, settings
from hypothesis import strategies as st

from steer.engines.base import CaptureRequest
from steer.engines.selecting import TokenChoice
from steer.engines.transformers.engine import TransformersEngine
from steer.errors import SteerError
from steer.fit.bulk.selected import pieces, selected_tokens
from steer.fit.data.prompt import response_positions
from steer.fit.states import chosen_places, make_reading, read_rows, read_tokens
from steer.model import HookPoint
from steer.prompts import Marked, render
from steer.prompts.roles import found_roles
from steer.prompts.vocabulary import vocabulary_of
from steer.spec import Where

TOKENIZERS = {name: chat_tokenizer(name) for name in TEMPLATES}
ENGINES: dict[str, Any] = {
    name: SimpleNamespace(
        tokenizer=tokenizer,
        info=SimpleNamespace(vocab_size=len(tokenizer)),
        capabilities=SimpleNamespace(roles=found_roles(tokenizer)),
    )
    for name, tokenizer in TOKENIZERS.items()
}

pieces_of_text = st.lists(
    st.sampled_from(("fox", "yes", "a b", "é", "🦊", "\n", "```", "user")), min_size=1, max_size=4
).map("".join)
marks = st.sampled_from(("fox", "```", "é", "0:", ":1"))
pairs = st.tuples(marks, marks | st.none())
bounds = st.integers(-8, 40)
ranges = st.tuples(bounds, bounds | st.none()).filter(
    lambda r: r[1] is None or (r[0] < 0) != (r[1] < 0) or r[0] < r[1]
)


def lists(of: st.SearchStrategy[Any]) -> st.SearchStrategy[list[Any]]:
    return st.lists(of, min_size=1, max_size=2)


def fields(**more: Any) -> st.SearchStrategy[dict[str, Any]]:
    schedules = st.fixed_dictionaries(
        {"nth": st.integers(1, 3)}, optional={"first": st.integers(1, 6)}
    )
    return st.fixed_dictionaries(
        {},
        optional={
            "phases": lists(st.sampled_from(("prompt", "generation"))),
            "positions": lists(ranges),
            "roles": lists(st.sampled_from(("user", "assistant"))),
            "after": lists(marks),
            "before": lists(marks),
            "between": lists(pairs),
            "outside": lists(pairs),
            "every": schedules,
            **more,
        },
    )


wheres = fields(**{"except": fields()}).map(Where.model_validate)


class Written:
    """A prompt as bytes: where its messages and its response lie is found by searching for them,
    each of which is in it once."""

    def __init__(self, name: str, said: list[str], response: str | None) -> None:
        self.tokenizer, self.engine = TOKENIZERS[name], ENGINES[name]
        turns = [
            {"role": "user" if n % 2 == 0 else "assistant", "content": f"{n}:{one}:{n}"}
            for n, one in enumerate(said)
        ]
        self.prompt: Any = turns if response is None else Marked(turns, f"R:{response}:R")
        self.ids = render(self.tokenizer, self.prompt)
        vocabulary = vocabulary_of(self.tokenizer, len(self.tokenizer))
        ends = list(accumulate(len(vocabulary[token]) for token in self.ids))
        spans = list(pairwise([0, *ends]))
        text = b"".join(vocabulary[token] for token in self.ids)
        whose: dict[int, str] = {}
        self.length = len(self.ids)
        parts = [(turn["role"], turn["content"]) for turn in turns]
        if response is not None:
            parts.append(("assistant", f"R:{response}:R"))
        for number, (role, content) in enumerate(parts):
            assert text.count(content.encode()) == 1
            start = text.index(content.encode())
            stop = start + len(content.encode())
            inside = [n for n, (a, b) in enumerate(spans) if a < stop and b > start]
            whose |= dict.fromkeys(inside, role)
            if number == len(parts) - 1 and role == "assistant":
                self.length = inside[0]
        self.seen = Seen(self.ids, vocabulary, whose)

    def wanted(self, where: Where) -> list[int]:
        """As `where` reads aloud, token by token."""
        return [
            n
            for n, token in enumerate(self.ids)
            if selected(where, n, self.length, token, self.seen)
        ]


@pytest.mark.parametrize("template", TEMPLATES)
@settings(max_examples=25, deadline=None)
@given(where=wheres, said=st.lists(pieces_of_text, min_size=1, max_size=3), data=st.data())
def test_a_selection_is_what_a_search_in_the_text_finds(
    template: str, where: Where, said: list[str], data: st.DataObject
) -> None:
    response = data.draw(pieces_of_text | st.none()) if len(said) % 2 else None
    written = Written(template, said, response)
    choice = TokenChoice.of(written.engine, where, at="/where")
    found = chosen_places(choice, written.tokenizer, written.prompt, written.ids)
    assert list(found) == written.wanted(where)


@settings(max_examples=25, deadline=None)
@given(
    where=wheres, said=st.lists(pieces_of_text, min_size=3, max_size=3), length=st.integers(3, 9)
)
def test_a_text_is_asked_before_it_is_cut(where: Where, said: list[str], length: int) -> None:
    written = Written("chatml", said, None)
    cut, _ = pieces(written.engine, [written.prompt], length)
    wanted = [n for n in written.wanted(where) if n < sum(map(len, cut))]
    if not wanted:
        with pytest.raises(SteerError) as caught:
            selected_tokens(written.engine, [written.prompt], where, length)
        assert (caught.value.code, caught.value.param) == ("nothing_selected", "/where")
        return
    chosen = selected_tokens(written.engine, [written.prompt], where, length)
    starts = [sum(map(len, cut[:n])) for n in range(len(cut))]
    found = [start + n for k, start in enumerate(starts) for n in chosen.of(k, cut[k])]
    assert found == wanted


@pytest.mark.parametrize("template", TEMPLATES)
def test_what_was_generated_is_the_response(template: str) -> None:
    """So a vector that acts on what is generated is fitted where it will act."""
    tokenizer = TOKENIZERS[template]
    prompt = Marked([{"role": "user", "content": "fox?"}], "yes fox")
    said = list(response_positions(tokenizer, prompt))
    for where in ({"phases": ["generation"]}, {"roles": ["assistant"]}):
        choice = TokenChoice.of(ENGINES[template], Where.model_validate(where), at="/positions")
        found = chosen_places(choice, tokenizer, prompt, render(tokenizer, prompt))
        assert list(found) == said


def test_states_are_read_at_the_selected_tokens(engine: TransformersEngine) -> None:
    prompts: list[Any] = [
        [{"role": "user", "content": "where is it?"}],
        Marked([{"role": "user", "content": "and who is it?"}], "nobody"),
        Marked("a text", "and more"),
    ]
    where = Where.model_validate({"outside": [["is", "?"]], "positions": [[2, None]]})
    reading = make_reading(engine, layers=[1, 2], positions=where, batch=2)
    rows = read_rows(engine, prompts, reading)
    each = list(read_tokens(engine, prompts, reading))
    for number, prompt in enumerate(prompts):
        ids = render(engine.tokenizer, prompt)
        length = len(ids) if number == 0 else len(render(engine.tokenizer, prompt.prompt))
        vocabulary = vocabulary_of(engine.tokenizer, engine.info.vocab_size)
        seen = Seen(ids, vocabulary)
        places = [n for n, token in enumerate(ids) if selected(where, n, length, token, seen)]
        assert 0 < len(places) < len(ids)
        assert each[number][0] == [ids[n] for n in places]
        for layer in (1, 2):
            [alone] = engine.capture(CaptureRequest([ids], (HookPoint(layer),)))
            wanted = f64(alone.states[HookPoint(layer)])[places]
            torch.testing.assert_close(
                each[number][1][layer].double(), torch.tensor(wanted), rtol=1e-4, atol=1e-5
            )
            torch.testing.assert_close(
                rows[layer][number].double(), torch.tensor(wanted.mean(0)), rtol=1e-4, atol=1e-5
            )


@pytest.mark.parametrize(
    ("where", "code", "param"),
    [
        ({"after": ["nowhere"]}, "nothing_selected", "/positions"),
        ({"roles": ["user"]}, "no_messages", "/positions/roles"),
        ({"except": {"roles": ["user"]}}, "no_messages", "/positions/except/roles"),
        ({"tokens": ["two words"]}, "not_one_token", "/positions/tokens/0"),
    ],
)
def test_what_selects_nothing_is_refused_by_field(
    engine: TransformersEngine, where: Any, code: str, param: str
) -> None:
    def read() -> None:
        reading = make_reading(engine, positions=Where.model_validate(where))
        read_rows(engine, ["a text"], reading)

    with pytest.raises(SteerError) as caught:
        read()
    assert (caught.value.code, caught.value.param) == (code, param)
