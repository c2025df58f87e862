"""Files that stand where another should be: Git LFS pointers, web pages, nothing at all."""

from __future__ import annotations

from pathlib import Path

from steer.errors import FileFormatError

START_BYTES = 512
_POINTER = b"version https://git-lfs"
_ANNEX = (b"/annex/objects/", b".git/annex/objects/")
_OF_MODELS = (".safetensors", ".bin", ".gguf", ".json", ".model", ".jinja")
_PAGES = (b"<!doctype html", b"<html", b"<?xml", b"<head")


def check_present(path: Path) -> None:
    """Raises `FileFormatError` for a file that is another's pointer, or a web page.

    Its name is in the message, since it may be one of several.
    """
    with path.open("rb") as stream:
        check_start(stream.read(START_BYTES), path.name)


def check_model_folder(model: str | Path) -> None:
    """Raises `FileFormatError` where a folder's weights, or what says how to use them, are only
    pointers or pages; what is no folder is let be."""
    for path in sorted(Path(model).iterdir()) if Path(model).is_dir() else ():
        if path.suffix in _OF_MODELS and path.is_file():
            check_present(path)


def check_start(start: bytes, name: str = "") -> None:
    """`check_present` of a file called `name` that begins with `start`."""
    which = f"the file {name!r}" if name else "the file"
    if start.startswith(_POINTER) or start.startswith(_ANNEX):
        raise FileFormatError(
            f"{which} is a Git LFS pointer: a few lines that stand for the real file, which was "
            "never fetched. Run `git lfs pull` in the repository it is from, or download the file "
            "itself, and send that",
            code="lfs_pointer",
        )
    text = start.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if text.startswith(_PAGES):
        raise FileFormatError(
            f"{which} is a web page, not what was to be downloaded: a page of an error, or one "
            "that asks to log in, or the page about a file and not the file. Open it in a browser "
            "to see which, and use the link to the file itself (on the hub its path has /resolve/, "
            "not /blob/)",
            code="web_page",
        )
