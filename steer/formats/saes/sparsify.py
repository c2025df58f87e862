"""EleutherAI's sparsify: a hook point's folder, `cfg.json` and `sae.safetensors`.

`encoder.weight` `[f, d]`, `encoder.bias`, `W_dec` `[f, d]`, `b_dec`, and for a transcoder with a
skip `W_skip` `[d, d]`. ReLU, then the k largest (`topk`), or the largest of each of k groups
(`groupmax`); b_dec is subtracted unless `transcode`. The hook point is the folder's name:
`layers.N` is a block's output, `layers.N.mlp` the MLP's output, of a transcoder its input.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from steer.artefacts.sae.base import SAE
from steer.errors import FileFormatError, Unsupported
from steer.formats.options import ImportOptions
from steer.formats.saes.placing import described, hook_point, told_point
from steer.formats.saes.weights import read_config, read_weights, whole_number
from steer.model import HookPoint

CONFIG, WEIGHTS = "cfg.json", "sae.safetensors"
_ACTIVATIONS = ("topk", "groupmax")


def read_sparsify(folder: Path, options: ImportOptions) -> SAE:
    """The SAE or transcoder of one hook point. Raises `FileFormatError` or `Unsupported`."""
    cfg = read_config(folder / CONFIG)
    activation = cfg.get("activation", "topk")
    if cfg.get("signed"):
        raise Unsupported(
            f"{CONFIG} says 'signed', which sparsify itself no longer reads: an SAE whose features "
            "are negative too is read as abstopk from SAELens' layout",
            code="unsupported_architecture",
        )
    if activation not in _ACTIVATIONS:
        raise Unsupported(
            f"{CONFIG}: the activation {activation!r} is not one of {', '.join(_ACTIVATIONS)}",
            code="unsupported_architecture",
        )
    transcode, skip = bool(cfg.get("transcode")), bool(cfg.get("skip_connection"))
    weights = read_weights(folder / WEIGHTS, "safetensors")
    weights.require(
        ("encoder.weight", "encoder.bias", "W_dec", "b_dec", *(("W_skip",) if skip else ()))
    )
    point = _point(folder, options, transcode)
    fields = described(point, folder / WEIGHTS, "sparsify", hook_name=folder.name)
    if transcode:
        fields["write_site"] = "mlp_out"
    sae = SAE.of_rows(
        activation,
        encoder=weights.rows("encoder.weight"),
        decoder=weights.rows("W_dec"),
        b_enc=weights.vector("encoder.bias"),
        b_dec=weights.vector("b_dec"),
        W_skip=weights.matrix("W_skip") if skip else None,
        k=whole_number("k", cfg.get("k", 32)),
        subtract_b_dec=not transcode,
        **fields,
    )
    _check_sizes(cfg, sae)
    return sae


def _check_sizes(cfg: dict[str, Any], sae: SAE) -> None:
    said = cfg.get("num_latents") or None
    if said is None and cfg.get("expansion_factor") is not None:
        said = sae.d_in * whole_number("expansion_factor", cfg["expansion_factor"])
    for key, value, held in (("d_in", cfg.get("d_in"), sae.d_in), ("num_latents", said, sae.d_sae)):
        if value not in (None, held):
            raise FileFormatError(
                f"{CONFIG} says {key} = {value!r}, the weights have {held}", code="mixed_widths"
            )


def _point(folder: Path, options: ImportOptions, transcode: bool) -> HookPoint:
    try:
        point = hook_point(folder.name, options, CONFIG)
    except FileFormatError:
        point = told_point(options, f"the sparsify folder {folder.name[:60]!r}")
    if transcode and point.site == "mlp_out" and options.site is None:
        return HookPoint(point.layer, "mlp_in")
    return point
