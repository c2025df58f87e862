"""Reading safetensors that may lie: the header is checked before any tensor is."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from steer.errors import FileFormatError

MAX_HEADER_BYTES = 16 << 20
MAX_TENSORS = 16_384
FLOATS = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True)
class TensorInfo:
    """What a header says of one tensor."""

    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class SafetensorsFile:
    """A safetensors file whose header is sound and matches its length."""

    path: Path
    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]

    @staticmethod
    def open(path: Path) -> SafetensorsFile:
        """Reads the header only. Raises `FileFormatError`."""
        text = _header_text(path)
        try:
            with safe_open(path, framework="pt"):
                pass  # checks types, offsets, and that they cover the file exactly
            header = json.loads(text, object_pairs_hook=_without_duplicates)
        except (SafetensorError, OSError, ValueError, RecursionError) as error:
            raise FileFormatError(f"the safetensors header is not valid: {error}") from error
        metadata = header.pop("__metadata__", None) or {}
        if len(header) > MAX_TENSORS:
            raise FileFormatError(
                f"the file holds {len(header)} tensors; at most {MAX_TENSORS} are read"
            )
        tensors = {
            key: TensorInfo(item["dtype"], tuple(item["shape"])) for key, item in header.items()
        }
        return SafetensorsFile(path, tensors, metadata)

    def load(self, keys: Iterable[str], *, keep_type: bool = False) -> dict[str, Tensor]:
        """The tensors named `keys` as float32, or in their own type; it must be a float type."""
        wanted = list(keys)
        for key in wanted:
            if self.tensors[key].dtype not in FLOATS:
                raise FileFormatError(
                    f"the tensor {key!r} is of type {self.tensors[key].dtype}; a float type is "
                    f"needed, one of {', '.join(FLOATS)}: save it as one (tensor.float())"
                )
        with safe_open(self.path, framework="pt") as file:
            # Copied, because a loaded tensor may go on reading the file.
            kept = None if keep_type else torch.float32
            return {key: file.get_tensor(key).to(kept, copy=True) for key in wanted}


def _header_text(path: Path) -> bytes:
    size = path.stat().st_size
    with path.open("rb") as stream:
        start = stream.read(8)
        if len(start) < 8:
            raise FileFormatError(f"the file ends after {size} bytes, inside its first length")
        declared = int.from_bytes(start, "little")
        if declared > size - 8:
            raise FileFormatError(
                f"the file declares a header of {declared} bytes but has only {size}: it is "
                "truncated, or no safetensors file",
                code="truncated_file",
            )
        if declared > MAX_HEADER_BYTES:
            raise FileFormatError(
                f"the file declares a header of {declared} bytes; at most {MAX_HEADER_BYTES} are "
                "read",
                code="header_too_large",
            )
        return stream.read(declared)


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"it names {twice!r} twice")
    return found
