"""Texts whose states are read come in every form that a fit takes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from steer.errors import FileFormatError
from steer.fit.data.texts import parse_texts, read_texts, token_ids
from steer.prompts import Marked

CHAT = [{"role": "user", "content": "who?"}]


@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        ("a text", ["a text"]),
        (CHAT, [CHAT]),
        ({"tokens": [1, 2]}, [(1, 2)]),
        ({"text": "a", "label": "b"}, ["a"]),
        ({"messages": CHAT, "labels": {"b": True}}, [CHAT]),
        ({"prompt": "a"}, ["a"]),
        ({"prompt": CHAT, "response": "me", "label": 1}, [Marked(CHAT, "me")]),
        ({"prompt": {"prompt": "a", "subject": "a"}}, [Marked("a", subject="a")]),
        (
            {"positive": "a", "negative": {"prompt": CHAT, "response": "b"}},
            ["a", Marked(CHAT, "b")],
        ),
    ],
)
def test_a_line_is_its_texts(tmp_path: Path, line: Any, wanted: list[Any]) -> None:
    data = json.dumps("first") + "\n\n" + json.dumps(line) + "\n"
    (tmp_path / "texts.jsonl").write_text(data)
    found = read_texts(tmp_path / "texts.jsonl")
    assert list(found.texts) == ["first", *wanted]
    assert found.items == (0, *(1 for _ in wanted))
    assert parse_texts(data.encode(), "data") == found
    assert [token_ids(one) is not None for one in found.texts[1:]] == [
        isinstance(one, tuple) for one in wanted
    ]


@pytest.mark.parametrize(
    "line",
    [
        7,
        {},
        {"tokens": []},
        {"tokens": [1, -1]},
        {"tokens": [True]},
        {"tokens": [1], "label": "a"},
        {"text": "a", "messages": CHAT},
        {"text": "a", "more": 1},
        {"positive": "a"},
        {"prompt": {"prompt": "a", "response": "b"}, "response": "c"},
    ],
)
def test_what_is_no_text_is_told_with_its_line(line: Any) -> None:
    with pytest.raises(FileFormatError, match="data, line 2") as caught:
        parse_texts(b'"first"\n' + json.dumps(line).encode(), "data")
    assert caught.value.code == "invalid_texts"
