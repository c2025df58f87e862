"""SAELens directories: `cfg.json` and `sae_weights.safetensors`, of version 6 and before.

Beside them may lie `labels.json` (feature index to label) and `card.json` (fields of a `Card`),
which SAELens ignores, and `activation_scaler.json`, which its trainer leaves with weights whose
input scale is not folded in yet.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as save_safetensors
from torch import Tensor

from steer.artefacts.control_vector import Card
from steer.artefacts.sae.architectures import architecture_named
from steer.artefacts.sae.base import SAE
from steer.artefacts.sae.hook_names import hook_name, parse_hook_name
from steer.artefacts.sae.labels import FeatureLabel
from steer.errors import FileFormatError
from steer.model import HookPoint

CONFIG = "cfg.json"
WEIGHTS = "sae_weights.safetensors"
LABELS = "labels.json"
CARD = "card.json"
SCALER = "activation_scaler.json"

_OLD_KEYS = {
    "hook_point": "hook_name",
    "hook_point_layer": "hook_layer",
    "hook_point_head_index": "hook_head_index",
    "activation_fn_str": "activation_fn",
}
_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_KEPT_AS_PROVENANCE = (
    "hook_name",
    "hf_hook_name",
    "dataset_path",
    "context_size",
    "prepend_bos",
    "neuronpedia_id",
    "sae_lens_version",
    "sae_lens_training_version",
)


def load_directory(path: Path) -> SAE:
    """The SAE in a SAELens directory.

    Decoder norms (`rescale_acts_by_decoder_norm`) and a known input scale are folded into the
    weights. Raises `FileFormatError` for anything that is not such a directory, `Unsupported` for
    an architecture or normalisation that cannot be run.
    """
    cfg = _config(path / CONFIG)
    architecture = architecture_named(_text(cfg, "architecture", "standard"))
    if cfg.get("hook_head_index") is not None:
        raise FileFormatError(f"{path}: an SAE of a single attention head is not supported")
    tensors = _tensors(path / WEIGHTS, architecture.needs_threshold)
    _check_declared(path, cfg, tensors)
    normalize = _normalisation(cfg)
    if normalize == "expected_average_only_in" and (path / SCALER).exists():
        _fold_input_scale(tensors, _scale(path / SCALER))
        normalize = "none"
    if architecture.needs_k and cfg.get("rescale_acts_by_decoder_norm"):
        _fold_decoder_norms(tensors)
    fields = _card_fields(path, cfg)
    return SAE.of(
        architecture.name,
        W_enc=tensors["W_enc"],
        b_enc=tensors["b_enc"],
        W_dec=tensors["W_dec"],
        b_dec=tensors["b_dec"],
        threshold=tensors.get("threshold"),
        k=cfg.get("k"),
        subtract_b_dec=bool(cfg.get("apply_b_dec_to_input", True)),
        normalize=normalize,
        labels=_labels(path / LABELS),
        **fields,
    )


def save_directory(sae: SAE, path: Path, *, dtype: torch.dtype = torch.float32) -> None:
    """Writes a directory that SAELens 6 and `load_directory` read.

    With `dtype` bfloat16 the file is half as large; both readers compute in float32 all the same.
    """
    path.mkdir(parents=True, exist_ok=True)
    tensors = {"W_enc": sae.W_enc, "b_enc": sae.b_enc, "W_dec": sae.W_dec, "b_dec": sae.b_dec}
    if sae.threshold is not None:
        tensors["threshold"] = sae.threshold
    weights = {name: row.to(dtype).contiguous() for name, row in tensors.items()}
    # Never in place: the SAE's own tensors may be mapped from the file that is replaced.
    partial = path / f"{WEIGHTS}.partial"
    partial.write_bytes(save_safetensors(weights))
    partial.replace(path / WEIGHTS)
    point = HookPoint(sae.layer, sae.site)
    cfg: dict[str, Any] = {
        "architecture": sae.architecture,
        "d_in": sae.d_in,
        "d_sae": sae.d_sae,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": sae.subtract_b_dec,
        "normalize_activations": sae.normalize,
        "reshape_activations": "hook_z" if sae.site == "head_out" else "none",
        "metadata": {"model_name": sae.card.model, "hook_name": hook_name(point)},
    }
    if sae.k is not None:
        cfg |= {"k": sae.k, "rescale_acts_by_decoder_norm": False}
    _write_json(path / CONFIG, cfg)
    _write_json(path / CARD, sae.card.model_dump(mode="json", by_alias=True, exclude_none=True))
    labels = {
        str(feature): label.model_dump(mode="json", exclude_defaults=True)
        for feature, label in sae.labels.items()
    }
    _write_json(path / LABELS, labels)


def _config(path: Path) -> dict[str, Any]:
    """`cfg.json` with the metadata laid flat and the keys of version 6."""
    raw = _read_json(path)
    metadata = raw.pop("metadata", None)
    if metadata is not None and not isinstance(metadata, dict):
        raise FileFormatError(f"{path}: 'metadata' must be an object; got {metadata!r}")
    given: dict[str, Any] = {**(metadata or {}), **raw}
    cfg = {_OLD_KEYS.get(key, key): value for key, value in given.items()}
    top_k = cfg.get("activation_fn_kwargs") or {}
    if cfg.get("activation_fn") == "topk" and isinstance(top_k, dict) and top_k.get("k"):
        cfg |= {"architecture": "topk", "k": top_k["k"]}
    if "k" in cfg and (isinstance(cfg["k"], bool) or not isinstance(cfg["k"], int)):
        raise FileFormatError(f"{path}: 'k' must be a whole number; got {cfg['k']!r}")
    return cfg


def _text(cfg: Mapping[str, Any], key: str, default: str) -> str:
    value = cfg.get(key) or default
    if not isinstance(value, str):
        raise FileFormatError(f"{CONFIG}: {key!r} must be a string; got {value!r}")
    return value


def _normalisation(cfg: Mapping[str, Any]) -> str:
    value = cfg.get("normalize_activations")
    if isinstance(value, bool):  # before the options had names
        return "expected_average_only_in" if value else "none"
    return _text(cfg, "normalize_activations", "none")


def _tensors(path: Path, thresholded: bool) -> dict[str, Tensor]:
    """The weights, mapped from the file, in float32."""
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise FileFormatError(f"{path} is not a readable safetensors file: {error}") from error
    for name, tensor in tensors.items():
        if tensor.dtype not in _FLOATS:
            raise FileFormatError(f"{path}: {name} holds {tensor.dtype}, not floating point")
    tensors = {name: tensor.float() for name, tensor in tensors.items()}
    if thresholded and "log_threshold" in tensors:
        tensors["threshold"] = tensors.pop("log_threshold").exp()
    needed = ["W_enc", "b_enc", "W_dec", "b_dec"] + ["threshold"] * thresholded
    missing = [name for name in needed if name not in tensors]
    if missing:
        raise FileFormatError(
            f"{path} lacks {', '.join(missing)}: it holds {', '.join(sorted(tensors)) or 'nothing'}"
        )
    factor = tensors.get("scaling_factor")
    if factor is not None and not torch.allclose(factor, torch.ones_like(factor)):
        raise FileFormatError(
            f"{path}: a fine-tuned scaling_factor is not supported: fold it into W_dec"
        )
    return tensors


def _check_declared(path: Path, cfg: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    held = tensors["W_enc"].shape
    for key, axis in (("d_in", 0), ("d_sae", 1)):
        declared = cfg.get(key)
        if declared is not None and (len(held) != 2 or declared != held[axis]):
            raise FileFormatError(
                f"{path}: {CONFIG} says {key} = {declared!r}, but W_enc is {list(held)}",
                code="mixed_widths",
            )


def _fold_decoder_norms(tensors: dict[str, Tensor]) -> None:
    # SAELens multiplies pre-activations by ‖W_dec[i]‖ and divides again when it decodes.
    norms = tensors["W_dec"].norm(dim=-1).clamp(min=1e-8)
    tensors["W_enc"] = tensors["W_enc"] * norms
    tensors["b_enc"] = tensors["b_enc"] * norms
    tensors["W_dec"] = tensors["W_dec"] / norms[:, None]


def _fold_input_scale(tensors: dict[str, Tensor], scale: float) -> None:
    tensors["W_enc"] = tensors["W_enc"] * scale
    tensors["W_dec"] = tensors["W_dec"] / scale
    tensors["b_dec"] = tensors["b_dec"] / scale


def _scale(path: Path) -> float:
    value = _read_json(path).get("scaling_factor")
    if value is None:  # the trainer writes null once it has folded the scale
        return 1.0
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e30:
        raise FileFormatError(f"{path}: 'scaling_factor' must be a positive number; got {value!r}")
    return float(value)


def _point(cfg: Mapping[str, Any]) -> HookPoint:
    names = [cfg.get("hook_name"), cfg.get("hf_hook_name")]
    given = [name for name in names if isinstance(name, str) and name]
    if not given:
        raise FileFormatError(f"{CONFIG} has neither a 'hook_name' nor an 'hf_hook_name'")
    if len(given) == 1:
        return parse_hook_name(given[0])
    try:
        return parse_hook_name(given[0])
    except FileFormatError:
        return parse_hook_name(given[1])


def _card_fields(path: Path, cfg: Mapping[str, Any]) -> dict[str, Any]:
    """What `card.json` says, completed by the configuration."""
    model = cfg.get("model_name")
    fields: dict[str, Any] = {
        "model": str(model) if model else None,
        "provenance": {
            "format": "saelens",
            **{key: cfg[key] for key in _KEPT_AS_PROVENANCE if cfg.get(key) is not None},
        },
    }
    if not (path / CARD).exists():
        point = _point(cfg)
        return fields | {"layer": point.layer, "site": point.site}
    try:
        card = Card.model_validate(_read_json(path / CARD))
    except ValidationError as error:
        raise FileFormatError(f"{path / CARD} is not a card: {error}") from error
    if card.kind != "sae" or len(card.layers) != 1:
        raise FileFormatError(
            f"{path / CARD} describes a {card.kind!r} on layers {list(card.layers)}, "
            "not an SAE on one layer"
        )
    own = card.model_dump(exclude={"kind", "width", "layers"}, exclude_unset=True)
    return fields | own | {"layer": card.layers[0]}


def _labels(path: Path) -> dict[int, FeatureLabel]:
    if not path.exists():
        return {}
    labels = {}
    for key, value in _read_json(path).items():
        if not key.isdecimal():
            raise FileFormatError(f"{path}: {key!r} is not the index of a feature")
        try:
            labels[int(key)] = FeatureLabel.model_validate(value)
        except ValidationError as error:
            raise FileFormatError(f"{path}: the label of feature {key}: {error}") from error
    return labels


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise FileFormatError(f"{path} is not a readable JSON file: {error}") from error
    if not isinstance(value, dict):
        raise FileFormatError(f"{path} must hold a JSON object; it holds a {type(value).__name__}")
    return value


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
