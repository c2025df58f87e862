"""docs/extending.md is carried out: its files are written into a copy of the project, and run."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "extending.md").read_text()
MOST_FILES = 2
MOST_LINES = 32
EXTENSIONS = (
    "A kind of intervention",
    "An SAE architecture",
    "A file format",
    "A method of fitting",
    "An inspection",
    "A kind of job",
    "An engine",
)

_FENCE = re.compile(r"^```(\w+)(?: ([\w./]+))?\n(.*?)^```$", re.DOTALL | re.MULTILINE)


@dataclass(frozen=True)
class Part:
    """One fenced block: a file to write (`python PATH`), a change of one (`diff PATH`), a program
    to run (`python`), or what it prints (`text`)."""

    language: str
    path: str | None
    text: str

    def apply(self, tree: Path) -> None:
        """Writes the file, or changes it; fails where the page and the code have come apart."""
        assert self.path is not None
        target = tree / self.path
        if self.language == "python":
            assert not target.exists(), f"{self.path} is there already"
            target.write_text(self.text)
            return
        old = "".join(line[1:] for line in self._lines() if line[0] in " -")
        new = "".join(line[1:] for line in self._lines() if line[0] in " +")
        found = target.read_text()
        assert found.count(old) == 1, f"{self.path} has {found.count(old)} places like\n{old}"
        target.write_text(found.replace(old, new))

    def _lines(self) -> list[str]:
        return [line if line.strip() else " \n" for line in self.text.splitlines(keepends=True)]

    @property
    def written(self) -> int:
        """Lines of code that a reader has to write."""
        lines = [line for line in self.text.splitlines() if line.strip()]
        return (
            sum(line.startswith("+") for line in lines) if self.language == "diff" else len(lines)
        )


def sections() -> Iterator[tuple[str, list[Part]]]:
    for title, text in re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL):
        yield (
            title,
            [Part(language, path or None, code) for language, path, code in _FENCE.findall(text)],
        )


def test_the_page_has_every_extension_and_none_needs_more_than_two_files() -> None:
    assert tuple(title for title, _ in sections()) == EXTENSIONS
    for title, parts in sections():
        changes = [part for part in parts if part.path is not None]
        files = {part.path for part in changes}
        assert 1 <= len(files) <= MOST_FILES, title
        assert sum(part.written for part in changes) <= MOST_LINES, title
        assert [part.language for part in parts if part.path is None] == ["python", "text"], title


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the library with everything on the page in it."""
    copy = tmp_path_factory.mktemp("extended")
    skipped = shutil.ignore_patterns("__pycache__", "*.egg-info")
    shutil.copytree(ROOT / "steer", copy / "steer", ignore=skipped)
    shutil.copytree(ROOT / "server", copy / "server", ignore=skipped)
    (copy / "steer_vectors").symlink_to(ROOT / "vectors")
    for _, parts in sections():
        for part in parts:
            if part.path is not None:
                part.apply(copy)
    return copy


@pytest.mark.slow
@pytest.mark.parametrize("title", EXTENSIONS)
def test_what_is_added_works(title: str, tree: Path, tmp_path: Path) -> None:
    parts = dict(sections())[title]
    program, printed = (part.text for part in parts if part.path is None)
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tree), str(tree / "server")])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == printed
