"""GGUF control vectors, as llama.cpp and repeng read and write them.

`direction.N` is added to the output of 0-based decoder block N; llama.cpp has no place for N = 0.
Some writers count differently: llama.cpp's own cvector-generator names the output of block i
direction.{i+1}, one late. Nothing in a file tells for certain, so where its marks leave a
doubt, the sender must say how it counts; what was used is kept in the card's provenance.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import torch
from gguf import GGUFReader, GGUFValueType, GGUFWriter
from torch import Tensor

from steer.artefacts.control_vector import ControlVector, LowRankAdapter
from steer.errors import FileFormatError, SteerError, Unsupported
from steer.formats.adapters.glp import is_glp, read_glp
from steer.formats.canonical import check_card, read_card
from steer.formats.claims import check_claims
from steer.formats.guards.gguf import check_gguf
from steer.formats.options import ImportOptions
from steer.formats.placement import NamedRow, placed

ARCHITECTURE = "controlvector"
_CARD = "steer.card"
_COUNT = f"{ARCHITECTURE}.layer_count"
# The format's own keys, and those that say what a file is of, not what is done with it.
_DESCRIBING = ("general.", "GGUF.")
_DIRECTION = re.compile(r"direction\.(0|[1-9]\d{0,5})")
# EasySteer's own keys; its directions are numbered from 0.
_ZERO_BASED = ("controlvector.method", "controlvector.normalize", "controlvector.token_pos")


def read_gguf(path: Path, options: ImportOptions) -> ControlVector | LowRankAdapter:
    """The control vector in a GGUF file, or the adapter that a projection of GLP is.

    Raises `FileFormatError` for a file that is no control vector, lies about itself or says what
    is not honoured, and for `direction.0` unless its writer is known to count from 0 or a
    `layer_offset` is given.
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
    tensors = {one.name: torch.from_numpy(one.data.copy()) for one in reader.tensors}
    if is_glp(fields):
        return read_glp(fields, tensors, path, options)
    rows = {_layer(name, row): row for name, row in tensors.items()}
    if isinstance(fields.get(_CARD), str):
        return _with_card(rows, fields[_CARD], options)
    tool = "easysteer" if any(key in fields for key in _ZERO_BASED) else None
    beside = {key: value for key, value in fields.items() if not key.startswith(_DESCRIBING)}
    site = check_claims({key: beside[key] for key in beside if key not in _ZERO_BASED}, options)
    if options.offset("gguf") is None and tool is None:
        _check_counting(rows, reader)
    named = {layer: NamedRow(f"direction.{layer}", row) for layer, row in rows.items()}
    return placed(named, path, "gguf", options, tool=tool, site=site, **_kept(fields))


def write_gguf(vector: ControlVector, path: Path) -> None:
    """Writes `vector` so that llama.cpp and repeng can use it.

    Raises `Unsupported` for block 0 and for sites other than resid_post, which they cannot steer.
    """
    if vector.card.site != "resid_post":
        raise Unsupported(
            f"GGUF control vectors act on resid_post; this one is for {vector.card.site}",
            code="unsupported_site",
        )
    chosen = tuple(vector.directions)
    if 0 in chosen:
        raise Unsupported(
            "GGUF control vectors cannot hold block 0 (llama.cpp numbers them from 1), and this "
            f"one has {'it alone' if len(chosen) == 1 else 'it'}: {_without_block_0(chosen)}",
            code="layer_not_exportable",
            param="/layers",
        )
    card = vector.card.model_dump(mode="json", by_alias=True, exclude={"name"})
    writer = GGUFWriter(path, ARCHITECTURE)
    try:
        writer.add_string(f"{ARCHITECTURE}.model_hint", vector.card.model or "")
        writer.add_int32(_COUNT, len(chosen))
        writer.add_string(_CARD, json.dumps(card, sort_keys=True))
        for layer in chosen:
            writer.add_tensor(f"direction.{layer}", vector[layer].numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


def _without_block_0(layers: tuple[int, ...]) -> str:
    """What to do with a vector on `layers`, 0 among them."""
    others = ",".join(map(str, layers[1:]))
    if not others:
        return "export it as safetensors"
    return (
        f"to leave it out, name the others (--layers {others}, or layers={others} over HTTP); "
        "safetensors holds all of them"
    )


def _layer(name: str, row: Tensor) -> int:
    match = _DIRECTION.fullmatch(name)
    if match is None:
        raise FileFormatError(
            f"the tensor {name!r} is not a direction: control vectors hold direction.N only",
            code="unknown_layout",
        )
    if row.ndim != 1:
        raise FileFormatError(
            f"the tensor {name!r} has the shape {list(row.shape)}; a direction is one row"
        )
    return int(match[1])


def _check_counting(rows: dict[int, Tensor], reader: GGUFReader) -> None:
    """Raises where the file bears a mark of writers that count layers in another way.

    repeng's mark is a uint32 `layer_count` that is the number of its directions.
    """
    count = reader.fields.get(_COUNT)
    if 0 in rows:
        why = "it holds direction.0, which llama.cpp and repeng never write"
    elif count is not None and list(count.types) == [GGUFValueType.INT32]:
        why = (
            "its layer_count is an int32, as llama.cpp's cvector-generator writes it, which names "
            "the output of block i direction.{i+1}"
        )
    elif count is not None and count.contents() != len(rows):
        why = (
            f"its layer_count is {count.contents()!r} and it has {len(rows)} directions, so it is "
            "not repeng's; a writer that counts the model's layers may name the output of block i "
            "direction.{i+1}, as llama.cpp's cvector-generator does"
        )
    else:
        return
    raise SteerError(
        f"the file's layers may be counted in another way: {why}. State 'from' "
        "(llama-cpp-generator, llama-cpp, repeng, easysteer), or 'layer_offset' (0 if direction.N "
        "is the output of 0-based block N, -1 if that of block N-1)",
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


def _with_card(rows: dict[int, Tensor], text: str, options: ImportOptions) -> ControlVector:
    options.refuse_placement("gguf", "the file's own card")
    try:
        about = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise FileFormatError(
            f"the file's card is not JSON: {error}", code="invalid_card"
        ) from None
    if not isinstance(about, dict):
        raise FileFormatError("the file's card is not a JSON object", code="invalid_card")
    card = read_card(about)
    vector = ControlVector.owning(rows)
    check_card(card, vector.card)
    return ControlVector(vector.directions, card.model_copy(update={"name": ""}))
