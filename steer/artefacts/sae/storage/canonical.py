"""The one file form of an SAE: safetensors, whose single metadata key holds everything else.

    encoder [d_sae, d_in], decoder [d_sae, d_out]   a row for each feature, of the type they came in
    encoder_scale, decoder_scale [d_sae]            what rows are multiplied with, where by anything
    b_enc, threshold [d_sae], b_dec [d_out], W_skip [d_out, d_in]            float32

Rows of a feature lie together, so that a clamp of a few features reads a few rows; a scale beside
them keeps a bfloat16 matrix as it came. Matching pursuit has one matrix, the decoder. Files of
layout 1 (all float32, the encoder `W_enc` `[d_in, d_sae]`) are read, and written as they were.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors.torch import save as save_safetensors
from torch import Tensor

from steer.artefacts.control_vector import Card
from steer.artefacts.sae.labels import FeatureLabel
from steer.artefacts.sae.pursuit import Pursuit
from steer.artefacts.sae.storage.file_arrays import (
    DTYPES,
    ByteSource,
    FileArray,
    safetensors_arrays,
)
from steer.artefacts.sae.storage.rows import FeatureRows
from steer.errors import FileFormatError

LAYOUT = 2
HELD_BYTES = 32 << 20
"""SAEs whose file is no larger are held in memory: the demo model's, and those of tests."""

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_VECTORS = ("b_enc", "b_dec", "threshold", "W_skip")


class Config(BaseModel):
    """Everything about an SAE that is not a tensor."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    architecture: str
    k: int | None = None
    subtract_b_dec: bool
    normalize: str
    card: Card
    labels: dict[int, FeatureLabel] = {}
    pursuit: Pursuit | None = Field(default=None, exclude_if=lambda value: value is None)
    # Not in files of layout 1, which keep their hash.
    layout: int = Field(default=1, ge=1, le=LAYOUT, exclude_if=lambda value: value == 1)


@dataclass(frozen=True)
class StoredParts:
    """The tensors of an SAE; `vectors` are those that are not a row for each feature."""

    encoder: FeatureRows
    decoder: FeatureRows
    vectors: Mapping[str, Tensor]


def pieces(parts: StoredParts, config: Config) -> Iterator[bytes]:
    """The canonical file piece by piece: the same SAE gives the same bytes.

    No piece is much larger than a block of rows (`steer.artefacts.sae.storage.rows`).
    """
    # One metadata key: the hash must not depend on the order of several.
    fields = config.model_dump(mode="json", by_alias=True, exclude={"card": {"name"}})
    text = json.dumps(fields, sort_keys=True)
    if config.layout == 1:
        held = {"W_enc": parts.encoder.take(None).T.contiguous(), "W_dec": parts.decoder.take(None)}
        yield bytes(save_safetensors({**held, **parts.vectors}, metadata={"steer": text}))
        return
    matrices = {"decoder": parts.decoder}
    if parts.encoder is not parts.decoder:
        matrices["encoder"] = parts.encoder
    small = dict(parts.vectors)
    for name, rows in matrices.items():
        if rows.scale is not None:
            small[f"{name}_scale"] = rows.scale
    # Wide types first, so that every array begins at a multiple of its type's size.
    order = [
        *sorted(small),
        *sorted(matrices, key=lambda name: (-matrices[name].stored_dtype.itemsize, name)),
    ]
    yield _header(order, small, matrices, text)
    for name in order:
        if name in small:
            yield _bytes(small[name])
            continue
        for _, block in matrices[name].stored_blocks():
            yield _bytes(block)


def parse(source: ByteSource) -> tuple[StoredParts, Config]:
    """Tensors and configuration; raises `FileFormatError` unless `pieces` made the file.

    Matrices stay in the file where it is larger than `HELD_BYTES`.
    """
    arrays, metadata = safetensors_arrays(source)
    try:
        config = Config.model_validate_json(metadata["steer"])
    except (ValidationError, KeyError, ValueError) as error:
        raise FileFormatError(f"these bytes are not a canonical SAE file: {error}") from error
    old = config.layout == 1
    encoder, decoder = ("W_enc", "W_dec") if old else ("encoder", "decoder")
    if config.pursuit is not None:
        encoder = decoder
    known = {encoder, decoder, *_VECTORS, "encoder_scale", "decoder_scale"}
    missing = [name for name in (encoder, decoder, "b_enc", "b_dec") if name not in arrays]
    if missing or set(arrays) - known or config.card.kind != "sae" or len(config.card.layers) != 1:
        raise FileFormatError(
            f"these bytes are not a canonical SAE file: a {config.card.kind!r} on layers "
            f"{list(config.card.layers)} of {', '.join(sorted(arrays)) or 'nothing'}"
        )
    _check_kinds(arrays, matrices={encoder, decoder}, old=old)
    vectors = {name: arrays[name].load() for name in _VECTORS if name in arrays}
    second = _rows(arrays, decoder, "decoder_scale", turned=False)
    first = second
    if encoder != decoder:
        first = _rows(arrays, encoder, "encoder_scale", turned=old)
    if source.size <= HELD_BYTES:
        both = first is second
        second = second.in_memory()
        first = second if both else first.in_memory()
    return StoredParts(first, second, vectors), config


def _check_kinds(arrays: Mapping[str, FileArray], *, matrices: set[str], old: bool) -> None:
    for name, array in arrays.items():
        is_matrix = name in matrices
        dimensions = 2 if is_matrix or name == "W_skip" else 1
        kept = is_matrix and not old
        types = (torch.float32, torch.float16, torch.bfloat16) if kept else (torch.float32,)
        if len(array.shape) != dimensions or array.dtype not in types:
            raise FileFormatError(
                f"these bytes are not a canonical SAE file: {name} is of type {array.dtype} and "
                f"the shape {list(array.shape)}"
            )


def _rows(arrays: Mapping[str, FileArray], name: str, scale: str, *, turned: bool) -> FeatureRows:
    array = arrays[name].turned if turned else arrays[name]
    factor = arrays[scale].load() if scale in arrays else None
    if factor is not None and list(factor.shape) != [array.shape[0]]:
        raise FileFormatError(
            f"{scale} has the shape {list(factor.shape)}; {name} has {array.shape[0]} rows",
            code="mixed_widths",
        )
    return FeatureRows(array, factor)


def _header(
    order: list[str], small: Mapping[str, Tensor], matrices: Mapping[str, FeatureRows], text: str
) -> bytes:
    header: dict[str, object] = {"__metadata__": {"steer": text}}
    end = 0
    for name in order:
        if name in small:
            dtype, shape = small[name].dtype, list(small[name].shape)
        else:
            dtype, shape = matrices[name].stored_dtype, list(matrices[name].shape)
        size = dtype.itemsize
        for length in shape:
            size *= length
        header[name] = {
            "dtype": _NAMES[dtype],
            "shape": shape,
            "data_offsets": [end, end + size],
        }
        end += size
    written = json.dumps(header, separators=(",", ":")).encode()
    written += b" " * (-len(written) % 8)
    return len(written).to_bytes(8, "little") + written


def _bytes(tensor: Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()
