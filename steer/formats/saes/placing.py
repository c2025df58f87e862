"""Where an SAE belongs: what its file says, else what the sender says, and what a card records."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from steer.artefacts.sae.hook_names import parse_hook_name
from steer.errors import FileFormatError, SteerError
from steer.formats.options import ImportOptions
from steer.formats.placement import file_hash
from steer.model import HookPoint
from steer.spec import Site

_GEMMA_FOLDER = re.compile(r"layer_(\d+)_width_\w+|layer_(\d+)")


def told_point(options: ImportOptions, title: str, *, site: Site | None = None) -> HookPoint:
    """The hook point that the sender states in `layers` and `site`, of a file that says neither.

    `site` is that of every SAE of this layout, where there is one. Raises `SteerError`.
    """
    if options.layers is None or len(options.layers) != 1:
        raise SteerError(
            f"{title} does not say which layer it reads: state in 'layers' the one 0-based block",
            code="layer_required",
            param="/layers",
        )
    chosen = options.site or site
    if chosen is None:
        raise SteerError(
            f"{title} does not say what of block {options.layers[0]} it reads: state the 'site'",
            code="site_required",
            param="/site",
        )
    return HookPoint(options.layers[0], chosen)


def hook_point(
    name: Any, options: ImportOptions, file: str, *, key: str = "hook point"
) -> HookPoint:
    """The hook point with the name that a configuration gives; raises `FileFormatError`."""
    if not isinstance(name, str) or not name:
        raise FileFormatError(f"{file} names no {key}: {name!r}", code="unknown_hook_name")
    return parse_hook_name(name, site=options.site)


def write_site(name: Any, read: HookPoint, file: str) -> Site:
    """The site where a transcoder that reads at `read` writes."""
    point = hook_point(name, ImportOptions(), file, key="hook point to write to")
    if point.layer != read.layer:
        raise FileFormatError(
            f"{file}: the transcoder reads layer {read.layer} and writes layer {point.layer}; read "
            "are those of one layer",
            code="unknown_hook_name",
        )
    return point.site


def described(
    point: HookPoint, weights: Path, format: str, *, model: Any = None, **kept: Any
) -> dict[str, Any]:
    """The fields of the card of an SAE from another's file; what is None in `kept` is left out."""
    provenance: Mapping[str, Any] = {
        "format": format,
        "layer_names": {str(point.layer): str(point)},
        "file_sha256": file_hash(weights),
        **{key: value for key, value in kept.items() if value is not None},
    }
    return {
        "layer": point.layer,
        "site": point.site,
        "model": model if isinstance(model, str) and model else None,
        "provenance": dict(provenance),
    }


def layer_in_path(path: Path) -> int | None:
    """The layer in the name of one of the folders that a file lies in (`layer_12/width_16k/…`)."""
    for name in (path.name, *(parent.name for parent in path.parents)):
        match = _GEMMA_FOLDER.fullmatch(name) or re.match(r"layer_(\d+)_", name)
        if match:
            return int(next(group for group in match.groups() if group))
    return None
