"""The table of kinds is whole, and the only list of them."""

from __future__ import annotations

import ast
import subprocess
import sys
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import get_args

import pytest
from artefacts import EXAMPLES

from steer.artefacts.kinds import KINDS, NAMED, PLURALS, ArtefactKind, KindRow, Plural, row_of
from steer.artefacts.library import Library, MemoryLibrary
from steer.formats.canonical import READERS
from steer.formats.importing import read_artefact
from steer.formats.options import ImportOptions
from steer.registry.registry import Registry

ROOT = Path(__file__).parents[3]
TABLE = ROOT / "steer" / "artefacts" / "kinds.py"

each_kind = pytest.mark.parametrize("row", KINDS, ids=lambda row: row.name)


def test_every_kind_has_one_row_and_a_reader() -> None:
    assert tuple(row.name for row in KINDS) == get_args(ArtefactKind)
    assert tuple(row.plural for row in KINDS) == get_args(Plural)
    assert list(NAMED.values()) == list(PLURALS.values()) == list(KINDS)
    for column in ("shelf", "title", "home"):
        assert len({getattr(row, column) for row in KINDS}) == len(KINDS), column
    assert set(READERS) == set(NAMED)
    assert set(EXAMPLES) == set(NAMED), "give the new kind an example in tests/support/artefacts.py"


@each_kind
def test_the_class_of_a_kind(row: KindRow, tmp_path: Path) -> None:
    artefact = EXAMPLES[row.name]()
    kind = row.artefact_class()
    assert (type(artefact), row_of(kind)) == (kind, row)
    assert is_dataclass(kind)
    assert artefact.card.kind == row.name
    data = artefact.to_bytes()
    again = kind.from_bytes(data, name="again")
    assert (again.sha256, again.card.name) == (artefact.sha256, "again")
    file = tmp_path / "file"
    file.write_bytes(data)
    read = read_artefact(file, ImportOptions(), scratch=None, unpacked_limit=0)
    assert (type(read), read.sha256) == (kind, artefact.sha256)


@each_kind
def test_libraries_hold_every_kind(row: KindRow, tmp_path: Path) -> None:
    artefact = EXAMPLES[row.name]()
    assert row.shelf in {field.name for field in fields(MemoryLibrary)}
    assert callable(getattr(Library, row.name))
    in_memory = MemoryLibrary(**{row.shelf: {"one": artefact}})
    assert getattr(in_memory, row.name)("one") is artefact
    with Registry.open(tmp_path) as registry:
        registry.add("one", artefact)
        loaded = registry.load(row.artefact_class(), "one")
        assert (loaded.sha256, loaded.card.name) == (artefact.sha256, "one")
        assert getattr(registry, row.name)("one") is loaded


def test_a_class_without_a_row_is_none_of_ours() -> None:
    with pytest.raises(KeyError):
        row_of(dict)


def test_the_table_loads_no_torch() -> None:
    """The options of the command line are made of it."""
    code = "import sys, steer.artefacts.kinds; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_there_is_no_second_list_of_the_kinds() -> None:
    """In no other module do two kinds' words for routes stand, as they would in such a list."""
    words = set(PLURALS) | {f"/v1/steering/{plural}" for plural in PLURALS}
    listing = {}
    for source in [*(ROOT / "steer").rglob("*.py"), *(ROOT / "server").rglob("*.py")]:
        nodes = ast.walk(ast.parse(source.read_text(encoding="utf-8")))
        texts = {node.value for node in nodes if isinstance(node, ast.Constant)}
        found = {word for word in words if word in texts}
        if len(found) > 1:
            listing[source] = found
    assert set(listing) == {TABLE}, listing
