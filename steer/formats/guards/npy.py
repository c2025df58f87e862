"""The headers of NumPy's arrays in files, checked before anything is made of what they declare."""

from __future__ import annotations

from typing import IO

import numpy as np
import torch
from numpy.lib import format as npy

from steer.errors import FileFormatError

NPY = b"\x93NUMPY"
FLOATS = {2: torch.float16, 4: torch.float32, 8: torch.float64}
"""Types by the bytes of a number."""


def read_header(name: str, stream: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, whether by columns, and type that an array's header tells; what it holds is next."""
    major, _ = npy.read_magic(stream)
    if major not in (1, 2):
        raise FileFormatError(f"the array {name[:80]!r} is of version {major}, which is not read")
    read = npy.read_array_header_1_0 if major == 1 else npy.read_array_header_2_0
    shape, fortran, dtype = read(stream)
    return shape, fortran, dtype


def check_header(
    name: str, size: int, stream: IO[bytes]
) -> tuple[tuple[int, ...], bool, np.dtype, int]:
    """`read_header`, and the place of the numbers, of an array that is `size` bytes long with its
    header. Raises `FileFormatError` unless it holds as many floats as it says."""
    shape, fortran, dtype = read_header(name, stream)
    start = stream.tell()
    if dtype.kind != "f" or dtype.itemsize not in FLOATS:
        raise FileFormatError(
            f"the array {name[:80]!r} is of type {dtype.str}; a float type is needed (objects are "
            "pickles, which are never read here; `steer vectors convert` reads those of an .npy "
            "file on your own machine)",
            code="pickle_refused" if dtype.hasobject else "invalid_file",
        )
    held, declared = size - start, dtype.itemsize
    for length in shape:
        declared *= length
    if declared != held or len(shape) > 4:
        raise FileFormatError(
            f"the array {name[:80]!r} declares {declared} bytes, the file holds {held}",
            code="truncated_file",
        )
    return shape, fortran, dtype, start
