"""One way in for every file: sniff the format, read it, apply what the sender said about it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TypeAlias

from steer.artefacts.control_vector import ControlVector, LowRankAdapter
from steer.artefacts.lens import Lens
from steer.artefacts.sae.base import SAE
from steer.errors import FileFormatError, SteerError
from steer.formats.adapters.loreft import is_loreft, read_loreft
from steer.formats.canonical import is_canonical, read_canonical
from steer.formats.folders import layout_of, unpacked
from steer.formats.guards.safetensors import SafetensorsFile
from steer.formats.options import ImportOptions
from steer.formats.sniff import sniff
from steer.formats.vectors.gguf import read_gguf
from steer.formats.vectors.npz import read_npz
from steer.formats.vectors.pt import read_torch
from steer.formats.vectors.safetensors import read_vector
from steer.formats.vectors.svec import read_svec

Artefact: TypeAlias = ControlVector | LowRankAdapter | SAE | Lens

READERS: Mapping[str, Callable[[Path, ImportOptions], Artefact]] = {
    "gguf": read_gguf,
    "npz": read_npz,
    "svec": read_svec,
    "torch": read_torch,
}


def read_artefact(
    path: Path, options: ImportOptions, *, scratch: Path | None, unpacked_limit: int
) -> Artefact:
    """The artefact in a file of any known format, or in a folder of several files.

    An archive is unpacked to `scratch`, a path where nothing is yet and which the caller removes,
    to at most `unpacked_limit` bytes; without `scratch`, archives are refused. The card of what
    others wrote records the hash of the file (of a folder, of its file of numbers). Raises
    `FileFormatError`, `Unsupported`, `TooLarge`, or a plain `SteerError` for options that do not
    fit the file.
    """
    if path.is_dir():
        return _read_folder(path, options)
    format = sniff(path)
    if format == "safetensors":
        return _read_safetensors(path, options)
    if format in READERS:
        return _described(READERS[format](path, options), options)
    assert format in ("zip", "tar", "tar.gz")
    if scratch is None:
        raise FileFormatError(f"a {format} archive cannot be read here: unpack it first")
    folder = unpacked(path, scratch, format=format, limit=unpacked_limit)
    return _read_folder(folder, options)


def _read_folder(folder: Path, options: ImportOptions) -> Artefact:
    layout = layout_of(folder)
    if options.layer_offset or options.source not in (None, "refusal-direction"):
        raise SteerError(
            "the folder itself says which layers it has: leave out 'layer_offset' and 'from'",
            code="invalid_option",
            param="/layer_offset",
        )
    return _described(layout.read(folder), options)


def _read_safetensors(path: Path, options: ImportOptions) -> Artefact:
    file = SafetensorsFile.open(path)
    if is_canonical(file):
        if options.offset("safetensors"):
            raise SteerError(
                "the file's own card says which layers it has: leave out 'layer_offset'",
                code="invalid_option",
                param="/layer_offset",
            )
        return _described(read_canonical(file), options)
    if is_loreft(file):
        return _described(read_loreft(file, options), options)
    if "W_dec" in file.tensors:
        raise FileFormatError(
            "these are the weights of an SAE without its configuration: upload the SAELens folder "
            "(cfg.json and sae_weights.safetensors) as a .zip or .tar.gz",
            code="unknown_layout",
        )
    return _described(read_vector(file, options), options)


def _described(artefact: Artefact, options: ImportOptions) -> Artefact:
    return replace(artefact, card=options.described(artefact.card))
