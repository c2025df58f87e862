"""Folders of pyreft (2404.03592) and of EasySteer: one file for each layer, and `config.json`.

A file is called `intkey_layer_8_comp_block_output_unit_pos_nunit_1#0.bin` and holds `weight`
[r, d], `bias` [r] and `rotate_layer` [d, r] of `LoreftIntervention`, x + Rᵀ(Wx + b − Rx) with R =
rotate_layerᵀ, or of `DireftIntervention`, x + Rᵀ(Wx + b): the same tensors, so the configuration
or the sender says which. A `BiasIntervention` holds `bias` [d] alone, x + b: a vector. On which
tokens it was trained no file of pyreft says.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from steer.artefacts.control_vector import ControlVector, LowRankAdapter
from steer.errors import FileFormatError, SteerError
from steer.formats.claims import check_claims, site_named, unhonoured
from steer.formats.guards.json_objects import read_json_object
from steer.formats.guards.torch import load_tensors
from steer.formats.options import ImportOptions
from steer.formats.placement import NamedRow, file_hash, placed
from steer.spec import Site, Where

CONFIGS = ("config.json", "reft_config.json")
PREFIX, SUFFIX = "intkey_", ".bin"
MAX_CONFIG_BYTES = 4 << 20
_NAME = re.compile(
    r"intkey_layer_(\d{1,6})_(?:comp|repr)_(\w+)_unit_(\w+?)_nunit_(\d+)#(\d+)\.bin", re.ASCII
)
_NONLINEAR = (None, "linear")
Parts = tuple[Tensor, Tensor, Tensor]


def is_pyreft(folder: Path) -> bool:
    return any(folder.glob(f"{PREFIX}*{SUFFIX}"))


def read_pyreft(folder: Path, options: ImportOptions) -> LowRankAdapter | ControlVector:
    """The adapter in a folder, or where it has biases alone the vector. Raises `FileFormatError`,
    or `SteerError` where the sender has to say of which kind it is."""
    files = _files(folder)
    config = _config(folder)
    _check_config(config, files, options)
    held = {layer: _tensors(one.path) for layer, one in files.items()}
    (site,) = {one.site for one in files.values()}
    where = _trained_where(config)
    first = next(iter(files.values())).path
    if all(set(tensors) == {"bias"} and tensors["bias"].ndim == 1 for tensors in held.values()):
        rows = {n: NamedRow(files[n].path.name, tensors["bias"]) for n, tensors in held.items()}
        vector = placed(rows, first, "pyreft", ImportOptions(), tool="pyreft", site=site)
        card = vector.card.model_copy(update={"default_where": where})
        return ControlVector(vector.directions, card)
    make = _KINDS[_kind(config, options)]
    parts = {layer: make(*_parts(files[layer].path.name, one)) for layer, one in held.items()}
    provenance = {
        "format": "pyreft",
        "tool": "pyreft",
        "layer_offset": 0,
        "layer_names": {str(layer): one.path.name for layer, one in files.items()},
        "file_sha256": file_hash(first),
    }
    return LowRankAdapter.of(parts, site=site, default_where=where, provenance=provenance)


@dataclass(frozen=True)
class _File:
    """One intervention's file, and where it acts."""

    path: Path
    site: Site


def _files(folder: Path) -> dict[int, _File]:
    """The files by layer."""
    found: dict[int, _File] = {}
    for path in sorted(folder.glob(f"{PREFIX}*{SUFFIX}")):
        match = _NAME.fullmatch(path.name)
        site = site_named(match[2]) if match else None
        if match is None or site is None or (match[3], match[4]) != ("pos", "1"):
            raise FileFormatError(
                f"the file {path.name[:120]!r} is none that is read: "
                "intkey_layer_N_comp_COMPONENT_unit_pos_nunit_1#0.bin, its component block_output, "
                "block_input, attention_output or mlp_output",
                code="unsupported_site" if match else "unknown_layout",
            )
        layer = int(match[1])
        if layer in found:
            raise FileFormatError(
                f"the folder has two interventions for layer {layer}: pyreft uses each on tokens "
                "of its own (such as prefix and suffix), which the folder does not record. Send "
                "each in a folder of its own",
                code="duplicate_layer",
            )
        found[layer] = _File(path, site)
    if len({one.site for one in found.values()}) > 1:
        raise FileFormatError("the folder's interventions act at several sites: send one each")
    return found


def _config(folder: Path) -> dict[str, Any]:
    """The configuration, empty where there is none."""
    for name in CONFIGS:
        if (folder / name).is_file():
            return read_json_object(folder / name, MAX_CONFIG_BYTES)
    return {}


def _check_config(
    config: Mapping[str, Any], files: Mapping[int, _File], options: ImportOptions
) -> None:
    training = config.get("easysteer_training")
    for about in (config, training if isinstance(training, dict) else {}):
        if about.get("act_fn") not in _NONLINEAR:
            raise unhonoured(
                "act_fn", about["act_fn"], "an activation that no edit has", "train without one"
            )
    shown = ("alpha", "strength", "scale", "operation", "sign", "offset")
    check_claims({key: config[key] for key in shown if key in config}, options)
    listed = config.get("representations")
    if not isinstance(listed, list):
        return
    layers = [_layer(one) for one in listed]
    if sorted(map(str, layers)) != sorted(map(str, files)):
        raise FileFormatError(
            f"the configuration lists the layers {layers[:40]}, and the folder has files for "
            f"{sorted(files)}",
            code="invalid_card",
        )


def _layer(representation: Any) -> Any:
    """The layer of one entry, which pyvene writes as a dictionary or as a list of its values."""
    if isinstance(representation, dict):
        return representation.get("layer")
    return representation[0] if isinstance(representation, list) and representation else None


def _kind(config: Mapping[str, Any], options: ImportOptions) -> str:
    """`loreft` or `direft`, as the configuration names its classes or the sender says."""
    named = config.get("intervention_types")
    names = {str(one) for one in named} if isinstance(named, list) else {str(named)} - {"None"}
    classes = {re.sub(r".*\.|['>]", "", name) for name in names}
    kinds = {_CLASSES.get(name) for name in classes}
    if None in kinds or len(kinds) > 1:
        known = ", ".join(_CLASSES)
        raise FileFormatError(
            f"the folder holds {', '.join(sorted(classes))[:200]}: read are folders of one kind, "
            f"of {known} or BiasIntervention",
            code="unsupported_intervention",
        )
    said = options.source
    if not kinds and said is None:
        raise SteerError(
            "the folder has no config.json that names its interventions, and those of LoReFT and "
            "DiReFT have the same tensors: send config.json too, or state 'from' loreft or direft",
            code="unknown_layout",
            param="/from",
        )
    found = next(iter(kinds), said)
    if said not in (None, found):
        raise SteerError(
            f"the folder's configuration says that it is {found}: leave out 'from'",
            code="invalid_option",
            param="/from",
        )
    return str(found)


def _loreft(rotation: Tensor, weight: Tensor, bias: Tensor) -> Parts:
    return rotation, weight, bias


def _direft(rotation: Tensor, weight: Tensor, bias: Tensor) -> Parts:
    """Rᵀ(Wx + b) as LoReFT's Rᵀ(W'x + b − Rx), W' = W + R."""
    return rotation, (weight.double() + rotation.double()).float(), bias


_KINDS: Mapping[str, Callable[[Tensor, Tensor, Tensor], Parts]] = {
    "loreft": _loreft,
    "direft": _direft,
}
_CLASSES = {
    "LoreftIntervention": "loreft",
    "LoreftIntervention_IdentityInit": "loreft",
    "DireftIntervention": "direft",
}


def _tensors(path: Path) -> dict[str, Tensor]:
    held = load_tensors(path)
    if not isinstance(held, dict) or not all(isinstance(one, Tensor) for one in held.values()):
        raise FileFormatError(f"{path.name} holds no dictionary of tensors", code="unknown_layout")
    return {str(key).removeprefix("learned_source."): one for key, one in held.items()}


def _parts(name: str, held: Mapping[str, Tensor]) -> Parts:
    if set(held) != {"weight", "bias", "rotate_layer"}:
        raise FileFormatError(
            f"{name} holds {', '.join(sorted(held))[:200]}; of a LoReFT adapter it has weight, "
            "bias and rotate_layer",
            code="unknown_layout",
        )
    rotation = held["rotate_layer"].float()
    return rotation.mT.contiguous(), held["weight"].float(), held["bias"].float()


def _trained_where(config: Mapping[str, Any]) -> Where | None:
    """The tokens that EasySteer's configuration records; None for all of them or no word."""
    training = config.get("easysteer_training")
    apply = training.get("apply") if isinstance(training, dict) else None
    if apply is None:
        return None
    prompt, generation = (
        (apply.get("prompt"), apply.get("generation")) if isinstance(apply, dict) else (apply, None)
    )
    chosen = str(prompt).lower(), str(generation).lower()
    if chosen not in _WHERE or (isinstance(apply, dict) and set(apply) - {"prompt", "generation"}):
        raise unhonoured(
            "easysteer_training.apply",
            apply,
            "tokens that are not understood",
            "leave the key out, and name the tokens in each request ('where')",
        )
    return _WHERE[chosen]


_WHERE: Mapping[tuple[str, str], Where | None] = {
    ("all", "all"): None,
    ("all", "none"): Where(phases=("prompt",)),
    ("none", "all"): Where(phases=("generation",)),
    ("last", "none"): Where(phases=("prompt",), positions=((-1, None),)),
    ("last", "all"): Where(positions=((-1, None),)),
}
