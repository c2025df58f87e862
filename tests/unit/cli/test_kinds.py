"""Every kind of artefact has every command: added, listed, shown, named, tagged, removed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from artefacts import EXAMPLES
from typer.testing import CliRunner, Result

from steer.artefacts.kinds import KINDS, KindRow
from steer.cli import app
from steer.registry.registry import Registry

each_kind = pytest.mark.parametrize("row", KINDS, ids=lambda row: row.name)


def steer(place: Path, *arguments: object, code: int = 0) -> Result:
    given = [*map(str, arguments), "--registry", str(place)]
    result = CliRunner().invoke(app, given)
    assert result.exit_code == code, result.output
    return result


def names(place: Path, *arguments: object) -> list[str]:
    return [row["id"].partition("@")[0] for row in json.loads(steer(place, *arguments).stdout)]


@each_kind
def test_a_life_on_the_command_line(row: KindRow, tmp_path: Path) -> None:
    place, file, kind = tmp_path / "registry", tmp_path / "one.safetensors", ("--kind", row.name)
    data = EXAMPLES[row.name]().to_bytes()
    file.write_bytes(data)
    assert f"No {row.plural} yet" in steer(place, "vectors", "list", *kind).stderr
    assert "one@" in steer(place, "vectors", "add", file, *kind).output
    assert "already registered" in steer(place, "vectors", "import", file).output

    assert "other -> one" in steer(place, "aliases", "set", "other", "one", *kind).output
    assert json.loads(steer(place, "aliases", "list", "--json").stdout) == [
        {"kind": row.name, "name": "other", "target": "one"}
    ]
    assert steer(place, "tags", "set", "other", "fine", *kind).output == "fine\n"
    assert steer(place, "tags", "show", "one", *kind).output == "fine\n"
    assert json.loads(steer(place, "vectors", "show", "other", *kind).stdout)["name"] == "one"
    for found in (("vectors", "list"), ("registry", "search")):
        assert names(place, *found, "--tag", "fine", "--json", *kind) == ["one"]
    out = tmp_path / "out.safetensors"
    steer(place, "vectors", "export", "other", "--out", out, *kind)
    assert out.read_bytes() == data
    foreign = tmp_path / "out.gguf"
    exported = steer(
        place, "vectors", "export", "one", "-o", foreign, *kind, code=0 if row.exported else 2
    )
    assert foreign.exists() is row.exported
    assert ("unsupported_format" in exported.output) is not row.exported

    assert "in_use" in steer(place, "vectors", "remove", "one", *kind, code=2).output
    steer(place, "aliases", "remove", "other", *kind)
    assert steer(place, "tags", "unset", "one", "fine", *kind).output == "no tags\n"
    steer(place, "vectors", "remove", "one", *kind)
    unknown = steer(place, "vectors", "show", "one", *kind, code=2)
    assert f"unknown_{row.name}" in unknown.output
    assert names(place, "vectors", "list", "--deleted", "--json", *kind) == ["one"]
    assert "restored one" in steer(place, "vectors", "restore", "one", *kind).output


def test_all_kinds_at_once(tmp_path: Path) -> None:
    """Found, listed by alias, counted and moved; a name may be of every kind."""
    place, archive, copy = tmp_path / "registry", tmp_path / "all.tar", tmp_path / "copy"
    with Registry.open(place) as registry:
        for row in KINDS:
            registry.add("one", EXAMPLES[row.name]())
            registry.set_alias(row.name, "other", "one")
            registry.change_tags(row.name, "one", add=["fine"])
    steer(place, "registry", "export", archive)
    steer(copy, "registry", "import", archive)
    for here in (place, copy):
        found = json.loads(steer(here, "registry", "search", "--json").stdout)
        assert {one["kind"]: one["tags"] for one in found} == {row.name: ["fine"] for row in KINDS}
        listed = json.loads(steer(here, "aliases", "list", "--json").stdout)
        assert {one["kind"] for one in listed} == {row.name for row in KINDS}
        counted = json.loads(steer(here, "registry", "stats", "--json").stdout)
        assert {row.plural: counted[row.plural] for row in KINDS} == dict.fromkeys(
            (row.plural for row in KINDS), 1
        )
    assert "lens" in steer(place, "aliases", "list").output


def test_a_kind_that_there_is_not(tmp_path: Path) -> None:
    shown = steer(tmp_path, "aliases", "remove", "one", "--kind", "profile", code=2)
    assert all(row.name in shown.output for row in KINDS)
