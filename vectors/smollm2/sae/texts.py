"""What SmolLM2's SAE is trained on: prose of Debian's packages, and chats of the model's own.

Packages are fetched with `apt-get download` and unpacked into the cache; nothing is installed and
nothing of them ships. What is taken from each is a sample of its passages, so that none outweighs
the others.
"""

from __future__ import annotations

import gzip
import html.parser
import random
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from xml.etree import ElementTree

from tqdm import tqdm

PASSAGE = 560
"""Characters of a passage, about 128 tokens."""
_SKIPPED = {"script", "style", "nav", "head", "pre", "code"}
_BLOCKS = {"p", "div", "li", "td", "th", "h1", "h2", "h3", "h4", "dd", "dt", "br", "tr"}
_HANDBOOK = "usr/share/doc/debian-handbook/html/en-US"
_ASKED = (
    "What is {a}?",
    "Tell me about {a}.",
    "Explain {a} to a child.",
    "Write a short story about {a}.",
    "Write a poem about {a}.",
    "Why would someone care about {a}?",
    "Give me three facts about {a}.",
    "Write an email to a friend about {a}.",
    "How can I learn more about {a}?",
    "Write a Python function that has to do with {a}.",
)


class _Text(html.parser.HTMLParser):
    """The text of a page, a line for each block."""

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []
        self._hidden = 0

    def handle_starttag(self, tag: str, attrs: object) -> None:
        del attrs
        self._hidden += tag in _SKIPPED
        if tag in _BLOCKS:
            self.parts.append("\n")

    def handle_endtag(self, tag: str) -> None:
        self._hidden -= tag in _SKIPPED
        if tag in _BLOCKS:
            self.parts.append("\n")

    def handle_data(self, data: str) -> None:
        if self._hidden <= 0:
            self.parts.append(data)


def _page(path: Path) -> str:
    reader = _Text()
    reader.feed(path.read_text("utf-8", "replace"))
    lines = (" ".join(line.split()) for line in "".join(reader.parts).split("\n"))
    # Menus and captions are short lines; prose is long ones.
    return "\n\n".join(line for line in lines if len(line) > 80)


def _html(folder: Path, pattern: str) -> Iterator[str]:
    for path in sorted(folder.rglob(pattern)):
        yield _page(path)


def _mallard(folder: Path) -> Iterator[str]:
    for path in sorted((folder / "usr/share/help/C").rglob("*.page")):
        root = ElementTree.parse(path).getroot()
        paragraphs = (" ".join("".join(p.itertext()).split()) for p in root.iter() if _is_p(p))
        yield "\n\n".join(one for one in paragraphs if one)


def _is_p(element: ElementTree.Element) -> bool:
    return str(element.tag).rpartition("}")[2] in ("p", "title")


def _gzipped(folder: Path, pattern: str) -> Iterator[str]:
    for path in sorted(folder.rglob(pattern)):
        yield gzip.decompress(path.read_bytes()).decode("utf-8", "replace")


def _fortunes(folder: Path) -> Iterator[str]:
    for path in sorted((folder / "usr/share/games/fortunes").iterdir()):
        if path.is_file() and path.suffix not in (".dat", ".u8"):
            yield path.read_text("utf-8", "replace").replace("\n%\n", "\n\n")


SOURCES: dict[str, Callable[[Path], Iterator[str]]] = {
    "anarchism": lambda folder: _html(folder, "sec*.html"),
    "debian-handbook": lambda folder: _html(
        folder / "usr/share/doc/debian-handbook/html/en-US", "*.html"
    ),
    "dict-foldoc": lambda folder: _gzipped(folder, "foldoc.dict.dz"),
    "dict-gcide": lambda folder: _gzipped(folder, "gcide.dict.dz"),
    "dict-wn": lambda folder: _gzipped(folder, "wn.dict.dz"),
    "fortunes": _fortunes,
    "fortunes-min": _fortunes,
    "gnome-user-docs": _mallard,
    "jargon-text": lambda folder: _gzipped(folder, "jargon.txt.gz"),
}


def unpacked(package: str, cache: Path) -> tuple[Path, str]:
    """The folder with a package's files, and its file's name, which tells its version."""
    cache.mkdir(parents=True, exist_ok=True)
    found = sorted(cache.glob(f"{package}_*.deb"))
    if not found:
        subprocess.run(["apt-get", "download", package], cwd=cache, check=True, capture_output=True)
        found = sorted(cache.glob(f"{package}_*.deb"))
    folder = cache / package
    if not folder.is_dir():
        subprocess.run(["dpkg-deb", "-x", found[0], folder], check=True)
    return folder, found[0].name


def passages(package: str, folder: Path) -> list[str]:
    """The package's text, cut at lines into passages of about `PASSAGE` characters."""
    found: list[str] = []
    for text in SOURCES[package](folder):
        held = ""
        for line in re.split(r"(?<=\n)", text):
            held += line
            if len(held) >= PASSAGE:
                found.append(held.strip())
                held = ""
    return [one for one in found if len(one) >= PASSAGE // 2]


def prose(cache: Path, of_each: int, seed: int) -> tuple[list[str], list[str]]:
    """At most `of_each` passages of every package, mixed; and the files that they are from."""
    every: list[str] = []
    files = []
    for package in tqdm(SOURCES, desc="texts", unit="package"):
        folder, name = unpacked(package, cache)
        own = passages(package, folder)
        every += random.Random(f"{seed}-{package}").sample(own, min(of_each, len(own)))
        files.append(name)
    random.Random(seed).shuffle(every)
    return every, files


def questions(cache: Path, count: int, seed: int) -> list[str]:
    """Things to ask: of each of `count` nouns of WordNet one question."""
    folder, _ = unpacked("dict-wn", cache)
    [text] = _gzipped(folder, "wn.dict.dz")
    nouns = re.findall(r"^([a-z]{4,12})\n    n ", text, re.M)
    chosen = random.Random(f"{seed}-asked").sample(sorted(set(nouns)), count)
    return [_ASKED[n % len(_ASKED)].format(a=noun) for n, noun in enumerate(chosen)]
