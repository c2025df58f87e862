"""One way in for every file: sniff the format, read it, apply what the sender said about it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TypeAlias

from steer.control_vector import ControlVector, LowRankAdapter
from steer.errors import FileFormatError, SteerError
from steer.formats.canonical import is_canonical, read_canonical
from steer.formats.gguf_vector import read_gguf
from steer.formats.loreft import is_loreft, read_loreft
from steer.formats.options import ImportOptions
from steer.formats.saelens_folder import read_archive, read_folder
from steer.formats.safetensors_file import SafetensorsFile
from steer.formats.sniff import sniff
from steer.formats.vector_safetensors import read_vector
from steer.sae.base import SAE

Artefact: TypeAlias = ControlVector | LowRankAdapter | SAE


def read_artefact(
    path: Path, options: ImportOptions, *, scratch: Path | None, unpacked_limit: int
) -> Artefact:
    """The artefact in a file of any known format, or in a SAELens folder.

    An archive is unpacked to `scratch`, a path where nothing is yet and which the caller removes,
    to at most `unpacked_limit` bytes; without `scratch`, archives are refused. Raises
    `FileFormatError`, `Unsupported`, `TooLarge`, or a plain `SteerError` for options that do not
    fit the file.
    """
    if path.is_dir():
        return _described(read_folder(path), options)
    format = sniff(path)
    if format == "gguf":
        return _described(read_gguf(path, options), options)
    if format == "safetensors":
        return _described(_read_safetensors(path, options), options)
    if scratch is None:
        raise FileFormatError(f"a {format} archive cannot be read here: unpack it first")
    sae = read_archive(path, scratch, format=format, limit=unpacked_limit)
    return _described(sae, options)


def _read_safetensors(path: Path, options: ImportOptions) -> Artefact:
    file = SafetensorsFile.open(path)
    if is_canonical(file):
        if options.layer_offset:
            raise SteerError(
                "the file's own card says which layers it has: leave out 'layer_offset'",
                code="invalid_option",
                param="/layer_offset",
            )
        return read_canonical(file)
    if is_loreft(file):
        return read_loreft(file, options)
    if "W_dec" in file.tensors:
        raise FileFormatError(
            "these are the weights of an SAE without its configuration: upload the SAELens folder "
            "(cfg.json and sae_weights.safetensors) as a .zip or .tar.gz",
            code="unknown_layout",
        )
    return read_vector(file, options)


def _described(artefact: Artefact, options: ImportOptions) -> Artefact:
    return replace(artefact, card=options.described(artefact.card))
