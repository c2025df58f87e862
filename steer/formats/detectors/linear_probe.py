"""Linear probes that others fitted, told by the names of their arrays: a weight and a bias.

    torch.nn.Linear   weight [1, d] or [d] and bias [1], under whatever name the module had; or
                      weight [2, d] and bias [2], the logits of two classes
    scikit-learn      coef_ and intercept_ of a LogisticRegression, LinearSVC or
                      LinearDiscriminantAnalysis, beside them mean_ and scale_ of a StandardScaler

    s = ⟨w, x⟩ + b         of one row; it fires where s > 0, where a sigmoid is above one half
    s = ⟨w₁ − w₀, x⟩ + b₁ − b₀                        of two, the second being what is detected
    s = ⟨w/σ, x⟩ + b − ⟨w/σ, μ⟩                       behind a scaler

None says which hook point it reads, so that the sender does.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from steer.artefacts.detection import Detection
from steer.artefacts.detector import Detector
from steer.artefacts.sae.storage.file_arrays import FileArray
from steer.errors import FileFormatError, SteerError
from steer.formats.arrays import MOST_WRAPPERS, as_row, is_foreign_weight, layer_beside
from steer.formats.claims import check_claims, unhonoured
from steer.formats.detectors.by_layer import of_stated_layer
from steer.formats.guards.json_objects import read_json_object
from steer.formats.guards.safetensors import SafetensorsFile
from steer.formats.guards.torch import file_arrays
from steer.formats.guards.zip import member_names
from steer.formats.options import ImportOptions
from steer.formats.placement import file_hash, writer_of_one
from steer.formats.saes.weights import read_weights
from steer.model import HookPoint
from steer.spec import Site

MAX_JSON_BYTES = 4 << 20
_NAMES: Mapping[str, tuple[str, ...]] = {
    "weight": ("weight", "weights", "coef", "coef_", "w"),
    "bias": ("bias", "intercept", "intercept_", "b"),
    "mean": ("mean", "mean_", "scaler_mean"),
    "scale": ("scale", "scale_", "scaler_scale", "std"),
}
_ROLES = {name: role for role, names in _NAMES.items() for name in names}
_TWO = 2


def read_linear_probe(path: Path, format: str, options: ImportOptions) -> Detector | None:
    """The detector in a `safetensors`, `npz`, `torch` or `svec` (JSON) file, or None where its
    arrays are not those of a linear probe.

    Raises `FileFormatError`, or `SteerError` for what the sender must say.
    """
    if format in ("safetensors", "npz"):
        about, names = _beside(path, format)
        if not _may_be_one(names):
            return None
        return probe_of_held({**about, **read_weights(path, format).arrays}, path, format, options)
    held = _json(path) if format == "svec" else file_arrays(path)
    return probe_of_held(held, path, "json" if format == "svec" else format, options)


def probe_of_held(held: Any, path: Path, format: str, options: ImportOptions) -> Detector | None:
    """The detector in what a file held, as `read_linear_probe`."""
    parts, about = _split(_of_layer(held, options))
    if not _may_be_one(parts) or any(isinstance(one, FileArray | Tensor) for one in about.values()):
        return None
    arrays, layer = _one_of({name: _tensor(name, one) for name, one in parts.items()}, options)
    return detector_of(
        arrays, about if layer is None else {**about, "layer": layer}, path, format, options
    )


def _of_layer(held: Any, options: ImportOptions, wrappers: int = MOST_WRAPPERS) -> Any:
    """What a dictionary of probes by layer, alone or in another, holds for the layer that is meant;
    any other as it is."""
    if not isinstance(held, Mapping):
        return held
    probes = [
        isinstance(one, Mapping) and _may_be_one(list(map(str, one))) for one in held.values()
    ]
    if all(probes) and (stated := of_stated_layer(held, options)) is not None:
        layer, probe = stated
        return {**probe, "layer": layer}
    if len(held) == 1 and wrappers:
        (only,) = held.values()
        found = _of_layer(only, options, wrappers - 1)
        return held if found is only else found
    return held


def _one_of(
    arrays: Mapping[str, Tensor], options: ImportOptions
) -> tuple[Mapping[str, Tensor], int | None]:
    """Of probes under names by layer, of one width, the arrays of the layer that is meant, and that
    layer. Layers of a network have other widths, each its own."""
    groups: dict[str, dict[str, Tensor]] = {}
    for name, array in arrays.items():
        groups.setdefault(name.rpartition(".")[0], {})[name] = array
    weights = [one for name, one in arrays.items() if _role(name) == "weight"]
    narrow = all(as_row(one).ndim == 1 or len(one) == _TWO for one in weights)
    several = len(groups) > 1 and narrow and len({one.shape for one in weights}) == 1
    stated = of_stated_layer(groups, options) if several else None
    return (arrays, None) if stated is None else (stated[1], stated[0])


def _beside(path: Path, format: str) -> tuple[dict[str, Any], list[str]]:
    """What a file says beside its arrays, and the names of these."""
    if format == "npz":
        return {}, [name.removesuffix(".npy") for name in member_names(path)]
    file = SafetensorsFile.open(path)
    return dict(file.metadata), list(file.tensors)


def _json(path: Path) -> Any:
    """The object in a JSON file; None where there is none, of which another reader tells."""
    if path.stat().st_size > MAX_JSON_BYTES:
        return None
    try:
        return read_json_object(path, MAX_JSON_BYTES)
    except FileFormatError:
        return None


def _split(held: Any, wrappers: int = MOST_WRAPPERS) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a dictionary, or the only one inside it, holds under the names of parts of a probe; and
    what stands beside that."""
    if not isinstance(held, Mapping):
        return {}, {}
    named = {str(name): one for name, one in held.items()}
    inner = [name for name, one in named.items() if isinstance(one, Mapping)]
    if len(inner) == 1 and wrappers and not any(map(_role, named.keys() - inner)):
        parts, about = _split(named.pop(inner[0]), wrappers - 1)
        return parts, named | about
    parts = {name: one for name, one in named.items() if _role(name) is not None}
    return parts, {name: one for name, one in named.items() if name not in parts}


def _tensor(name: str, value: Any) -> Tensor:
    """An array, or numbers in lists as JSON has them. Raises `FileFormatError`."""
    if isinstance(value, FileArray):
        return value.load()
    try:
        return torch.as_tensor(value, dtype=None if isinstance(value, Tensor) else torch.float64)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        raise FileFormatError(
            f"{name[:80]!r} is no array of numbers", code="unknown_layout"
        ) from None


def _role(name: str) -> str | None:
    return _ROLES.get(name.rpartition(".")[2].lower())


def _may_be_one(names: Collection[str]) -> bool:
    """Whether every name is that of a part of a probe, and a weight has its bias beside it."""
    roles = {_role(name) for name in names}
    if None in roles or not {"weight", "bias"} <= roles or any(map(is_foreign_weight, names)):
        return False
    of = {
        role: {name.rpartition(".")[0] for name in names if _role(name) == role}
        for role in ("weight", "bias")
    }
    return of["weight"] == of["bias"]


@dataclass(frozen=True)
class _Parts:
    """What a probe's arrays are, in float64; `mean` and `scale` are a scaler's `[d]`."""

    weight: Tensor
    bias: Tensor
    mean: Tensor | None = None
    scale: Tensor | None = None

    @staticmethod
    def of(arrays: Mapping[str, Tensor]) -> _Parts:
        roles: dict[str, list[str]] = {}
        for name in arrays:
            roles.setdefault(str(_role(name)), []).append(name)
        several = sorted(roles["weight"])
        if len(several) > 1:
            raise FileFormatError(
                f"the file has {len(several)} layers of weights ({', '.join(several[:4])}): a "
                "detector is one linear layer; of several probes send one in each file, and "
                "networks are not read",
                code="unknown_layout",
            )
        if twice := next((names for names in roles.values() if len(names) > 1), None):
            raise FileFormatError(
                f"the file has {' and '.join(sorted(twice))}: which is meant is not said",
                code="unknown_layout",
            )
        for name, array in arrays.items():
            if not array.dtype.is_floating_point:
                raise FileFormatError(
                    f"{name[:80]!r} is of type {array.dtype}; a float type is needed"
                )
        return _Parts(**{role: arrays[name].double() for role, (name,) in roles.items()})

    def folded(self) -> tuple[Tensor, float]:
        """The row `[d]` and the bias of the score. Raises `FileFormatError`."""
        weight, bias = self.weight, self.bias.reshape(-1)
        if weight.ndim == _TWO and len(weight) == _TWO == len(bias):
            weight, bias = weight[1] - weight[0], bias[1:] - bias[:1]
        row = as_row(weight)
        if row.ndim != 1 or len(bias) != 1:
            raise FileFormatError(
                f"the probe's weight has the shape {list(self.weight.shape)} and its bias "
                f"{list(self.bias.shape)}: read are [1, d] with [1], and two classes, [2, d] with "
                "[2]; of more classes send the row of the one that is to be detected",
                code="unknown_layout",
            )
        shift = 0.0
        for name, one in (("mean", self.mean), ("scale", self.scale)):
            if one is not None and as_row(one).shape != row.shape:
                raise FileFormatError(
                    f"the scaler's {name} has the shape {list(one.shape)}, the weight "
                    f"{list(self.weight.shape)}",
                    code="mixed_widths",
                )
        if self.scale is not None:
            row = row / as_row(self.scale)
        if self.mean is not None:
            shift = float(row @ as_row(self.mean))
        return row, float(bias[0]) - shift


def detector_of(
    arrays: Mapping[str, Tensor],
    about: dict[str, Any],
    path: Path,
    format: str,
    options: ImportOptions,
    *,
    tool: str = "linear probe",
    detects: str = "",
) -> Detector:
    """The detector of a probe's `arrays`, called as above, with what stands beside them in `about`.
    Raises `FileFormatError`, or `SteerError` for what the sender must say."""
    row, bias = _Parts.of(arrays).folded()
    if "threshold" in about:
        raise unhonoured(
            "threshold",
            about["threshold"],
            "which may be of the score or of its sigmoid",
            "leave it out, and say it as 'threshold' of the score where the detector is armed",
        )
    layer = layer_beside(about)
    point = _point(options, format, layer, check_claims(about, options))
    return Detector.of(
        row,
        layer=point.layer,
        bias=bias,
        site=point.site,
        detection=Detection(detects=detects),
        provenance={"format": format, "file_sha256": file_hash(path), "tool": tool},
    )


def _point(options: ImportOptions, format: str, layer: int | None, site: Site | None) -> HookPoint:
    source = writer_of_one(options, format)
    layers = options.layers or (None if layer is None else (layer,))
    if layers is None or len(layers) != 1:
        raise SteerError(
            "the file holds a linear probe, and does not say which layer it reads: state in "
            "'layers' the one 0-based block",
            code="layer_required",
            param="/layers",
        )
    told = None if source is None else source.site or "resid_post"
    chosen = options.site or site or told
    if chosen is None:
        raise SteerError(
            f"the file holds a linear probe, and does not say what of block {layers[0]} it reads: "
            "state 'from' blocks for one fitted to the block's output, or the 'site' itself",
            code="site_required",
            param="/site",
        )
    return HookPoint(layers[0], chosen)
