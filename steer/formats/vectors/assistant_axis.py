"""Files of assistant-axis (2601.10387): axes, roles, and configurations for capping.

- `axis.pt`: `{"axis": [L, d], "default_mean", "role_mean", …}`, and of roles `{"vector": [L, d],
  "type", "role"}`; row k was read at the output of block k;
- a capping configuration: `{"vectors": {name: {"layer", "vector"}}, "experiments": [{"id",
  "interventions": [{"vector", "cap"}]}]}`, which does x − max(0, ⟨x, v̂⟩ − cap)·v̂ at the output of
  `layer`: the kind `project` with value "cap" and mode `at_most`.
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from steer.artefacts.control_vector import ControlVector, LayerMeasure
from steer.errors import FileFormatError, SteerError
from steer.formats.claims import check_claims
from steer.formats.options import ImportOptions
from steer.formats.placement import NamedRow, placed

_MATRIX = 2
_USE = "Made to cap the projection: kind 'project', value 'cap', mode 'at_most'"


def measured_rows(held: Mapping[Any, Any]) -> str | None:
    """The key of the rows [L, d] in a dictionary of this package; None for any other dictionary."""
    name = "axis" if "axis" in held else "vector" if {"role", "type"} <= held.keys() else None
    rows = held.get(name)
    return name if isinstance(rows, Tensor) and rows.ndim == _MATRIX else None


def is_capping(held: Mapping[Any, Any]) -> bool:
    return isinstance(held.get("vectors"), dict) and isinstance(held.get("experiments"), list)


def read_capping(held: Mapping[Any, Any], path: Path, options: ImportOptions) -> ControlVector:
    """The vector of one experiment, with its caps among the card's measures.

    Raises `SteerError` where the sender has to choose an experiment, `FileFormatError` for one
    that no single vector can do.
    """
    chosen = _experiment(held["experiments"], options)
    for part, own in ((held, ("vectors", "experiments")), (chosen, ("id", "interventions"))):
        check_claims({str(key): one for key, one in part.items() if key not in own}, options)
    rows: dict[int, NamedRow] = {}
    measures: dict[int, LayerMeasure] = {}
    for step in _dictionaries(chosen.get("interventions"), "interventions"):
        name, cap = step.get("vector"), step.get("cap")
        about = held["vectors"].get(name) if isinstance(name, str | int) else None
        layer = about.get("layer") if isinstance(about, dict) else None
        row = about.get("vector") if isinstance(about, dict) else None
        if type(layer) is not int or not isinstance(row, Tensor) or set(step) != {"vector", "cap"}:
            raise FileFormatError(
                f"the intervention {reprlib.repr(step)} is not a 'vector' of the file, with its "
                "'layer', and a 'cap': no other is read",
                code="unknown_layout",
            )
        if isinstance(cap, bool) or not isinstance(cap, int | float) or not math.isfinite(cap):
            raise FileFormatError(f"the cap {reprlib.repr(cap)} of {name!r} is no finite number")
        if layer in rows:
            raise FileFormatError(
                f"the experiment caps layer {layer} along two vectors, {rows[layer].name!r} and "
                f"{name!r}: a vector has one direction for each layer",
                code="duplicate_layer",
            )
        rows[layer] = NamedRow(str(name), row)
        measures[layer] = LayerMeasure(cap=float(cap))
    vector = placed(rows, path, "torch", options, tool="assistant-axis", experiment=_name(chosen))
    offset = vector.card.provenance["layer_offset"]
    card = vector.card.model_copy(
        update={
            "measures": {layer + int(str(offset)): one for layer, one in measures.items()},
            "description": _USE,
        }
    )
    return ControlVector(vector.directions, card)


def _experiment(experiments: Sequence[Any], options: ImportOptions) -> Mapping[str, Any]:
    found = {_name(one): one for one in _dictionaries(experiments, "experiments")}
    if options.experiment is None and len(found) == 1:
        return next(iter(found.values()))
    if options.experiment not in found:
        known = ", ".join(list(found)[:40])
        raise SteerError(
            f"the file describes {len(found)} experiments: choose one with 'experiment', of "
            f"{known}"
            + (f"; got {options.experiment!r}" if options.experiment is not None else ""),
            code="experiment_required",
            param="/experiment",
        )
    return found[options.experiment]


def _name(experiment: Mapping[str, Any]) -> str:
    name = experiment.get("id")
    return name if isinstance(name, str) else reprlib.repr(name)


def _dictionaries(value: Any, name: str) -> list[Mapping[str, Any]]:
    if not isinstance(value, list) or not value or not all(isinstance(one, dict) for one in value):
        raise FileFormatError(f"the file's {name!r} are no list of dictionaries")
    return value
