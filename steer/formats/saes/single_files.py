"""SAEs that are published as one file, told by the names of its arrays.

    Qwen Scope, .pt             W_enc [f, d], W_dec [d, f], b_enc, b_dec; TopK, its k in the name of
                                the repository
    Goodfire, .pt and .pth      encoder_linear.*, decoder_linear.*; ReLU
    OpenAI gpt2, .pt            encoder.weight [f, d], latent_bias, pre_bias, decoder.weight [d, f],
                                activation, activation_state_dict; v5 normalises each token
    circuit-tracer, safetensors W_enc [f, d], W_dec [f, d], b_enc, b_dec, W_skip and
                                activation_function.threshold where it has them; a transcoder

None says which layer it reads, so that the sender does.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from steer.artefacts.sae.base import SAE
from steer.errors import FileFormatError, SteerError, Unsupported
from steer.formats.guards.safetensors import SafetensorsFile
from steer.formats.guards.torch import file_arrays
from steer.formats.guards.zip import member_names
from steer.formats.options import ImportOptions
from steer.formats.saes.gemma_scope import is_npz, read_npz_sae
from steer.formats.saes.placing import described, told_point
from steer.formats.saes.weights import Weights, read_weights, whole_number

_L0 = re.compile(r"L0_(\d{1,5})(?!\d)")
_UPPER = ("W_enc", "W_dec", "b_enc", "b_dec")
_THRESHOLD = "activation_function.threshold"


def _qwen(weights: Weights, options: ImportOptions) -> SAE:
    weights.require(_UPPER)
    point = told_point(options, "a Qwen Scope file", site="resid_post")
    # The only place that says it.
    found = _L0.search(f"{options.origin or ''}/{weights.path.absolute()}")
    if found is None:
        raise SteerError(
            "a Qwen Scope file does not say its k, which stands in its repository's name "
            "(…-L0_50): give the file in a folder of that name, or as hf://",
            code="k_required",
            param="/file",
        )
    return SAE.of_rows(
        "topk",
        encoder=weights.rows("W_enc"),
        decoder=weights.columns("W_dec"),
        b_enc=weights.vector("b_enc"),
        b_dec=weights.vector("b_dec"),
        k=int(found[1]),
        subtract_b_dec=False,
        **described(point, weights.path, "qwen-scope"),
    )


def _goodfire(weights: Weights, options: ImportOptions) -> SAE:
    names = [
        f"{side}_linear.{part}" for side in ("encoder", "decoder") for part in ("weight", "bias")
    ]
    weights.require(names)
    point = told_point(options, "a Goodfire file", site="resid_post")
    return SAE.of_rows(
        "standard",
        encoder=weights.rows("encoder_linear.weight"),
        decoder=weights.columns("decoder_linear.weight"),
        b_enc=weights.vector("encoder_linear.bias"),
        b_dec=weights.vector("decoder_linear.bias"),
        subtract_b_dec=False,
        **described(point, weights.path, "goodfire"),
    )


def _openai(weights: Weights, options: ImportOptions) -> SAE:
    """v1 and v4 are ReLU on the state as it is; v5 is TopK on the state with mean 0 and deviation
    1, which is what its authors' TopK files have in common."""
    weights.require(
        ("encoder.weight", "latent_bias", "pre_bias", "decoder.weight"),
        optional=("stats_last_nonzero",),
    )
    point = told_point(options, "a file of OpenAI's gpt2 autoencoders")
    activation = weights.about.get("activation", "ReLU")
    if activation not in ("ReLU", "TopK"):
        raise Unsupported(
            f"the activation {str(activation)[:60]!r} is not one of ReLU, TopK",
            code="unsupported_architecture",
        )
    top_k = activation == "TopK"
    state = weights.about.get("activation_state_dict") or {}
    k = None
    if top_k:
        k = whole_number("activation_state_dict k", state.get("k") if hasattr(state, "get") else 0)
    return SAE.of_rows(
        "topk" if top_k else "standard",
        encoder=weights.rows("encoder.weight"),
        decoder=weights.columns("decoder.weight"),
        b_enc=weights.vector("latent_bias"),
        b_dec=weights.vector("pre_bias"),
        k=k,
        normalize="layer_norm" if top_k else "none",
        **described(point, weights.path, "openai", model="gpt2"),
    )


def _circuit_tracer(weights: Weights, options: ImportOptions) -> SAE:
    if len(weights.arrays["W_dec"].shape) > 2:
        raise _cross_layer()
    weights.require(_UPPER, optional=("W_skip", _THRESHOLD))
    point = told_point(options, "a transcoder of circuit-tracer", site="mlp_in")
    has_threshold = _THRESHOLD in weights.arrays
    encoder = weights.rows("W_enc")
    return SAE.of_rows(
        "jumprelu" if has_threshold else "standard",
        encoder=encoder,
        decoder=weights.rows("W_dec"),
        b_enc=weights.vector("b_enc"),
        b_dec=weights.vector("b_dec"),
        threshold=weights.spread(_THRESHOLD, encoder.shape[0]) if has_threshold else None,
        W_skip=weights.matrix("W_skip") if "W_skip" in weights.arrays else None,
        subtract_b_dec=False,
        write_site="mlp_out",
        **described(point, weights.path, "circuit-tracer"),
    )


def _cross_layer() -> Unsupported:
    return Unsupported(
        "this is a cross-layer transcoder: it writes to every later layer, which is not served; "
        "use the transcoders of single layers",
        code="unsupported_architecture",
    )


@dataclass(frozen=True)
class SingleFile:
    """One layout: the container's format, the names that tell it, and its reader."""

    format: str
    told_by: frozenset[str]
    read: Callable[[Weights, ImportOptions], SAE]


SINGLE_FILES = (
    SingleFile("torch", frozenset({"encoder_linear.weight", "decoder_linear.weight"}), _goodfire),
    SingleFile("torch", frozenset({"latent_bias", "pre_bias"}), _openai),
    SingleFile("torch", frozenset({"W_enc", "W_dec"}), _qwen),
    SingleFile("safetensors", frozenset({"W_enc", "W_dec"}), _circuit_tracer),
)


def read_single_file(path: Path, format: str, options: ImportOptions) -> SAE | None:
    """The SAE in a file, or None where its arrays are not named like those of any.

    Raises `FileFormatError`, `Unsupported`, or `SteerError` for what the sender must say.
    """
    if format == "npz":
        names = {name.removesuffix(".npy") for name in member_names(path)}
        return read_npz_sae(path, options) if is_npz(names) else None
    names = _names(path, format)
    if any(re.fullmatch(r"W_enc_\d+|W_dec_\d+", name) for name in names):
        raise _cross_layer()
    for layout in SINGLE_FILES:
        if layout.format == format and layout.told_by <= names:
            _refuse_mixed(layout, names)
            return layout.read(read_weights(path, format), options)
    return None


def _refuse_mixed(chosen: SingleFile, names: set[str]) -> None:
    for other in SINGLE_FILES:
        if other is not chosen and other.format == chosen.format and other.told_by <= names:
            raise FileFormatError(
                f"the file has the arrays of two layouts, {', '.join(sorted(chosen.told_by))} and "
                f"{', '.join(sorted(other.told_by))}: leave out one of them",
                code="unknown_layout",
            )


def _names(path: Path, format: str) -> set[str]:
    if format == "safetensors":
        return set(SafetensorsFile.open(path).tensors)
    held: Any = file_arrays(path) if format == "torch" else {}
    return {str(name) for name in held} if isinstance(held, dict) else set()
