"""NumPy's `.npz`: a row per layer, one matrix [L, d], or one row [d]; `.npy`: one of these two.

Headers are checked against sizes before NumPy reads an array, because it makes one of whatever
shape a header declares. Nothing pickled is read.
"""

from __future__ import annotations

import tokenize
import zipfile
import zlib
from pathlib import Path
from typing import IO

import numpy as np
import torch
from numpy.lib import format as npy

from steer.artefacts.control_vector import ControlVector
from steer.artefacts.sae.storage.file_arrays import FileArray, OpenedFile
from steer.errors import FileFormatError, TooLarge
from steer.formats.arrays import vector_of_arrays
from steer.formats.guards.npy import FLOATS, check_header
from steer.formats.guards.zip import MAX_MEMBERS, UNREADABLE, check_directory, data_offset
from steer.formats.options import ImportOptions

# Floats barely compress: a file that inflates to much more is no honest one.
_MOST_INFLATED = 4
_ALWAYS_READ = 8 << 20


def read_npz(path: Path, options: ImportOptions) -> ControlVector:
    """The vector in an `.npz` file. Raises `FileFormatError`, `TooLarge` or `SteerError`."""
    arrays = {name: torch.from_numpy(array) for name, array in _arrays(path).items()}
    return vector_of_arrays(arrays, lambda: arrays, path, "npz", options, about={})


def read_npy(path: Path, options: ImportOptions) -> ControlVector:
    """The vector in an `.npy` file. Raises `FileFormatError` or `SteerError`."""
    try:
        with path.open("rb") as stream:
            check_header("array", path.stat().st_size, stream)
            stream.seek(0)
            with np.errstate(over="ignore"):
                array = npy.read_array(stream, allow_pickle=False).astype(np.float32, order="C")
    except (*UNREADABLE, OSError, SyntaxError, tokenize.TokenError) as error:
        raise FileFormatError(f"the .npy file cannot be read: {str(error)[:300]}") from error
    held = {"array": torch.from_numpy(array)}
    return vector_of_arrays(held, lambda: held, path, "npy", options, about={})


def arrays_in_place(path: Path) -> dict[str, FileArray | torch.Tensor]:
    """The file's arrays, left in it where they are stored as they are; deflated ones are inflated,
    to float32. Raises `FileFormatError` or `TooLarge`."""
    check_directory(path)
    try:
        with zipfile.ZipFile(path) as file:
            members = file.infolist()
            _check_sizes(members, path.stat().st_size)
            if any(member.compress_type != zipfile.ZIP_STORED for member in members):
                return {name: torch.from_numpy(array) for name, array in _arrays(path).items()}
            source, found = OpenedFile.at(path), {}
            for member in members:
                with file.open(member) as stream:
                    shape, fortran, dtype, start = _check_member(member, stream)
                if dtype.byteorder == ">":
                    raise FileFormatError("the file is big-endian, which is not read")
                array = FileArray.plain(
                    source,
                    FLOATS[dtype.itemsize],
                    data_offset(source, member) + start,
                    shape[::-1] if fortran else shape,
                )
                name = member.filename.removesuffix(".npy")
                found[name] = array.turned if fortran else array
            return dict(found)
    except (*UNREADABLE, zlib.error, OSError, SyntaxError, tokenize.TokenError) as error:
        raise FileFormatError(f"the .npz file cannot be read: {str(error)[:300]}") from error


def _arrays(path: Path) -> dict[str, np.ndarray]:
    """The file's arrays as float32."""
    check_directory(path)
    try:
        with zipfile.ZipFile(path) as file:
            members = file.infolist()
            _check_sizes(members, path.stat().st_size)
            for member in members:
                with file.open(member) as stream:
                    _check_member(member, stream)
        # What is too large for float32 becomes infinite, which is refused as such later.
        with np.load(path, allow_pickle=False) as found, np.errstate(over="ignore"):
            return {name: found[name].astype(np.float32, order="C") for name in found.files}
    except (*UNREADABLE, zlib.error, OSError, SyntaxError, tokenize.TokenError) as error:
        raise FileFormatError(f"the .npz file cannot be read: {str(error)[:300]}") from error


def _check_sizes(members: list[zipfile.ZipInfo], size: int) -> None:
    total = sum(member.file_size for member in members)
    if len(members) > MAX_MEMBERS or len({one.filename for one in members}) != len(members):
        raise FileFormatError(f"the file has more than {MAX_MEMBERS} arrays, or two of one name")
    if total > max(_MOST_INFLATED * size, _ALWAYS_READ):
        raise TooLarge(
            f"the file of {size} bytes inflates to {total}: save it with numpy.savez",
            code="archive_too_large",
        )


def _check_member(
    member: zipfile.ZipInfo, stream: IO[bytes]
) -> tuple[tuple[int, ...], bool, np.dtype, int]:
    name = member.filename
    if not name.endswith(".npy") or member.flag_bits & 1:
        raise FileFormatError(f"the member {name[:80]!r} is no plain array", code="unknown_layout")
    return check_header(name, member.file_size, stream)
