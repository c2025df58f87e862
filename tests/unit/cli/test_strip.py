"""Read-outs in the terminal: a line for each token, a bar for each number."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from steer.cli.answer.generate import parse_readouts
from steer.cli.answer.picture import heat_of, write_pictures
from steer.cli.answer.strip import strip
from steer.errors import SteerError, TooLarge

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


def test_a_picture_has_a_row_for_each_reading_and_a_scale_for_each_row(tmp_path: Path) -> None:
    lens = [{**AT, "top": [{"token": " Je", "id": 4, "probability": 0.75}], "entropy": 0.5}]
    entries = [entry("Je", 4.0, lens=lens, kl=0.5), entry("\n", -2.0, kl=0.125), entry("x", None)]
    heat = heat_of("steered", entries)
    assert heat.rows == ["kl", "lens 3", "french 3"]
    assert heat.columns == ["Je", "\\n", "x"]
    assert heat.values == [[1.0, 0.25, 0.0], [1.0, 0.0, 0.0], [1.0, -0.5, 0.0]]
    assert heat.texts == [["0.5", "0.125", ""], ["' Je'", "", ""], ["4", "-2", ""]]
    assert heat.limits == (-1.0, 1.0)
    files = write_pictures(tmp_path / "a.png", {"default": entries[:1], "steered": entries})
    assert files == [tmp_path / "a-default.png", tmp_path / "a.png"]
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in files)


def test_a_picture_of_too_much_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    entries = [entry("x", 1.0, kl=0.1)] * 2100
    with pytest.raises(TooLarge):
        write_pictures(tmp_path / "a.png", {"steered": entries})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("text", ["{", "[]", '{"norms": "every"}', '{"nothing": 1}'])
def test_an_option_that_says_nothing_readable_is_refused(text: str) -> None:
    with pytest.raises(SteerError) as caught:
        parse_readouts(text)
    assert (caught.value.code, caught.value.param) == ("invalid_option", "--inspect")
