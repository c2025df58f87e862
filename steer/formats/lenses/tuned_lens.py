"""Folders of the tuned-lens package: `config.json` and `params.pt`.

`params.pt` holds `N.weight` and `N.bias`, N from 0. Translator N reads `hidden_states[N]`, which is
the input of block N (for N = 0 the embeddings), not its output: off by one for who counts outputs.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from steer.artefacts.lens import Lens
from steer.errors import FileFormatError
from steer.formats.claims import check_claims
from steer.formats.guards.json_objects import read_json_object
from steer.formats.guards.torch import load_tensors
from steer.formats.options import ImportOptions
from steer.formats.placement import file_hash

CONFIG, PARAMETERS = "config.json", "params.pt"
MAX_CONFIG_BYTES = 1 << 20
_KEY = re.compile(r"(0|[1-9]\d{0,3})\.(weight|bias)")


def read_tuned_lens(folder: Path, options: ImportOptions) -> Lens:
    """The lens in a folder that the tuned-lens package saved. Raises `FileFormatError`."""
    config = read_json_object(folder / CONFIG, MAX_CONFIG_BYTES)
    check_claims(config, options)
    kind = config.get("lens_type", "linear_tuned_lens")
    if kind != "linear_tuned_lens":
        raise FileFormatError(
            f"{CONFIG} has the lens_type {str(kind)[:60]!r}; linear_tuned_lens is read",
            code="unknown_layout",
        )
    weights, biases = _parts(load_tensors(folder / PARAMETERS))
    if not weights or any(weight.ndim != 2 for weight in weights.values()):
        raise FileFormatError(f"{PARAMETERS} holds no square translators", code="unknown_layout")
    for layer, weight in weights.items():
        # A lens made with bias=False has none.
        biases.setdefault(layer, torch.zeros(len(weight), dtype=weight.dtype))
    if set(biases) != set(weights):
        raise FileFormatError(f"{PARAMETERS} has a bias without its weight", code="unknown_layout")
    lens = Lens.of(
        {layer: (weights[layer], biases[layer]) for layer in weights},
        model=_text(config, "base_model_name_or_path"),
        provenance=_provenance(folder, config, sorted(weights)),
    )
    _check_sizes(config, lens)
    return lens


def _provenance(folder: Path, config: dict[str, Any], layers: list[int]) -> dict[str, Any]:
    kept = {key: _text(config, key) for key in ("base_model_revision", "unembed_hash")}
    return {
        "format": "tuned-lens",
        "tool": "tuned-lens",
        "layer_offset": 0,
        "file_sha256": file_hash(folder / PARAMETERS),
        "layer_names": {str(layer): str(layer) for layer in layers},
        **{key: value for key, value in kept.items() if value is not None},
    }


def _parts(held: Any) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
    if not isinstance(held, dict):
        raise FileFormatError(f"{PARAMETERS} holds no dictionary", code="unknown_layout")
    found: dict[str, dict[int, Tensor]] = {"weight": {}, "bias": {}}
    for key, value in held.items():
        match = _KEY.fullmatch(str(key))
        if match is None or not isinstance(value, Tensor):
            raise FileFormatError(
                f"{PARAMETERS} has {str(key)[:60]!r}; a lens has N.weight and N.bias only",
                code="unknown_layout",
            )
        # float64 is of no use to anybody; other types are kept.
        small = value.to(torch.float32) if value.dtype == torch.float64 else value
        found[match[2]][int(match[1])] = small.detach()
    return found["weight"], found["bias"]


def _check_sizes(config: dict[str, Any], lens: Lens) -> None:
    for key, real in (("d_model", lens.card.width), ("num_hidden_layers", len(lens.translators))):
        if key in config and config[key] != real:
            raise FileFormatError(
                f"{CONFIG} says {key} {str(config[key])[:60]}, {PARAMETERS} has {real}",
                code="invalid_card",
            )


def _text(config: dict[str, Any], key: str) -> str | None:
    value = config.get(key)
    return value[:300] if isinstance(value, str) else None
