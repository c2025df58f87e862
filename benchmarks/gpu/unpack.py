"""Joins what `benchmarks.gpu.pack` cut into pieces, on the host that it was brought to:

    python unpack.py PIECES [TARGET]

PIECES is the folder with the pieces and their manifest; TARGET (default: here) gets the files, and
below it, in the folder that the manifest names, the wheels. Needs Python's standard library alone.
May be run again: what is unpacked already, by its checksum, is left as it is.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

MANIFEST = "manifest.json"
BLOCK = 1 << 20


class Broken(Exception):
    """Pieces are missing or are not what was packed; the message names them."""


def unpack(pieces: Path, target: Path) -> dict[str, object]:
    """The manifest of what lies unpacked below `target` now. Raises `Broken`."""
    manifest = json.loads((pieces / MANIFEST).read_text())
    check(pieces, manifest)
    mark = target / ".unpacked" / manifest["sha256"]
    if mark.exists():
        return dict(manifest)
    target.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=target) as joined:
        for piece in manifest["pieces"]:
            with (pieces / piece["name"]).open("rb") as source:
                shutil.copyfileobj(source, joined, BLOCK)
        joined.seek(0)
        with tarfile.open(fileobj=joined) as archive:
            archive.extractall(target, filter="data")
    site = target / manifest["site"]
    for wheel in sorted((target / manifest["wheels"]).glob("*.whl")):
        install(wheel, site)
        wheel.unlink()  # the room is needed
    mark.parent.mkdir(exist_ok=True)
    mark.touch()
    return dict(manifest)


def check(pieces: Path, manifest: dict[str, object]) -> None:
    """Raises `Broken` where a piece is missing, cut short or changed."""
    wrong = []
    for piece in manifest["pieces"]:  # type: ignore[attr-defined]
        path = pieces / piece["name"]
        if not path.exists():
            wrong.append(f"{piece['name']} is missing")
        elif sha256(path) != piece["sha256"]:
            wrong.append(f"{piece['name']} is not what was packed: bring it again")
    if wrong:
        raise Broken(f"{pieces}: {'; '.join(wrong)}")


def install(wheel: Path, site: Path) -> None:
    """A wheel's content, as an installer puts it on the path; scripts are left out."""
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            top, _, inside = name.partition("/")
            kept = name
            if top.endswith(".data"):
                scheme, _, kept = inside.partition("/")
                if scheme not in ("purelib", "platlib") or not kept:
                    continue
            if kept.endswith("/"):
                continue
            place = site / kept
            if not place.resolve().is_relative_to(site.resolve()):
                raise Broken(f"{wheel.name} holds {name!r}, which lies outside of its folder")
            place.parent.mkdir(parents=True, exist_ok=True)
            with archive.open(name) as source, place.open("wb") as written:
                shutil.copyfileobj(source, written, BLOCK)


def sha256(path: Path) -> str:
    found = hashlib.sha256()
    with path.open("rb") as source:
        while block := source.read(BLOCK):
            found.update(block)
    return found.hexdigest()


def main() -> None:
    if not 2 <= len(sys.argv) <= 3:
        sys.exit(__doc__)
    target = Path(sys.argv[2] if len(sys.argv) == 3 else ".")
    try:
        manifest = unpack(Path(sys.argv[1]), target)
    except Broken as error:
        sys.exit(str(error))
    print(f"unpacked {manifest['what']} into {target.resolve()}; now:\n  {manifest['run']}")


if __name__ == "__main__":
    main()
