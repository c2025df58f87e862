"""One way in for every file: sniff the format, read it, apply what the sender said about it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import cast

from steer.artefacts.affine import AffineMap
from steer.artefacts.artefact import Artefact
from steer.artefacts.control_vector import ControlVector, LowRankAdapter
from steer.artefacts.lens import Lens
from steer.errors import FileFormatError, IncompatibleArtefact, SteerError
from steer.formats.adapters.loreft import is_loreft, read_loreft
from steer.formats.archive import ArchiveFormat
from steer.formats.canonical import is_canonical, read_canonical
from steer.formats.detectors.linear_probe import read_linear_probe
from steer.formats.folders import layout_of, unpacked
from steer.formats.guards.safetensors import SafetensorsFile
from steer.formats.options import ImportOptions
from steer.formats.saes.single_files import read_single_file
from steer.formats.sniff import sniff
from steer.formats.table import FORMATS
from steer.formats.vectors.safetensors import read_vector
from steer.model import ModelInfo

_SINGLE = ("npz", "torch", "safetensors")
_PROBES = ("npz", "torch", "svec")
_WITH_STRENGTH = (ControlVector, LowRankAdapter, AffineMap)


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
    if format in _SINGLE and (sae := read_single_file(path, format, options)) is not None:
        return _described(sae, options)
    if format in _PROBES and (probe := read_linear_probe(path, format, options)) is not None:
        return _described(probe, options)
    if format == "safetensors":
        return _read_safetensors(path, options)
    for known in FORMATS:
        if known.name == format:
            return _described(known.read(path, options), options)
    archive = cast("ArchiveFormat", format)
    if scratch is None:
        raise FileFormatError(f"a {format} archive cannot be read here: unpack it first")
    folder = unpacked(path, scratch, format=archive, limit=unpacked_limit)
    return _read_folder(folder, options)


def _read_folder(folder: Path, options: ImportOptions) -> Artefact:
    layout = layout_of(folder)
    if options.layer_offset or options.source not in (None, *layout.sources):
        raise SteerError(
            "the folder itself says which layers it has: leave out 'layer_offset' and 'from'",
            code="invalid_option",
            param="/layer_offset",
        )
    return _described(layout.read(folder, options), options)


def _read_safetensors(path: Path, options: ImportOptions) -> Artefact:
    file = SafetensorsFile.open(path)
    if is_canonical(file):
        options.refuse_placement("safetensors", "the file's own card")
        return _described(read_canonical(file), options)
    if is_loreft(file):
        return _described(read_loreft(file, options), options)
    if (probe := read_linear_probe(path, "safetensors", options)) is not None:
        return _described(probe, options)
    if "W_dec" in file.tensors:
        raise FileFormatError(
            "these are the weights of an SAE without its configuration: upload its folder (for "
            "SAELens cfg.json and sae_weights.safetensors) as a .zip or .tar.gz",
            code="unknown_layout",
        )
    return _described(read_vector(file, options), options)


def check_model(artefact: Artefact, model: ModelInfo) -> None:
    """Raises `IncompatibleArtefact` for an artefact that can never be used on `model`.

    Its width and every one of its layers must be the model's, and a lens must lead to the last of
    them.
    One whose card names another model is not for this one, and is let through. So is the width at
    a site that this engine does not know.
    """
    card = artefact.card
    if card.model and not model.is_called(card.model):
        return
    code, why = "", ""
    if card.site in model.sites and card.width != model.width(card.site):
        code = "wrong_width"
        why = f"has width {card.width}; {card.site} of {model.name!r} has width "
        why += str(model.width(card.site))
    elif max(card.layers) >= model.n_layers:
        code = "layer_out_of_range"
        why = f"has layers up to {max(card.layers)}; {model.name!r} has layers 0 to "
        why += str(model.n_layers - 1)
    elif isinstance(artefact, Lens) and card.depth is not None and card.depth != model.n_layers:
        code = "layer_out_of_range"
        why = f"is for a model of {card.depth} layers; {model.name!r} has {model.n_layers}"
    elif isinstance(artefact, Lens) and artefact.blocks < model.n_layers:
        code = "layer_out_of_range"
        why = f"has translators for layers 0 to {max(card.layers)}; {model.name!r} has layers 0 to "
        why += f"{model.n_layers - 1}, and a lens needs one for "
        why += "each" if artefact.method == "tuned" else "the last"
    if code:
        raise IncompatibleArtefact(
            f"the file {why}: send one made for this model, or say in 'model' for which other "
            "model it is",
            code=code,
            param="/file",
        )


def _described(artefact: Artefact, options: ImportOptions) -> Artefact:
    if options.site not in (None, artefact.card.site):
        raise SteerError(
            f"the file itself says that it belongs at {artefact.card.site}: leave out 'site'",
            code="invalid_option",
            param="/site",
        )
    if options.strength is not None and not isinstance(artefact, _WITH_STRENGTH):
        raise SteerError(
            f"a {artefact.card.kind} has no strength of its own: leave out 'strength'",
            code="invalid_option",
            param="/strength",
        )
    return replace(artefact, card=options.described(artefact.card))
