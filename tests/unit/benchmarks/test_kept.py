"""Results that are kept as they are measured: going on, and refusing to mix."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.kept import Kept
from benchmarks.machine import machine, same, sources

HERE = {"cpu": "one", "torch": "2.0", "load": 0.1, "date": "2026-01-01"}


def kept(path: Path, *, fresh: bool = False, **settings: int) -> Kept:
    return Kept.at(path, settings, HERE, fresh=fresh)


def test_a_run_goes_on_where_it_was_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "bench.json"
    first = kept(path, rounds=3)
    first.keep("decode/demo/0", [1.0])
    first.keep("decode/demo/1", [2.0])
    first.keep("decode/demonstration/0", [9.0])
    again = kept(path, rounds=3)
    assert "decode/demo/0" in again
    assert again["decode/demo/1"] == [2.0]
    assert again.below("decode/demo") == [[1.0], [2.0]]
    assert json.loads(path.read_text())["results"] == again.results
    assert [one.name for one in path.parent.iterdir()] == ["bench.json"]
    assert kept(path, fresh=True, rounds=3).results == {}


@pytest.mark.parametrize(
    ("settings", "here", "named"),
    [
        ({"rounds": 4}, HERE, "rounds"),
        ({"rounds": 3, "batch": 1}, HERE, "batch"),
        ({}, HERE, "rounds"),
        ({"rounds": 3}, {**HERE, "cpu": "two"}, "machine"),
        ({"rounds": 3}, {**HERE, "torch": "3.0"}, "machine"),
    ],
)
def test_what_was_measured_otherwise_is_neither_mixed_nor_thrown_away(
    tmp_path: Path, settings: dict[str, int], here: dict[str, object], named: str
) -> None:
    path = tmp_path / "bench.json"
    kept(path, rounds=3).keep("a", 1)
    with pytest.raises(ValueError, match=rf"other {named}: name another file with --out"):
        Kept.at(path, settings, here)
    assert kept(path, rounds=3).results == {"a": 1}


def test_the_day_and_the_load_do_not_make_another_machine() -> None:
    assert same(HERE, {**HERE, "load": 3.0, "date": "2026-01-02"})
    found = machine(("torch", "no-such-package"))
    assert found["torch"]
    assert "no-such-package" not in found


def test_sources_are_known_by_what_they_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "measured_package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    before = sources("measured_package")
    assert before == sources("measured_package")
    (package / "more.py").write_text("x = 1\n")
    assert sources("measured_package") != before
