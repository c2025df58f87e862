"""The formats of single files that others write: how each is told from its first bytes, and read.

A new format is a file under `vectors/`, `adapters/` or `lenses/` and its line here. Folders of
several files are told in `folders.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from steer.artefacts.artefact import Artefact
from steer.formats.guards.npy import NPY
from steer.formats.guards.torch import load_tensors
from steer.formats.guards.zip import member_names
from steer.formats.lenses.jacobian_lens import is_jacobian_lens, lens_of_held
from steer.formats.options import ImportOptions
from steer.formats.vectors.gguf import read_gguf
from steer.formats.vectors.npz import read_npy, read_npz
from steer.formats.vectors.pt import vector_of_held
from steer.formats.vectors.svec import read_svec

_ZIP = (b"PK\x03\x04", b"PK\x05\x06")
_SPACE = b" \t\r\n"


@dataclass(frozen=True)
class FileFormat:
    """`is_one` is shown a file and its first 512 bytes; it never believes the file's name. `title`
    is what messages call the format. `read` may raise any `SteerError`."""

    name: str
    title: str
    is_one: Callable[[Path, bytes], bool]
    read: Callable[[Path, ImportOptions], Artefact]


def is_zip(start: bytes) -> bool:
    """Whether a file that begins so is a zip file, of whatever."""
    return start.startswith(_ZIP)


def _is_npz(path: Path, start: bytes) -> bool:
    names = member_names(path) if is_zip(start) else []
    return bool(names) and all(name.endswith(".npy") for name in names)


def _is_torch(path: Path, start: bytes) -> bool:
    # By the names of all members, because the first may be anything.
    names = member_names(path) if is_zip(start) else []
    return any(name.count("/") == 1 and name.endswith("/data.pkl") for name in names)


def _read_torch(path: Path, options: ImportOptions) -> Artefact:
    held = load_tensors(path)
    read = lens_of_held if is_jacobian_lens(held) else vector_of_held
    return read(held, path, options)


def _is_svec(_path: Path, start: bytes) -> bool:
    # The length that a safetensors file begins with is far from being eight letters.
    text = all(byte in _SPACE or byte >= 0x20 for byte in start[:8])
    plain = start.removeprefix(b"\xef\xbb\xbf").lstrip(_SPACE)
    return plain.startswith((b"{", b"[")) and text


FORMATS: tuple[FileFormat, ...] = (
    FileFormat("gguf", "GGUF", lambda _, start: start.startswith(b"GGUF"), read_gguf),
    FileFormat("torch", ".pt with tensors alone", _is_torch, _read_torch),
    FileFormat("npz", ".npz", _is_npz, read_npz),
    FileFormat("npy", ".npy", lambda _, start: start.startswith(NPY), read_npy),
    FileFormat("svec", ".svec and other JSON", _is_svec, read_svec),
)
