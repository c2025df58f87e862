"""Llama Scope (OpenMOSS): `hyperparams.json` and `checkpoints/final.safetensors`, JumpReLU.

`encoder.weight` `[f, d]`, `encoder.bias`, `decoder.weight` `[d, f]`, `decoder.bias`, bfloat16. With
t the one threshold, s_in = √d / (mean norm in), s_out = √d / (mean norm out), and
nᵢ = ‖s_in/s_out · dᵢ‖ for decoder column i (1 without `sparsity_include_decoder_norm`):

    z = s_in·x·W_enc + b_enc;   fᵢ = nᵢ·zᵢ / s_in where that exceeds t;
    x̂ = Σ fᵢ · s_in / (s_out·nᵢ) · dᵢ + b_dec / s_out

so that a feature is counted in the model's own units along a row of length 1. SAELens' loader
leaves nᵢ out of the comparison, and takes one factor for both sides of a transcoder: both give
features that the SAE was not trained to have. The factors go into the rows' scales; the matrices
stay as they came.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch

from steer.artefacts.sae.base import SAE
from steer.errors import FileFormatError, Unsupported
from steer.formats.options import ImportOptions
from steer.formats.saes.placing import described, hook_point, write_site
from steer.formats.saes.weights import read_config, read_weights

CONFIG, WEIGHTS = "hyperparams.json", "checkpoints/final.safetensors"
_SMALLEST = 1e-30
_ARRAYS = ("encoder.weight", "encoder.bias", "decoder.weight", "decoder.bias")


def read_llama_scope(folder: Path, options: ImportOptions) -> SAE:
    """The SAE or transcoder. Raises `FileFormatError` or `Unsupported`."""
    config = read_config(folder / CONFIG)
    act = config.get("act_fn", "jumprelu")
    if act != "jumprelu" or config.get("use_glu_encoder"):
        raise Unsupported(
            f"{CONFIG}: act_fn {act!r}"
            + (" with a gated linear unit" if config.get("use_glu_encoder") else "")
            + " is not Llama Scope's released jumprelu",
            code="unsupported_architecture",
        )
    weights = read_weights(folder / WEIGHTS, "safetensors")
    optional = () if config.get("use_decoder_bias", True) else ("decoder.bias",)
    weights.require((name for name in _ARRAYS if name not in optional), optional=optional)
    encoder, decoder = weights.rows("encoder.weight"), weights.columns("decoder.weight")
    s_in, s_out = _scales(config, encoder.shape[1], decoder.shape[1])
    threshold = _positive(config.get("jump_relu_threshold"), "jump_relu_threshold")
    norms = torch.ones(decoder.shape[0])
    if config.get("sparsity_include_decoder_norm", True):
        norms = decoder.norms() * (s_in / s_out)
    point = hook_point(config.get("hook_point_in"), options, CONFIG, key="hook_point_in")
    fields = described(point, folder / WEIGHTS, "llama-scope", model=config.get("model_name"))
    out = config.get("hook_point_out")
    if out not in (None, config.get("hook_point_in")):
        fields["write_site"] = write_site(out, point, CONFIG)
    b_dec = torch.zeros(decoder.shape[1])
    if "decoder.bias" in weights.arrays:
        b_dec = weights.vector("decoder.bias") / s_out
    return SAE.of_rows(
        "jumprelu",
        encoder=encoder.scaled_by(norms),
        # A row of zeros is never active, and writes nothing.
        decoder=decoder.scaled_by(s_in / s_out / norms.clamp(min=_SMALLEST)),
        b_enc=weights.vector("encoder.bias", len(norms)) * norms / s_in,
        b_dec=b_dec,
        threshold=torch.full((decoder.shape[0],), threshold),
        subtract_b_dec=False,
        **fields,
    )


def _scales(config: dict[str, Any], d_in: int, d_out: int) -> tuple[float, float]:
    """√d over the mean norm of what is read and of what is written."""
    norms = config.get("dataset_average_activation_norm")
    if not isinstance(norms, dict):
        raise FileFormatError(
            f"{CONFIG} must have 'dataset_average_activation_norm' with 'in' and 'out'; got "
            f"{norms!r}"
        )
    return (
        input_scale(norms.get("in"), d_in, "dataset_average_activation_norm in"),
        input_scale(norms.get("out"), d_out, "dataset_average_activation_norm out"),
    )


def input_scale(norm: Any, width: int, name: str) -> float:
    """√d over the mean norm of rows of that width; raises `FileFormatError`."""
    return math.sqrt(width) / _positive(norm, name)


def _positive(value: Any, name: str) -> float:
    good = isinstance(value, int | float) and not isinstance(value, bool)
    if not good or not 1e-30 < value < 1e30:
        raise FileFormatError(f"{name!r} must be a positive number; got {value!r}")
    return float(value)
