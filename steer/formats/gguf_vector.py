"""GGUF control vectors, as llama.cpp and repeng read and write them.

`direction.N` is added to the output of 0-based decoder block N; llama.cpp has no place for N = 0.
Some writers count differently, which nothing in the file tells, so that an import may state a
`layer_offset`; it is kept in the card's provenance.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from gguf import GGUFReader, GGUFWriter
from torch import Tensor

from steer.control_vector import Card, ControlVector
from steer.errors import FileFormatError, SteerError, Unsupported
from steer.formats.canonical import check_card, read_card
from steer.formats.gguf_guard import check_gguf
from steer.formats.options import ImportOptions
from steer.formats.placement import shift

ARCHITECTURE = "controlvector"
_CARD = "steer.card"
_DIRECTION = re.compile(r"direction\.(0|[1-9]\d{0,5})")
# EasySteer's own keys; its directions are numbered from 0.
_ZERO_BASED = ("controlvector.method", "controlvector.normalize", "controlvector.token_pos")


def read_gguf(path: Path, options: ImportOptions) -> ControlVector:
    """The control vector in a GGUF file.

    Raises `FileFormatError` for a file that is no control vector or lies about itself, and for
    `direction.0` unless its writer is known to count from 0 or a `layer_offset` is given.
    """
    check_gguf(path)
    try:
        reader = GGUFReader(path)
        fields = {key: field.contents() for key, field in reader.fields.items()}
    except (KeyError, ValueError, IndexError) as error:
        raise FileFormatError(f"the GGUF file cannot be parsed: {error}") from error
    architecture = fields.get("general.architecture")
    if architecture != ARCHITECTURE:
        raise FileFormatError(
            f"the GGUF file's architecture is {architecture!r}, not {ARCHITECTURE!r}: it is not a "
            "control vector",
            code="not_a_control_vector",
        )
    rows = {
        _layer(tensor.name, tensor.shape.tolist()): torch.from_numpy(tensor.data.copy())
        for tensor in reader.tensors
    }
    if isinstance(fields.get(_CARD), str) and not options.layer_offset:
        return _with_card(rows, fields[_CARD])
    _check_first_layer(rows, fields, options)
    offset = options.layer_offset or 0
    provenance = {"format": "gguf", "layer_offset": offset, **_kept(fields)}
    return ControlVector.of(shift(rows, offset), provenance=provenance)


def write_gguf(vector: ControlVector, path: Path, *, layers: Iterable[int] | None = None) -> None:
    """Writes `vector`, or only its `layers`, so that llama.cpp and repeng can use it.

    Raises `Unsupported` for block 0 and for sites other than resid_post, which they cannot steer.
    """
    if vector.card.site != "resid_post":
        raise Unsupported(
            f"GGUF control vectors act on resid_post; this one is for {vector.card.site}",
            code="unsupported_site",
        )
    chosen = tuple(vector.directions) if layers is None else tuple(sorted(set(layers)))
    if 0 in chosen:
        raise Unsupported(
            "GGUF control vectors cannot hold block 0 (llama.cpp numbers them from 1): choose "
            "other layers",
            code="layer_not_exportable",
        )
    card = _card_for(vector.card, chosen)
    writer = GGUFWriter(path, ARCHITECTURE)
    try:
        writer.add_string(f"{ARCHITECTURE}.model_hint", vector.card.model or "")
        writer.add_uint32(f"{ARCHITECTURE}.layer_count", len(chosen))
        writer.add_string(_CARD, json.dumps(card, sort_keys=True))
        for layer in chosen:
            writer.add_tensor(f"direction.{layer}", vector[layer].numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


def _layer(name: str, shape: list[int]) -> int:
    match = _DIRECTION.fullmatch(name)
    if match is None:
        raise FileFormatError(
            f"the tensor {name!r} is not a direction: control vectors hold direction.N only",
            code="unknown_layout",
        )
    if len(shape) != 1:
        raise FileFormatError(f"the tensor {name!r} has the shape {shape}; a direction is one row")
    return int(match[1])


def _check_first_layer(
    rows: dict[int, Tensor], fields: dict[str, Any], options: ImportOptions
) -> None:
    known = any(key in fields for key in _ZERO_BASED)
    if 0 in rows and options.layer_offset is None and not known:
        raise SteerError(
            "the file holds direction.0, which llama.cpp and repeng never write, so its layers "
            "may be counted in another way: state 'layer_offset' (0 if direction.N is the output "
            "of 0-based block N)",
            code="layer_offset_required",
            param="/layer_offset",
        )


def _kept(fields: dict[str, Any]) -> dict[str, Any]:
    """What the file says of its origin."""
    prefix = ARCHITECTURE + "."
    return {
        key.removeprefix(prefix): value
        for key, value in fields.items()
        if key.startswith(prefix) and _is_short(value)
    }


def _is_short(value: Any) -> bool:
    if isinstance(value, float):
        return math.isfinite(value)
    return isinstance(value, int) or (isinstance(value, str) and len(value) <= 1024)


def _with_card(rows: dict[int, Tensor], text: str) -> ControlVector:
    try:
        about = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise FileFormatError(
            f"the file's card is not JSON: {error}", code="invalid_card"
        ) from None
    if not isinstance(about, dict):
        raise FileFormatError("the file's card is not a JSON object", code="invalid_card")
    card = read_card(about)
    vector = ControlVector.of(rows)
    check_card(card, vector.card)
    return ControlVector(vector.directions, card.model_copy(update={"name": ""}))


def _card_for(card: Card, layers: tuple[int, ...]) -> dict[str, Any]:
    defaults = tuple(layer for layer in card.default_layers or () if layer in layers)
    kept = card.model_copy(
        update={
            "layers": layers,
            "default_layers": defaults or None,
            "measures": {n: card.measures[n] for n in layers if n in card.measures},
        }
    )
    about: dict[str, Any] = kept.model_dump(mode="json", by_alias=True, exclude={"name"})
    return about
