"""Pickled vectors of the steering-vectors package, and others, for `steer vectors convert` alone.

Linear classifiers of scikit-learn become detectors.
`pickle.dump(vector)` and `torch.save(vector)` both write the dataclass by its name. Pickles that
hold tensors and NumPy arrays without it are read as `.pt` files with tensors alone are.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from steer.artefacts.control_vector import ControlVector
from steer.artefacts.detector import Detector
from steer.errors import FileFormatError, Unsupported
from steer.formats.detectors.linear_probe import detector_of, probe_of_held
from steer.formats.detectors.scikit_learn import fitted_probe
from steer.formats.detectors.torch_module import with_state_dicts
from steer.formats.guards.pickle_machine import Instance, Name, refused
from steer.formats.guards.pickled_files import load_pickle
from steer.formats.options import ImportOptions
from steer.formats.placement import NamedRow, origin
from steer.formats.vectors.pt import vector_of_held
from steer.spec import Site

_CLASS = "steering_vectors.steering_vector.SteeringVector"
_SITES: dict[str, Site] = {
    "decoder_block": "resid_post",
    "self_attn": "attn_out",
    "mlp": "mlp_out",
}
_NORMS = ("input_layernorm", "post_attention_layernorm")


def convert_pickle(path: Path, options: ImportOptions) -> ControlVector | Detector:
    """What is in a file that `pickle.dump`, `joblib.dump` or `torch.save` made: the vector of a
    SteeringVector, or of tensors and arrays in one of the layouts of `.pt` files, or the detector
    of a linear probe.

    A SteeringVector's layers are 0-based already. Raises `FileFormatError` (`pickle_refused` for
    whatever else is in the file, by name), `Unsupported` for vectors that act on a norm's output,
    or `SteerError` where the sender has to say something, or has said too much.
    """
    found = with_state_dicts(load_pickle(path))
    probe = _probe(found, path, options)
    if probe is not None:
        return replace(probe, card=options.described(probe.card))
    if not isinstance(found, Instance):
        vector = vector_of_held(found, path, options)
        return ControlVector(vector.directions, options.described(vector.card))
    if set(found.state) != {"layer_activations", "layer_type"}:
        raise FileFormatError("the file's SteeringVector is not as the package writes it")
    options.refuse_placement("pickle", "a SteeringVector itself")
    site = _site(found.state["layer_type"])
    rows = _rows(found.state["layer_activations"])
    tool = origin(path, "pickle", 0, rows, "steering-vectors")
    vector = ControlVector.of(
        {layer: named.row for layer, named in rows.items()}, site=site, provenance=tool
    )
    return ControlVector(vector.directions, options.described(vector.card))


def _probe(found: Any, path: Path, options: ImportOptions) -> Detector | None:
    """A linear probe's detector, or None where there is none. Raises `FileFormatError` by name for
    instances that neither is made of."""
    fitted = fitted_probe(found, options)
    if fitted is not None:
        told = {"tool": "scikit-learn", "detects": fitted.detects}
        return detector_of(fitted.arrays, fitted.about, path, "torch", options, **told)
    _check_instances(found)
    return probe_of_held(found, path, "torch", options)


def _check_instances(found: Any) -> None:
    if isinstance(found, Name) or (isinstance(found, Instance) and found.kind != _CLASS):
        named = found.text if isinstance(found, Name) else found.kind
        raise refused(f"names {named[:120]!r}")
    if isinstance(found, Instance):
        found = found.state
    if isinstance(found, dict | list | tuple):
        for one in found.values() if isinstance(found, dict) else found:
            _check_instances(one)


def _site(layer_type: Any) -> Site:
    if layer_type in _NORMS:
        raise Unsupported(
            f"the vector acts on the output of {layer_type}, inside the block and scaled by the "
            "norm's weights, where Steer has no site: train it with layer_type='decoder_block' "
            "(or 'self_attn', 'mlp')",
            code="unsupported_site",
        )
    if not isinstance(layer_type, str) or layer_type not in _SITES:
        raise FileFormatError(f"the vector's layer_type {str(layer_type)[:60]!r} is not known")
    return _SITES[layer_type]


def _rows(activations: Any) -> dict[int, NamedRow]:
    rows: dict[int, NamedRow] = {}
    for layer, tensor in activations.items() if isinstance(activations, dict) else ():
        if type(layer) is not int or layer < 0 or not isinstance(tensor, Tensor):
            raise FileFormatError("layer_activations does not map layers to tensors")
        rows[layer] = NamedRow(str(layer), tensor)
    return rows
