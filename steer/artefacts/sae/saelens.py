"""SAELens directories: `cfg.json` and `sae_weights.safetensors`, of version 6 and before.

Matrices are `W_enc` `[d_in, d_sae]` and `W_dec` `[d_sae, d_out]`. A gated SAE becomes the JumpReLU
that it equals; a transcoder's configuration names a second hook, `hook_name_out`.

Beside them may lie `labels.json` (feature index to label) and `card.json` (fields of a `Card`),
which SAELens ignores, and `activation_scaler.json`, which its trainer leaves with weights whose
input scale is not folded in yet. Weights with a `topk_threshold` were saved in the middle of a
BatchTopK training.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors.torch import save as save_safetensors
from torch import Tensor

from steer.artefacts.control_vector import Card
from steer.artefacts.sae.architecture import Architecture
from steer.artefacts.sae.architectures import architecture_named
from steer.artefacts.sae.base import SAE
from steer.artefacts.sae.hook_names import hook_name, parse_hook_name
from steer.artefacts.sae.jumprelu import gated_as_jumprelu
from steer.artefacts.sae.labels import FeatureLabel
from steer.artefacts.sae.pursuit import Pursuit
from steer.artefacts.sae.storage.canonical import HELD_BYTES, StoredParts
from steer.artefacts.sae.storage.file_arrays import FileArray, OpenedFile, safetensors_arrays
from steer.artefacts.sae.storage.rows import FeatureRows
from steer.errors import FileFormatError, Unsupported
from steer.model import HookPoint
from steer.spec import Site

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
_ACTIVATIONS = {
    "topk": ("topk", "relu"),
    "abstopk": ("topk", "abstopk"),
    "jumprelu": ("relu", "jumprelu"),
    "batchtopk": ("relu", "topk", "batchtopk", "jumprelu"),
    "matryoshka_batchtopk": ("relu", "topk", "batchtopk", "jumprelu"),
}
"""What `activation_fn` may say beside an architecture; of any other, `relu`."""
_FOLDED_AT_THE_END = ("batchtopk", "matryoshka_batchtopk")
"""Decoder norms go into the rows of these when their training ends, as they become jumprelus."""
_THRESHOLDS = ("threshold", "log_threshold", "topk_threshold")
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


def load_directory(path: Path, *, site: Site | None = None) -> SAE:
    """The SAE in a SAELens directory, its rows left in the file where there are many.

    Decoder norms (`rescale_acts_by_decoder_norm`) and a known input scale go into the rows' scales.
    `site` is where it reads, for one whose hook has no name that is known here. Raises
    `FileFormatError` for anything that is not such a directory, `Unsupported` for an architecture
    or normalisation that cannot be run.
    """
    cfg = _config(path / CONFIG)
    plain, is_transcoder = _architecture(cfg)
    _check_activation(plain, cfg)
    gated = plain == "gated"
    architecture = architecture_named("jumprelu" if gated else plain)
    if cfg.get("hook_head_index") is not None:
        raise FileFormatError(f"{path}: an SAE of a single attention head is not supported")
    parts = _parts(path / WEIGHTS, architecture, gated)
    _check_declared(path, cfg, parts)
    normalize = _normalisation(cfg)
    if normalize == "expected_average_only_in" and (path / SCALER).exists():
        parts = _with_input_scale(parts, _scale(path / SCALER))
        normalize = "none"
    unfolded = architecture.needs_k or plain in _FOLDED_AT_THE_END
    if unfolded and cfg.get("rescale_acts_by_decoder_norm"):
        parts = _with_decoder_norms(parts)
    fields = _card_fields(path, cfg, site)
    if is_transcoder and fields.get("write_site") is None:
        fields["write_site"] = _write_site(cfg, fields["layer"])
    held = parts.decoder.matrix.nbytes <= HELD_BYTES // 2
    return SAE.of_rows(
        architecture.name,
        encoder=parts.encoder.in_memory() if held else parts.encoder,
        decoder=parts.decoder.in_memory() if held else parts.decoder,
        b_enc=parts.vectors.get("b_enc"),
        b_dec=parts.vectors["b_dec"],
        threshold=parts.vectors.get("threshold"),
        W_skip=parts.vectors.get("W_skip"),
        k=_features_kept(cfg) if architecture.needs_k else None,
        pursuit=_pursuit(path, cfg) if architecture.iterative else None,
        subtract_b_dec=bool(cfg.get("apply_b_dec_to_input", not is_transcoder)),
        normalize=normalize,
        labels=_labels(path / LABELS),
        **fields,
    )


def save_directory(sae: SAE, path: Path, *, dtype: torch.dtype = torch.float32) -> None:
    """Writes a directory that SAELens 6 and `load_directory` read.

    With `dtype` bfloat16 the file is half as large; both readers compute in float32 all the same.
    Raises `Unsupported` for an architecture that SAELens has not.
    """
    if sae.architecture == "groupmax":
        raise Unsupported(
            "SAELens has no 'groupmax': keep this SAE as our own file (to_bytes)",
            code="unsupported_format",
        )
    path.mkdir(parents=True, exist_ok=True)
    tensors = {"W_dec": sae.W_dec, "b_dec": sae.b_dec}
    if sae.pursuit is None:
        tensors |= {"W_enc": sae.W_enc, "b_enc": sae.b_enc}
    for name, tensor in (("threshold", sae.threshold), ("W_skip", sae.W_skip)):
        if tensor is not None:
            tensors[name] = tensor
    weights = {name: row.to(dtype).contiguous() for name, row in tensors.items()}
    # Never in place: the SAE's own rows may lie in the file that is replaced.
    partial = path / f"{WEIGHTS}.partial"
    partial.write_bytes(save_safetensors(weights))
    partial.replace(path / WEIGHTS)
    _write_json(path / CONFIG, _described(sae))
    _write_json(path / CARD, sae.card.model_dump(mode="json", by_alias=True, exclude_none=True))
    labels = {
        str(feature): label.model_dump(mode="json", exclude_defaults=True)
        for feature, label in sae.labels.items()
    }
    _write_json(path / LABELS, labels)


def _described(sae: SAE) -> dict[str, Any]:
    """The `cfg.json` of an SAE."""
    metadata = {
        "model_name": sae.card.model,
        "hook_name": hook_name(HookPoint(sae.layer, sae.site)),
    }
    cfg: dict[str, Any] = {
        "architecture": sae.architecture,
        "d_in": sae.d_in,
        "d_sae": sae.d_sae,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": sae.subtract_b_dec,
        "normalize_activations": sae.normalize,
        "reshape_activations": "hook_z" if sae.site == "head_out" else "none",
        "metadata": metadata,
    }
    if sae.k is not None:
        cfg |= {"k": sae.k, "rescale_acts_by_decoder_norm": False}
    if sae.pursuit is not None:
        cfg |= sae.pursuit.model_dump(mode="json")
    if sae.is_transcoder:
        metadata["hook_name_out"] = hook_name(sae.write_point)
        plain = "" if sae.architecture == "standard" else f"{sae.architecture}_"
        skip = "" if sae.W_skip is None else "skip_"
        cfg |= {"architecture": f"{plain}{skip}transcoder", "d_out": sae.d_out}
    return cfg


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
    return cfg


def _features_kept(cfg: Mapping[str, Any]) -> int | None:
    """The `k` of an architecture that has one."""
    k = cfg.get("k")
    if k is not None and (isinstance(k, bool) or not isinstance(k, int)):
        raise FileFormatError(f"{CONFIG}: 'k' must be a whole number; got {k!r}")
    return k


def _check_activation(architecture: str, cfg: Mapping[str, Any]) -> None:
    """Raises `Unsupported` (`unsupported_activation`) for an activation that is not the
    architecture's own: before version 6 an SAE's had a name beside it."""
    said = cfg.get("activation_fn")
    own = _ACTIVATIONS.get(architecture, ("relu",))
    if said is not None and said not in own:
        raise Unsupported(
            f"{CONFIG} says activation_fn {str(said)[:60]!r}, which an SAE of the architecture "
            f"{architecture!r} is not run with: it has {' or '.join(own)}"
            + (" (a topk names its k in activation_fn_kwargs)" if said == "topk" else ""),
            code="unsupported_activation",
        )


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


def _architecture(cfg: Mapping[str, Any]) -> tuple[str, bool]:
    """The architecture's name without what says that it is a transcoder, and whether it is one."""
    name = _text(cfg, "architecture", "standard").lower()
    if not name.endswith("transcoder"):
        return name, False
    plain = name.removesuffix("transcoder").rstrip("_").removesuffix("skip").rstrip("_")
    return plain or "standard", True


def _write_site(cfg: Mapping[str, Any], layer: int) -> Site:
    name = cfg.get("hook_name_out")
    if not isinstance(name, str) or not name:
        raise FileFormatError(f"{CONFIG}: a transcoder needs a 'hook_name_out'; got {name!r}")
    point = parse_hook_name(name)
    if point.layer != layer:
        raise FileFormatError(
            f"{CONFIG}: the transcoder reads layer {layer} and writes layer {point.layer}; "
            "read are those of one layer"
        )
    return point.site


def _pursuit(path: Path, cfg: Mapping[str, Any]) -> Pursuit:
    given = {key: cfg[key] for key in Pursuit.model_fields if key in cfg}
    try:
        return Pursuit.model_validate(given)
    except ValidationError as error:
        raise FileFormatError(f"{path / CONFIG}: matching pursuit: {error}") from error


def _parts(path: Path, architecture: Architecture, gated: bool) -> StoredParts:
    """The weights, most of them still in the file."""
    try:
        arrays, _ = safetensors_arrays(OpenedFile.at(path))
    except OSError as error:
        raise FileFormatError(f"{path} is not a readable safetensors file: {error}") from error
    except FileFormatError as error:
        raise FileFormatError(
            f"{path} is not a readable safetensors file: {error.message}", code=error.code
        ) from error
    for name, array in arrays.items():
        if array.dtype not in _FLOATS:
            raise FileFormatError(f"{path}: {name} holds {array.dtype}, not floating point")
    thresholded = architecture.needs_threshold and not gated
    needed = ["W_dec", "b_dec"]
    if not architecture.iterative:
        needed = ["W_enc", *(("b_gate", "b_mag", "r_mag") if gated else ("b_enc",)), *needed]
    forms = [name for name in _THRESHOLDS if thresholded and name in arrays]
    if thresholded:
        needed.append(forms[0] if forms else "threshold")
    missing = [name for name in needed if name not in arrays]
    if missing:
        raise FileFormatError(
            f"{path} lacks {', '.join(missing)}: it holds {', '.join(sorted(arrays)) or 'nothing'}"
        )
    if len(forms) > 1:
        raise FileFormatError(f"{path} holds both {' and '.join(forms)}: leave out one")
    vectors: dict[str, Tensor] = {
        name: arrays[name].load().float()
        for name in ("b_enc", "b_dec", "W_skip")
        if name in arrays and (name != "b_enc" or not (gated or architecture.iterative))
    }
    for name in forms:
        threshold = arrays[name].load().float()
        vectors["threshold"] = threshold.exp() if name == "log_threshold" else threshold
    _check_factor(path, arrays)
    decoder = FeatureRows(arrays["W_dec"])
    if architecture.iterative:
        return StoredParts(decoder, decoder, vectors)
    encoder = FeatureRows(arrays["W_enc"].turned)
    if gated:
        encoder, more = gated_as_jumprelu(
            encoder, *(arrays[name].load().float() for name in ("b_gate", "b_mag", "r_mag"))
        )
        vectors |= more
    if thresholded and vectors["threshold"].numel() == 1:
        # BatchTopK's one threshold for all.
        vectors["threshold"] = vectors["threshold"].reshape(()).repeat(decoder.shape[0])
    return StoredParts(encoder, decoder, vectors)


def _check_factor(path: Path, arrays: Mapping[str, FileArray]) -> None:
    if "scaling_factor" not in arrays:
        return
    factor = arrays["scaling_factor"].load().float()
    if not torch.allclose(factor, torch.ones_like(factor)):
        raise FileFormatError(
            f"{path}: a fine-tuned scaling_factor is not supported: fold it into W_dec"
        )


def _check_declared(path: Path, cfg: Mapping[str, Any], parts: StoredParts) -> None:
    W_enc, W_dec = parts.encoder.matrix.shape[::-1], parts.decoder.matrix.shape
    for name, shape, keys in (
        ("W_enc", W_enc, ("d_in", "d_sae")),
        ("W_dec", W_dec, ("d_sae", "d_out")),
    ):
        for axis, key in enumerate(keys):
            declared = cfg.get(key)
            if declared is not None and (len(shape) != len(keys) or declared != shape[axis]):
                raise FileFormatError(
                    f"{path}: {CONFIG} says {key} = {declared!r}, but {name} is {list(shape)}",
                    code="mixed_widths",
                )


def _with_decoder_norms(parts: StoredParts) -> StoredParts:
    # SAELens multiplies pre-activations by ‖W_dec[i]‖ and divides again when it decodes.
    norms = parts.decoder.norms().clamp(min=1e-8)
    if parts.vectors["b_enc"].shape != norms.shape:
        raise FileFormatError(
            f"b_enc has the shape {list(parts.vectors['b_enc'].shape)}, and the decoder "
            f"{len(norms)} features",
            code="mixed_widths",
        )
    vectors = {**parts.vectors, "b_enc": parts.vectors["b_enc"] * norms}
    return StoredParts(parts.encoder.scaled_by(norms), parts.decoder.scaled_by(1 / norms), vectors)


def _with_input_scale(parts: StoredParts, scale: float) -> StoredParts:
    vectors = {**parts.vectors, "b_dec": parts.vectors["b_dec"] / scale}
    return StoredParts(parts.encoder.scaled_by(scale), parts.decoder.scaled_by(1 / scale), vectors)


def _scale(path: Path) -> float:
    value = _read_json(path).get("scaling_factor")
    if value is None:  # the trainer writes null once it has folded the scale
        return 1.0
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e30:
        raise FileFormatError(f"{path}: 'scaling_factor' must be a positive number; got {value!r}")
    return float(value)


def _point(cfg: Mapping[str, Any], site: Site | None) -> HookPoint:
    names = [cfg.get("hook_name"), cfg.get("hf_hook_name")]
    given = [name for name in names if isinstance(name, str) and name]
    if not given:
        raise FileFormatError(f"{CONFIG} has neither a 'hook_name' nor an 'hf_hook_name'")
    try:
        return parse_hook_name(given[0], site=site)
    except FileFormatError:
        if len(given) == 1:
            raise
        return parse_hook_name(given[1], site=site)


def _card_fields(path: Path, cfg: Mapping[str, Any], site: Site | None) -> dict[str, Any]:
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
        point = _point(cfg, site)
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
