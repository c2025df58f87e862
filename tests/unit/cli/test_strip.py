"""Read-outs in the terminal: a line for each token, a bar for each number."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from steer.cli.answer.generate import parse_readouts
from steer.cli.answer.strip import strip
from steer.errors import SteerError

AT = {"layer": 3, "site": "resid_post"}


def entry(token: str, along: float | None, **fields: Any) -> dict[str, Any]:
    read = [{"vector": "french", **AT, "value": along}]
    return {"token": token, "phase": "generation", "projections": read, **fields}


def drawn(*entries: dict[str, Any]) -> list[str]:
    console = Console(file=io.StringIO(), width=160)
    console.print(strip("steered", entries))
    return console.file.getvalue().splitlines()  # type: ignore[attr-defined]


def test_every_token_has_its_line_and_the_largest_the_longest_bar() -> None:
    title, head, *lines = drawn(entry("Je", 4.0), entry(" vais\n", -2.0), entry("x", None))
    assert title.strip() == "steered"
    assert "french 3" in head
    assert [line.count("█") for line in lines] == [6, 3, 0]
    assert lines[1].startswith("  vais\\n") or " vais\\n" in lines[1]


def test_what_is_ranked_shows_its_first() -> None:
    top = [
        {"feature": 7, "activation": 2.5, "label": {"text": "French words of every kind"}},
        {"feature": 1, "activation": 1.0},
    ]
    lens = [{**AT, "top": [{"token": " Je", "id": 4, "probability": 0.75}], "entropy": 0.5}]
    lines = drawn(entry("Je", 1.0, features=[{"sae": "s", **AT, "top": top}], lens=lens, kl=0.25))
    assert "#7 2.5 French words" in lines[2]
    assert "#1" not in lines[2]
    assert "' Je' 0.75" in lines[2]
    assert "0.25" in lines[2]


@pytest.mark.parametrize("text", ["{", "[]", '{"norms": "all"}', '{"nothing": 1}'])
def test_an_option_that_says_nothing_readable_is_refused(text: str) -> None:
    with pytest.raises(SteerError) as caught:
        parse_readouts(text)
    assert (caught.value.code, caught.value.param) == ("invalid_option", "--inspect")
