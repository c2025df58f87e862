"""dictionary_learning (saprmarks): one trainer's folder, `ae.pt` and `config.json`.

    dict_class                       arrays                                            what it is
    AutoEncoder                      encoder.weight [f, d], .bias, decoder.weight [d, f], bias
                                     standard, subtracts its bias; units of the decoder's norms
    AutoEncoderNew                   …, decoder.bias       standard, subtracts nothing
    GatedAutoEncoder                 encoder.weight, decoder.weight, decoder_bias, gate_bias,
                                     mag_bias, r_mag       gated, subtracts
    JumpReluAutoEncoder              W_enc [d, f], W_dec [f, d], b_enc, b_dec, threshold [f]
                                     subtracts nothing
    AutoEncoderTopK                  encoder.*, decoder.weight, b_dec, k, threshold     subtracts
    BatchTopKSAE                     the same: jumprelu with one threshold
    MatryoshkaBatchTopKSAE           W_enc, W_dec, b_enc, b_dec, k, threshold, group_sizes

The official loader gives features of an `AutoEncoder` in units of the norms of its decoder rows,
and so does this. A threshold of −1, of training that was stopped early, is a plain ReLU's.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from steer.artefacts.sae.base import SAE
from steer.artefacts.sae.jumprelu import gated_as_jumprelu
from steer.errors import FileFormatError, Unsupported
from steer.formats.options import ImportOptions
from steer.formats.saes.placing import described
from steer.formats.saes.weights import Weights, read_config, read_weights, whole_number
from steer.model import HookPoint
from steer.spec import Site

CONFIG, WEIGHTS = "config.json", "ae.pt"
_SITES: dict[str, Site] = {
    "resid_post": "resid_post",
    "resid_pre": "resid_pre",
    "resid": "resid_post",
    "mlp": "mlp_out",
    "mlp_out": "mlp_out",
    "attn": "attn_out",
    "attn_out": "attn_out",
}
_LINEAR = ("encoder.weight", "encoder.bias", "decoder.weight")


def _standard(weights: Weights) -> dict[str, Any]:
    weights.require((*_LINEAR, "bias"))
    encoder, decoder = weights.rows("encoder.weight"), weights.columns("decoder.weight")
    norms = decoder.norms().clamp(min=1e-8)
    return {
        "architecture": "standard",
        "encoder": encoder.scaled_by(norms),
        "decoder": decoder.scaled_by(1 / norms),
        "b_enc": weights.vector("encoder.bias", len(norms)) * norms,
        "b_dec": weights.vector("bias"),
    }


def _new(weights: Weights) -> dict[str, Any]:
    weights.require((*_LINEAR, "decoder.bias"))
    return _linear(weights, "decoder.bias") | {"architecture": "standard", "subtract_b_dec": False}


def _gated(weights: Weights) -> dict[str, Any]:
    gates = ("gate_bias", "mag_bias", "r_mag")
    weights.require(("encoder.weight", "decoder.weight", "decoder_bias", *gates))
    encoder, vectors = gated_as_jumprelu(
        weights.rows("encoder.weight"), *(weights.vector(name) for name in gates)
    )
    return {
        "architecture": "jumprelu",
        "encoder": encoder,
        "decoder": weights.columns("decoder.weight"),
        "b_dec": weights.vector("decoder_bias"),
        **vectors,
    }


def _jumprelu(weights: Weights) -> dict[str, Any]:
    weights.require(("W_enc", "W_dec", "b_enc", "b_dec", "threshold"))
    return _upper(weights) | {"subtract_b_dec": False}


def _topk(weights: Weights) -> dict[str, Any]:
    weights.require((*_LINEAR, "b_dec", "k"), optional=("threshold",))
    return _linear(weights, "b_dec") | {"architecture": "topk", "k": weights.whole_number("k")}


def _batch_topk(weights: Weights) -> dict[str, Any]:
    weights.require((*_LINEAR, "b_dec", "threshold"), optional=("k",))
    found = _linear(weights, "b_dec")
    threshold = weights.spread("threshold", found["encoder"].shape[0])
    return found | {"architecture": "jumprelu", "threshold": threshold}


def _matryoshka(weights: Weights) -> dict[str, Any]:
    weights.require(
        ("W_enc", "W_dec", "b_enc", "b_dec", "threshold"),
        optional=("k", "group_sizes", "active_groups"),
    )
    return _upper(weights)


def _linear(weights: Weights, b_dec: str) -> dict[str, Any]:
    return {
        "encoder": weights.rows("encoder.weight"),
        "decoder": weights.columns("decoder.weight"),
        "b_enc": weights.vector("encoder.bias"),
        "b_dec": weights.vector(b_dec),
    }


def _upper(weights: Weights) -> dict[str, Any]:
    encoder = weights.columns("W_enc")
    return {
        "architecture": "jumprelu",
        "encoder": encoder,
        "decoder": weights.rows("W_dec"),
        "b_enc": weights.vector("b_enc"),
        "b_dec": weights.vector("b_dec"),
        "threshold": weights.spread("threshold", encoder.shape[0]),
    }


_CLASSES: dict[str, Callable[[Weights], dict[str, Any]]] = {
    "AutoEncoder": _standard,
    "AutoEncoderNew": _new,
    "GatedAutoEncoder": _gated,
    "JumpReluAutoEncoder": _jumprelu,
    "AutoEncoderTopK": _topk,
    "BatchTopKSAE": _batch_topk,
    "MatryoshkaBatchTopKSAE": _matryoshka,
}


def read_dictionary(folder: Path, options: ImportOptions) -> SAE:
    """The SAE of one trainer. Raises `FileFormatError`, or `Unsupported` for another class."""
    config = read_config(folder / CONFIG)
    trainer = config.get("trainer")
    if not isinstance(trainer, dict):
        raise FileFormatError(f"{CONFIG} has no 'trainer'; got {trainer!r}", code="unknown_layout")
    kind = trainer.get("dict_class")
    if kind not in _CLASSES:
        raise Unsupported(
            f"{CONFIG}: the dict_class {str(kind)[:60]!r} is not read; read are "
            f"{', '.join(_CLASSES)}",
            code="unsupported_architecture",
        )
    weights = read_weights(folder / WEIGHTS, "torch")
    found = _CLASSES[kind](weights)
    if "k" in found and trainer.get("k") is not None:
        said = whole_number("k", trainer["k"])
        if said != found["k"]:
            raise FileFormatError(f"{CONFIG} says k = {said}, {WEIGHTS} has {found['k']}")
    point = _point(trainer, options)
    fields = described(
        point,
        folder / WEIGHTS,
        "dictionary_learning",
        model=trainer.get("lm_name"),
        dict_class=kind,
    )
    sae = SAE.of_rows(**found, **fields)
    for key, held in (("activation_dim", sae.d_in), ("dict_size", sae.d_sae)):
        if trainer.get(key) not in (None, held):
            raise FileFormatError(
                f"{CONFIG} says {key} = {trainer[key]!r}, the weights have {held}",
                code="mixed_widths",
            )
    return sae


def _point(trainer: dict[str, Any], options: ImportOptions) -> HookPoint:
    """From `layer` and a `submodule_name` such as `resid_post_layer_8`."""
    layer, name = trainer.get("layer"), str(trainer.get("submodule_name") or "")
    if isinstance(layer, bool) or not isinstance(layer, int) or layer < 0:
        raise FileFormatError(f"{CONFIG} has the layer {layer!r}, not a block's number")
    site = options.site or _SITES.get(name.removesuffix(f"_layer_{layer}").rstrip("_"))
    if site is None:
        raise FileFormatError(
            f"{CONFIG}: the submodule_name {name[:60]!r} is not understood; known are "
            f"{', '.join(_SITES)}: state the 'site'",
            code="unknown_hook_name",
        )
    return HookPoint(layer, site)
