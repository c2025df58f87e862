"""Llama Scope R1 and what llamascopium writes: `config.json` and `sae_weights.safetensors`.

    encoder.weight [f, d], encoder.bias, decoder.weight [d, f], decoder.bias     R1
    W_E [d, f], b_E, W_D [f, d], b_D                                             llamascopium
    log_jumprelu_threshold [f]; dataset_average_activation_norm.<hook> [1]

The formula is Llama Scope's (`steer.formats.saes.llama_scope`) with a threshold for each feature,
in the scaled space: fᵢ = nᵢ·zᵢ / s_in where nᵢ·zᵢ exceeds exp(log threshold).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from steer.artefacts.sae.base import SAE
from steer.errors import FileFormatError, Unsupported
from steer.formats.options import ImportOptions
from steer.formats.saes.llama_scope import input_scale
from steer.formats.saes.placing import described, hook_point, write_site
from steer.formats.saes.weights import Weights, read_config, read_weights, whole_number

CONFIG, WEIGHTS = "config.json", "sae_weights.safetensors"
_R1 = ("encoder.weight", "encoder.bias", "decoder.weight", "decoder.bias")
_NEW = ("W_E", "b_E", "W_D", "b_D")
_NORM = "dataset_average_activation_norm."
_THRESHOLD = "log_jumprelu_threshold"
_SMALLEST = 1e-30


def read_llamascopium(folder: Path, options: ImportOptions) -> SAE:
    """The SAE or transcoder. Raises `FileFormatError` or `Unsupported`."""
    config = read_config(folder / CONFIG)
    act = str(config.get("act_fn", "jumprelu")).lower()
    if act not in ("relu", "jumprelu", "topk", "batchtopk") or config.get("use_glu_encoder"):
        raise Unsupported(
            f"{CONFIG}: act_fn {act[:60]!r}"
            + (" with a gated linear unit" if config.get("use_glu_encoder") else "")
            + " is not read; read are relu, jumprelu, topk and batchtopk",
            code="unsupported_architecture",
        )
    weights = read_weights(folder / WEIGHTS, "safetensors")
    names, thresholds = _names(weights, act)
    new = names == _NEW
    encoder = weights.columns(names[0]) if new else weights.rows(names[0])
    decoder = weights.rows(names[2]) if new else weights.columns(names[2])
    hook_in, hook_out = config.get("hook_point_in"), config.get("hook_point_out")
    point = hook_point(hook_in, options, CONFIG, key="hook_point_in")
    s_in = _scale(weights, config, hook_in, encoder.shape[1])
    s_out = _scale(weights, config, hook_out or hook_in, decoder.shape[1])
    norms = torch.ones(decoder.shape[0])
    if config.get("sparsity_include_decoder_norm", True):
        norms = decoder.norms()
    fields = described(point, folder / WEIGHTS, "llamascopium", model=config.get("model_name"))
    if hook_out not in (None, hook_in):
        fields["write_site"] = write_site(hook_out, point, CONFIG)
    threshold = None
    if thresholds:
        threshold = weights.spread(thresholds, decoder.shape[0]).exp() / s_in
    return SAE.of_rows(
        {"relu": "standard", "batchtopk": "jumprelu"}.get(act, act),
        encoder=encoder.scaled_by(norms),
        decoder=decoder.scaled_by(s_in / s_out / norms.clamp(min=_SMALLEST)),
        b_enc=weights.vector(names[1], len(norms)) * norms / s_in,
        b_dec=weights.vector(names[3]) / s_out,
        threshold=threshold,
        k=whole_number("top_k", config.get("top_k")) if act == "topk" else None,
        subtract_b_dec=False,
        **fields,
    )


def _names(weights: Weights, act: str) -> tuple[tuple[str, ...], str | None]:
    """The file's four arrays, and that of its thresholds where it is a jumprelu."""
    names = _NEW if "W_E" in weights.arrays else _R1
    norms = [name for name in weights.arrays if name.startswith(_NORM)]
    found = [name for name in weights.arrays if name.endswith(_THRESHOLD)]
    if act in ("jumprelu", "batchtopk") and len(found) != 1:
        raise FileFormatError(
            f"a {act} SAE has one {_THRESHOLD}; {WEIGHTS} has {len(found)}: it holds "
            f"{weights.names}"
        )
    weights.require(names, optional=(*norms, *found))
    return names, found[0] if act in ("jumprelu", "batchtopk") else None


def _scale(weights: Weights, config: dict[str, Any], hook: Any, width: int) -> float:
    """√d over the mean norm at a hook, which the weights hold, or else the configuration."""
    name = f"{_NORM}{hook}"
    if name in weights.arrays:
        found = weights.vector(name)
        if found.numel() != 1:
            raise FileFormatError(f"{name} must be one number; its shape is {list(found.shape)}")
        return input_scale(float(found), width, name)
    norms = config.get("dataset_average_activation_norm")
    if isinstance(norms, dict) and hook in norms:
        return input_scale(norms[hook], width, name)
    raise FileFormatError(
        f"{WEIGHTS} lacks {name!r}, the mean norm of what the SAE reads: without it its scale is "
        "not known"
    )
