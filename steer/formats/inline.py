"""Vectors that travel inside a request: numbers, or base64 of a safetensors file."""

from __future__ import annotations

import base64
import binascii
import tempfile
from pathlib import Path

import torch

from steer.artefacts.control_vector import ControlVector
from steer.errors import FileFormatError, TooLarge
from steer.formats.canonical import is_canonical, read_canonical
from steer.formats.guards.safetensors import SafetensorsFile
from steer.formats.options import ImportOptions
from steer.formats.sniff import sniff
from steer.formats.vectors.safetensors import read_vector
from steer.spec import InlineVector

MAX_INLINE_BYTES = 16 << 20
_NAME = "inline"
"""What messages call a vector that has no name."""


def decode_inline(inline: InlineVector, *, max_bytes: int = MAX_INLINE_BYTES) -> ControlVector:
    """The vector in `inline`; a file has up to `max_bytes`.

    A single row lies on `inline.layer`; a file with several layers gives that one alone, or all of
    them without it. Raises `FileFormatError` or `TooLarge`.
    """
    if inline.values is not None:
        assert inline.layer is not None, "the spec was checked"
        return ControlVector.of({inline.layer: torch.tensor(inline.values)}, name=_NAME)
    assert inline.data is not None, "the spec was checked"
    if len(inline.data) > 4 * (max_bytes // 3 + 1):
        raise TooLarge(
            f"an inline vector holds at most {max_bytes} bytes: upload it and use its name",
            code="inline_too_large",
        )
    try:
        data = base64.b64decode(inline.data, validate=True)
    except (binascii.Error, ValueError) as error:
        raise FileFormatError(
            f"the inline vector is not base64: {error}", code="invalid_base64"
        ) from None
    with tempfile.TemporaryDirectory(prefix="steer-inline-") as folder:
        path = Path(folder) / "vector.safetensors"
        path.write_bytes(data)
        return _read(path, inline.layer)


def _read(path: Path, layer: int | None) -> ControlVector:
    found = sniff(path)
    if found != "safetensors":
        raise FileFormatError(
            f"an inline vector is a safetensors file; this one is {found}: upload it instead"
        )
    file = SafetensorsFile.open(path)
    if is_canonical(file):
        artefact = read_canonical(file)
        if not isinstance(artefact, ControlVector):
            raise FileFormatError(
                f"only vectors can be sent inline, not a {artefact.card.kind}: upload it and use "
                "its name",
                code="wrong_kind",
            )
        vector = artefact
    else:
        layers = None if layer is None else (layer,)
        vector = read_vector(file, ImportOptions(layers=layers)).renamed(_NAME)
    if layer is None:
        return vector
    return ControlVector.of(
        {layer: vector[layer]},
        site=vector.card.site,
        model=vector.card.model,
        default_strength=vector.card.default_strength,
    )
