"""GGUF Layer Projection (GLP): GGUF files whose keys `glp.*` say what is done with their rows.

`glp.mode` "project" is h − Σ_j α_j (h·d_j) d_j along the unit rows `direction.N` and, of rank
k > 1, `direction.N.1` to `.{k-1}`, orthonormal; α_j is `alpha_default` times the scales of the
direction and of the layer. That is a low-rank adapter: R the rows, W = (1 − scale)·R, b = 0, with
`alpha_default` as its strength. "add", which is also what no mode means, is a plain vector.
`direction.N` acts at block N, at the site that `hook_point` names: a file says so itself.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from steer.artefacts.control_vector import ControlVector, LowRankAdapter
from steer.errors import FileFormatError, SteerError
from steer.formats.claims import check_claims, site_named, unhonoured
from steer.formats.options import ImportOptions
from steer.formats.placement import NamedRow, origin, placed
from steer.spec import Site

PREFIX = "glp."
_DIRECTION = re.compile(r"direction\.([1-9]\d{0,5})(?:\.([1-9]\d{0,2}))?")
_VERSIONS = (1, 2)
_UNIT = 1e-3
_MODES = ("project", "add")
# Read here; what else the file says is held against what other files may say.
_KNOWN = frozenset(
    {"mode", "spec_version", "rank", "orthonormal", "alpha_default", "dir_scales", "layer_scales"}
    | {"hook_point", "derived_at", "layer_ids_zero_based", "structure"}
)
_LOOPED = "per-execution-step"
_MOST_TEXT = 1024


def is_glp(fields: Mapping[str, Any]) -> bool:
    return any(key.startswith(PREFIX) for key in fields)


def read_glp(
    fields: Mapping[str, Any], tensors: Mapping[str, Tensor], path: Path, options: ImportOptions
) -> ControlVector | LowRankAdapter:
    """The artefact in a GGUF file whose `fields` have GLP's keys.

    Raises `FileFormatError` for whatever of it could not be done as it says.
    """
    about = {
        key.removeprefix(PREFIX): value for key, value in fields.items() if key.startswith(PREFIX)
    }
    if options.offset("gguf"):
        raise SteerError(
            "a GLP file itself says that direction.N acts at block N: leave out 'layer_offset' and "
            "'from'",
            code="invalid_option",
            param="/layer_offset",
        )
    check_claims({key: about[key] for key in about if key not in _KNOWN}, options)
    declared = _Declared.of(about)
    rows = _rows(tensors, declared, about)
    site = options.site or declared.site
    kept = {f"glp_{key}": value for key, value in about.items() if _is_short(value)}
    if declared.mode == "add":
        return _added(rows, declared, site, path, options, kept)
    named = {layer: NamedRow(f"direction.{layer}", basis) for layer, basis in rows.items()}
    return LowRankAdapter.of(
        {layer: _removal(basis, declared.scales(layer)) for layer, basis in rows.items()},
        site=site,
        default_strength=declared.alpha,
        provenance=origin(path, "gguf", 0, named, "glp") | kept,
        description="Removes the projection: strength 1 removes it wholly",
    )


@dataclass(frozen=True)
class _Declared:
    """What a file says is done with its directions."""

    mode: str
    site: Site
    rank: int
    alpha: float
    direction_scales: tuple[float, ...]
    layer_scales: Mapping[int, float]

    @staticmethod
    def of(about: Mapping[str, Any]) -> _Declared:
        version, rank = _whole(about, "spec_version", 1), _whole(about, "rank", 1)
        if version not in _VERSIONS:
            raise unhonoured(
                "glp.spec_version", about["spec_version"], "which is not read", "write 1 or 2"
            )
        scaled = [key for key in ("dir_scales", "layer_scales") if key in about]
        if version == 1 and (rank != 1 or scaled):
            raise unhonoured(
                "glp.spec_version", 1, "and has a rank or scales of version 2", "write version 2"
            )
        mode = about.get("mode", "add")
        if mode not in _MODES:
            raise unhonoured(
                "glp.mode", mode, "which is not known", f"known are {', '.join(_MODES)}"
            )
        if str(about.get("structure", "")).strip().lower() == _LOOPED:
            raise unhonoured(
                "glp.structure", _LOOPED, "directions of a looped model", "Steer numbers blocks"
            )
        if rank > 1 and str(about.get("orthonormal")).lower() != "true":
            raise unhonoured(
                "glp.rank", rank, "without glp.orthonormal", "orthonormalise the rows and say so"
            )
        return _Declared(
            mode, _site(about), rank, _number(about, "alpha_default", 1.0), *_scales(about, rank)
        )

    def scales(self, layer: int) -> Tensor:
        """By what each direction's strength is multiplied at `layer`, float64 `[rank]`."""
        scales = torch.tensor(self.direction_scales, dtype=torch.float64)
        return scales * self.layer_scales.get(layer, 1.0)


def _removal(basis: Tensor, scales: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """R, W and b that remove `scales` times the projections on the rows of `basis` `[k, d]`."""
    weight = (1.0 - scales)[:, None] * basis.double()
    return basis, weight.float(), torch.zeros(len(basis))


def _added(
    rows: Mapping[int, Tensor],
    declared: _Declared,
    site: Site,
    path: Path,
    options: ImportOptions,
    kept: Mapping[str, Any],
) -> ControlVector:
    plain = declared.rank == 1 and declared.direction_scales == (1.0,) and not declared.layer_scales
    if not plain:
        raise unhonoured(
            "glp.mode", "add", "with a rank or scales, which a sum has no use for", "write one row"
        )
    if declared.alpha != 1.0 and options.strength is None:
        raise unhonoured(
            "glp.alpha_default",
            declared.alpha,
            "and rows to be added may hold their strength already",
            f"state 'strength': {declared.alpha:g} if they are to be multiplied by it, else 1",
        )
    named = {layer: NamedRow(f"direction.{layer}", basis[0]) for layer, basis in rows.items()}
    return placed(named, path, "gguf", options, tool="glp", site=site, **kept)


def _rows(
    tensors: Mapping[str, Tensor], declared: _Declared, about: Mapping[str, Any]
) -> dict[int, Tensor]:
    """The rows of each layer, `[rank, d]`, checked to be what they must be for their mode."""
    found: dict[int, dict[int, Tensor]] = {}
    for name, row in tensors.items():
        match = _DIRECTION.fullmatch(name)
        if match is None or row.ndim != 1:
            raise FileFormatError(
                f"the tensor {name[:80]!r} of the shape {list(row.shape)} is none that a GLP file "
                "holds: direction.N or direction.N.j, N and j from 1, of one row",
                code="unknown_layout",
            )
        found.setdefault(int(match[1]), {})[int(match[2] or 0)] = row
    for layer, rows in found.items():
        if set(rows) != set(range(declared.rank)):
            raise FileFormatError(
                f"the file says glp.rank {declared.rank}, and has {len(rows)} directions for layer "
                f"{layer}",
                code="unknown_layout",
            )
    _check_listed(about, found)
    stacked = {n: torch.stack([rows[j] for j in sorted(rows)]) for n, rows in found.items()}
    for layer, basis in stacked.items() if declared.mode == "project" else ():
        gram = basis.double() @ basis.double().T
        if not bool((gram - torch.eye(len(basis), dtype=torch.float64)).abs().max() <= _UNIT):
            raise FileFormatError(
                f"the directions of layer {layer} are not orthonormal, so that a projection along "
                "them is not defined: write unit rows, orthogonal to each other",
                code="not_orthonormal",
            )
    return stacked


def _check_listed(about: Mapping[str, Any], found: Mapping[int, Any]) -> None:
    listed = str(about.get("layer_ids_zero_based", ""))
    if listed.strip() and {part.strip() for part in listed.split(",")} != set(map(str, found)):
        raise FileFormatError(
            f"glp.layer_ids_zero_based lists {listed[:120]!r}, and the directions have the layers "
            f"{sorted(found)}: one of them is counted in another way",
            code="invalid_layer_offset",
        )


def _site(about: Mapping[str, Any]) -> Site:
    said = about.get("hook_point", "residual_stream_post_layer")
    site = site_named(str(said))
    if site is None:
        raise unhonoured("glp.hook_point", said, "no site of Steer", "state 'site'")
    return site


def _scales(about: Mapping[str, Any], rank: int) -> tuple[tuple[float, ...], dict[int, float]]:
    by_direction = [_finite("dir_scales", part) for part in _listed(about, "dir_scales")]
    by_layer: dict[int, float] = {}
    for part in _listed(about, "layer_scales"):
        layer, _, scale = part.partition(":")
        if not layer.strip().isdigit():
            raise FileFormatError(f"glp.layer_scales has {part[:40]!r}, which is no layer:scale")
        by_layer[int(layer)] = _finite("layer_scales", scale)
    if by_direction and len(by_direction) != rank:
        raise FileFormatError(f"glp.dir_scales has {len(by_direction)} numbers for rank {rank}")
    return tuple(by_direction or [1.0] * rank), by_layer


def _listed(about: Mapping[str, Any], key: str) -> Iterator[str]:
    text = str(about.get(key, "")).strip()
    yield from text.split(",") if text else ()


def _number(about: Mapping[str, Any], key: str, default: float) -> float:
    return _finite(key, about.get(key, default))


def _whole(about: Mapping[str, Any], key: str, default: int) -> int:
    number = _number(about, key, default)
    if number != int(number) or number < 1:
        raise FileFormatError(f"glp.{key} is {about[key]!r}, not a whole number from 1")
    return int(number)


def _finite(key: str, value: Any) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if isinstance(value, bool) or not math.isfinite(number):
        raise FileFormatError(f"glp.{key} has {str(value)[:60]!r}, which is no finite number")
    return number


def _is_short(value: Any) -> bool:
    if isinstance(value, float):
        return math.isfinite(value)
    return isinstance(value, int) or (isinstance(value, str) and len(value) <= _MOST_TEXT)
