"""Gemma Scope 1 (`params.npz`) and 2 (`config.json`, `params.safetensors`): JumpReLU.

`W_enc` `[d, f]`, `W_dec` `[f, d]`, `b_enc`, `b_dec`, `threshold` `[f]`, in either case of letters;
nothing is subtracted. Gemma Scope 1 says nothing of where it reads: the layer is that of the folder
it came in (`layer_12/width_16k/average_l0_82`), or the sender's. The second names its hooks, and
those of a transcoder, which may pass its input on (`affine_skip_connection` `[d_in, d_out]`, x·A).
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from steer.artefacts.sae.base import SAE
from steer.errors import FileFormatError, Unsupported
from steer.formats.options import ImportOptions
from steer.formats.saes.placing import described, hook_point, layer_in_path, told_point, write_site
from steer.formats.saes.weights import Weights, read_config, read_weights

CONFIG, WEIGHTS, NPZ = "config.json", "params.safetensors", "params.npz"
_NAMES = ("W_enc", "W_dec", "b_enc", "b_dec", "threshold")
_SKIP = "affine_skip_connection"


def is_npz(names: set[str]) -> bool:
    """Whether the arrays of an `.npz` are an SAE of Gemma Scope 1."""
    return {"w_enc", "w_dec"} <= {name.lower() for name in names}


def read_npz_sae(path: Path, options: ImportOptions) -> SAE:
    """An SAE of Gemma Scope 1. Raises `FileFormatError`, or `SteerError` without a layer."""
    weights = read_weights(path, "npz")
    names = _named(weights)
    if options.layers is None and (layer := layer_in_path(path.absolute())) is not None:
        options = replace(options, layers=(layer,))
    point = told_point(options, "params.npz of Gemma Scope", site="resid_post")
    fields = described(point, path, "gemma-scope")
    return _sae(weights, names, **fields)


def read_gemma_scope_2(folder: Path, options: ImportOptions) -> SAE:
    """An SAE or transcoder of Gemma Scope 2. Raises `FileFormatError` or `Unsupported`."""
    config = read_config(folder / CONFIG)
    architecture = str(config.get("architecture", "jump_relu"))
    if architecture.replace("_", "") != "jumprelu":
        raise Unsupported(
            f"{CONFIG}: the architecture {architecture[:60]!r} is not Gemma Scope's jump_relu",
            code="unsupported_architecture",
        )
    weights = read_weights(folder / WEIGHTS, "safetensors")
    names = _named(weights)
    decoder = weights.arrays[names["W_dec"]]
    if len(decoder.shape) > 2:
        raise Unsupported(
            "this is a cross-layer transcoder: it writes to every later layer, which is not "
            "served; use the transcoder of one layer",
            code="unsupported_architecture",
        )
    point = hook_point(config.get("hf_hook_point_in"), options, CONFIG, key="hf_hook_point_in")
    fields = described(point, folder / WEIGHTS, "gemma-scope-2", model=config.get("model_name"))
    out = config.get("hf_hook_point_out")
    if out is not None and out != config.get("hf_hook_point_in"):
        fields["write_site"] = write_site(out, point, CONFIG)
    declared = config.get("affine_connection", _SKIP in weights.arrays)
    if bool(declared) != (_SKIP in weights.arrays):
        raise FileFormatError(
            f"{CONFIG} says affine_connection = {declared!r}, but {WEIGHTS} "
            + ("lacks it" if declared else "holds one")
        )
    return _sae(weights, names, **fields)


def _named(weights: Weights) -> dict[str, str]:
    """The file's own names of our five arrays."""
    lower = {name.lower(): name for name in weights.arrays}
    found = {name: lower.get(name.lower(), name) for name in _NAMES}
    weights.require(found.values(), optional=(_SKIP,))
    return found


def _sae(weights: Weights, names: dict[str, str], **fields: object) -> SAE:
    skip = None
    if _SKIP in weights.arrays:
        skip = weights.matrix(_SKIP).T.contiguous()
    return SAE.of_rows(
        "jumprelu",
        encoder=weights.columns(names["W_enc"]),
        decoder=weights.rows(names["W_dec"]),
        b_enc=weights.vector(names["b_enc"]),
        b_dec=weights.vector(names["b_dec"]),
        threshold=weights.vector(names["threshold"]),
        W_skip=skip,
        subtract_b_dec=False,
        **fields,  # type: ignore[arg-type]
    )
