"""Suites as files: read whole, or refused with what is wrong where."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from steer_vectors import LIBRARY

from steer.errors import FileFormatError, SpecError
from steer.fit.measure.scorers import parse_scorer
from steer.fit.measure.suite.file import parse_suite, read_suite

CONCEPT = {"name": "joy", "description": "Joy", "instruction": "Be glad.", "score": "words:joy"}
SUITE: dict[str, Any] = {"name": "s", "concepts": [CONCEPT], "prompts": ["one", "two"]}


def test_json_and_json_lines_are_one_suite(tmp_path: Path) -> None:
    whole, lines = tmp_path / "s.json", tmp_path / "s.jsonl"
    whole.write_text(json.dumps({**SUITE, "factors": [1.0, 2.0]}))
    items: list[Any] = [
        {"options": {"factors": [1.0, 2.0]}},
        {"concept": CONCEPT},
        {"prompt": "one"},
        {"prompt": "two"},
    ]
    lines.write_text("\n\n".join(map(json.dumps, items)) + "\n")
    assert read_suite(whole) == read_suite(lines)
    assert read_suite(whole).sha256 != parse_suite(SUITE).sha256


@pytest.mark.parametrize(
    ("changes", "param", "says"),
    [
        ({"concepts": []}, "/concepts", "at least 1"),
        ({"concepts": [{**CONCEPT, "name": "a b"}]}, "/concepts/0/name", "a b"),
        ({"concepts": [{**CONCEPT, "scores": "x"}]}, "/concepts/0/scores", "not permitted"),
        ({"concepts": [CONCEPT, CONCEPT]}, "", "two concepts are named 'joy'"),
        ({"prompts": ["one"]}, "/prompts", "at least 2"),
        ({"factors": [0.0]}, "/factors/0", "greater than 0"),
        ({"factors": [1.0, 1.0]}, "", "a factor is listed twice"),
        ({"max_tokens": 0}, "/max_tokens", "greater than or equal to 1"),
        ({"prompt": "x"}, "/prompt", "not permitted"),
    ],
)
def test_what_is_wrong_is_told_with_its_place(changes: Any, param: str, says: str) -> None:
    with pytest.raises(SpecError, match=says) as caught:
        parse_suite({**SUITE, **changes})
    assert caught.value.code == "invalid_suite"
    assert (caught.value.problems[0].param or "") == param


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("s.json", "{", "is not JSON"),
        ("s.jsonl", '{"concept": {}}\n{"promt": "x"}', "line 2 is not one of"),
        ("s.jsonl", '{"prompt": "x"}\n[1', "line 2 is not JSON"),
    ],
)
def test_files_that_are_no_suites(tmp_path: Path, name: str, text: str, says: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(FileFormatError, match=says):
        read_suite(tmp_path / name)
    with pytest.raises(FileFormatError, match="cannot be read"):
        read_suite(tmp_path / "missing.json")


@pytest.mark.parametrize("path", sorted(Path(LIBRARY).glob("suites/*.json")), ids=lambda p: p.stem)
def test_shipped_suites_need_no_judge(path: Path) -> None:
    suite = read_suite(path)
    assert suite.name == path.stem
    for concept in suite.concepts:
        assert concept.score is not None
        parse_scorer(concept.score)
