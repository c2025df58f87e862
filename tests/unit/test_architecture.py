"""The house is as docs/architecture.md says: its order, its words, its sizes."""

from __future__ import annotations

import ast
import configparser
import re
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import networkx
import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = {"steer": "steer", "steer_server": "server/steer_server", "steer_vectors": "vectors"}
PAGE = (ROOT / "docs" / "architecture.md").read_text()
MOST_FILES = 15

WORDS = """
  spec, intervention, kind, artefact, oracle, probe, card, library, selection, ramp, mark,
  automaton, trace, gate, onset, window, law, channels, side, block, rule, plan, slot, table,
  request, span, step, ledger, receipt, hook point, tap, capture, read-out, reader, detector, watch,
  ticket, bookmark, replica, seam
"""

RETIRED = {
    "Seat": "SteeredRequest",
    "Seating": "RequestRows",
    "Pass": "Rule",
    "Stage": "Table",
    "Part": "TableView",
    "Competition": "Encoder",
    "Desk": "TicketIssuer",
    "GraphForm": "StaticForm",
    "rivals": "encoder",
    "contest": "encoder",
    "restless": "reads_tokens",
    "steady_from": "fixed_from",
    "settled_from": "fixed_from",
}
"""Names that meant what another word means now."""


@cache
def modules() -> dict[str, Path]:
    found = {}
    for package, folder in PACKAGES.items():
        for path in (ROOT / folder).rglob("*.py"):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            found[".".join([package, *parts]).removesuffix(".__init__")] = path
    return found


@cache
def imports_of(module: str) -> frozenset[str]:
    """Every module of ours that `module` imports, also inside functions, not for types alone."""
    return frozenset(_imports(ast.parse(modules()[module].read_text()), module))


def _imports(node: ast.AST, module: str) -> Iterator[str]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING"):
            continue
        if isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, f"{module} imports relatively: say the whole name"
            for alias in child.names:
                inner = f"{child.module}.{alias.name}"
                yield inner if inner in modules() else str(child.module)
        else:
            yield from _imports(child, module)


def section(title: str) -> str:
    """The text of one section of the page."""
    (text,) = re.findall(rf"^## {title}\n(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL)
    return str(text)


def test_no_files_import_each_other_in_a_circle() -> None:
    graph = networkx.DiGraph(
        (module, other)
        for module in modules()
        for other in imports_of(module) & modules().keys()
        if other != module
    )
    circles = [c for c in networkx.strongly_connected_components(graph) if len(c) > 1]
    assert circles == []


def test_no_folder_is_too_full_to_be_looked_over() -> None:
    files = Counter(
        path.parent.relative_to(ROOT)
        for folder in (*PACKAGES.values(), "benchmarks", "tests")
        for path in (ROOT / folder).rglob("*.py")
        if path.name != "__init__.py"
    )
    assert {str(f): n for f, n in files.items() if n > MOST_FILES} == {}


def test_no_class_name_stands_for_two_things() -> None:
    names = Counter(
        node.name
        for module, path in modules().items()
        if module.startswith("steer.")
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.ClassDef)
    )
    assert [name for name, times in names.items() if times > 1] == []


def test_the_order_of_imports_is_the_pages() -> None:
    read = configparser.ConfigParser()
    read.read(ROOT / ".importlinter")
    enforced = read["importlinter:contract:order"]["layers"].split("\n")
    (block,) = re.findall(r"```\n(.*?)```", section("Who imports whom"), re.DOTALL)
    told = [line.split("  ")[0].strip() for line in block.strip().splitlines()]
    assert told == [line.strip() for line in enforced if line.strip()]


CLAIMS = re.findall(
    r"^- `([\w.]+)` never imports ((?:`[\w.]+`(?:, | or )?)+)", section("Who imports whom"), re.M
)


@pytest.mark.parametrize(("package", "others"), CLAIMS)
def test_what_the_page_says_about_imports_is_so(package: str, others: str) -> None:
    inside = [m for m in modules() if m == package or m.startswith(f"{package}.")]
    assert inside
    forbidden = re.findall(r"`([\w.]+)`", others)
    found = [
        (module, other)
        for module in inside
        for other in imports_of(module)
        if any(other == one or other.startswith(f"{one}.") for one in forbidden)
    ]
    assert found == []


def test_the_page_says_nothing_about_imports_that_is_not_looked_up() -> None:
    claims = section("Who imports whom")
    said = [line for line in PAGE.splitlines() if re.search(r"\bimports?\b", line)]
    assert [line for line in said if line not in claims.splitlines()] == ["## Who imports whom"]
    bullets = [line for line in claims.splitlines() if line.startswith("- ")]
    assert len(bullets) == len(CLAIMS) > 0


def test_every_word_of_the_glossary_is_defined_once() -> None:
    words = re.findall(r"^\| \*\*([^*]+)\*\* \|", section("Glossary"), re.MULTILINE)
    assert Counter(words) == Counter(word.strip() for word in WORDS.replace("\n", " ").split(","))


def test_retired_words_stay_retired() -> None:
    found = [
        (path.name, word, f"say {better}")
        for path in modules().values()
        for word, better in RETIRED.items()
        if re.search(rf"(?<![\w\"'.])_*{word}\b(?!\")", _identifiers(path))
    ]
    assert found == []


@cache
def _identifiers(path: Path) -> str:
    """The names that a file defines or uses, one a line."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            names.add(node.name)
        elif isinstance(node, ast.Name):
            names.add(node.id)
        elif isinstance(node, ast.Attribute):
            names.add(node.attr)
        elif isinstance(node, ast.arg):
            names.add(node.arg)
    return "\n".join(names)


def test_every_room_of_the_page_exists_and_every_room_is_on_it() -> None:
    told = set(re.findall(r"^  ([a-z_]+)(?:/|\.py)", section("Rooms"), re.MULTILINE))
    here = {
        path.stem if path.suffix == ".py" else path.name
        for path in (ROOT / "steer").iterdir()
        if (path.suffix == ".py" or (path / "__init__.py").exists()) and path.stem != "__init__"
    }
    assert told == here
