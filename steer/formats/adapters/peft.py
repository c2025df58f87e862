"""Folders that PEFT saves: `adapter_config.json` and `adapter_model.safetensors`; and beside them
`ao_config.json` of activation oracles (2512.15674), which says how the adapter is asked.

A folder without the latter may be anything, so that the sender has to say what it is (`from`). Read
is plain LoRA on linear modules: what else an adapter may do (DoRA, a bias, whole modules saved
beside) would be lost in silence, and is refused.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from steer.artefacts.lora import Lora, LoraPart
from steer.artefacts.oracle import Oracle
from steer.artefacts.oracle_form import FORMS, FormName, OracleForm
from steer.errors import FileFormatError, SteerError
from steer.formats.claims import unhonoured
from steer.formats.guards.json_objects import read_json_object
from steer.formats.guards.safetensors import SafetensorsFile
from steer.formats.options import ImportOptions
from steer.formats.placement import file_hash

CONFIG, WEIGHTS, ORACLE_CONFIG = (
    "adapter_config.json",
    "adapter_model.safetensors",
    "ao_config.json",
)
PICKLED = "adapter_model.bin"
MAX_CONFIG_BYTES = 4 << 20
SENDERS: Mapping[str, FormName] = {
    "activation-oracle": "activation_oracle",
    "latentqa": "latent_qa",
}
"""What a sender may say with `from`, and the form that it names."""

_KEY = re.compile(r"base_model\.model\.(.+)\.lora_(A|B)\.(?:default\.)?weight")
_BLOCK = re.compile(r"\.(\d{1,4})\.")
_PLAIN: Mapping[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": (None, "none"),
    "use_dora": (None, False),
    "modules_to_save": (None, []),
    "layer_replication": (None, []),
    "trainable_token_indices": (None, []),
    "lora_bias": (None, False),
}
"""What PEFT's configuration may say of the fields that change what an adapter computes."""
_PREFIX = "Layer: {layer}\n{special_token} * {num_positions} \n"
"""How `ao_config.json` writes down the one text that oracles are trained with."""


def is_peft(folder: Path) -> bool:
    return (folder / CONFIG).is_file()


def read_peft(folder: Path, options: ImportOptions) -> Oracle:
    """The oracle in a folder. Raises `FileFormatError`, or `SteerError` where the sender has to say
    of which kind it is."""
    config = read_json_object(folder / CONFIG, MAX_CONFIG_BYTES)
    about = None
    if (folder / ORACLE_CONFIG).is_file():
        about = read_json_object(folder / ORACLE_CONFIG, MAX_CONFIG_BYTES)
    form = _form(about, options)
    for key, allowed in _PLAIN.items():
        if config.get(key) not in allowed:
            raise unhonoured(
                f"{CONFIG} {key}", config.get(key), "more than plain LoRA", "train without it"
            )
    if not (folder / WEIGHTS).is_file():
        if (folder / PICKLED).is_file():
            raise FileFormatError(
                f"{PICKLED} is a Python pickle, which can run code when it is opened and is never "
                f"read: save the adapter as {WEIGHTS} (safe_serialization=True)",
                code="pickle_refused",
            )
        raise FileFormatError(
            f"there is no {WEIGHTS} in the folder, which such a one has", code="unknown_layout"
        )
    lora = _lora(folder / WEIGHTS, config)
    blocks = [int(match[1]) for name in lora.parts if (match := _BLOCK.search(name))]
    if not blocks:
        raise FileFormatError(
            f"{WEIGHTS} changes no module of a decoder block", code="unknown_layout"
        )
    layers = tuple(range(max(blocks) + 1))
    base = config.get("base_model_name_or_path")
    return Oracle.of(
        lora,
        form=form,
        model=base[:300] if isinstance(base, str) else None,
        width=_width(lora),
        layers=layers,
        default_layers=_asked_layers(about, layers),
        provenance={
            "format": "peft",
            "tool": "peft",
            "layer_offset": 0,
            "file_sha256": file_hash(folder / WEIGHTS),
        },
    )


def _form(about: dict[str, Any] | None, options: ImportOptions) -> OracleForm:
    if about is None:
        if options.source is None:
            raise SteerError(
                "the folder holds a PEFT adapter, and nothing says what it was trained for. An "
                f"oracle is told by its {ORACLE_CONFIG}, or by 'from' {' or '.join(SENDERS)}; any "
                "other adapter changes the model, and Steer edits activations: merge it into its "
                "model (merge_and_unload) and serve that, or let the engine load it (vLLM's "
                "--enable-lora)",
                code="model_weights",
                param="/from",
            )
        return FORMS[SENDERS[options.source]]
    plain = FORMS["activation_oracle"]
    prefix = about.get("prefix_template")
    if isinstance(prefix, str) and prefix.replace("\\n", "\n") != _PREFIX:
        raise unhonoured(
            f"{ORACLE_CONFIG} prefix_template",
            prefix,
            "another text than oracles are asked with",
            "ask with a form of your own: leave the file out and state 'from'",
        )
    told = {
        "placeholder": about.get("special_token", plain.placeholder),
        "layer": about.get("hook_onto_layer", plain.layer),
        "strength": about.get("steering_coefficient", plain.strength),
    }
    try:
        return OracleForm.model_validate({**plain.model_dump(), **told})
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise FileFormatError(
            f"{ORACLE_CONFIG} is not an oracle's: {first['loc'][0]}: {first['msg']}",
            code="invalid_card",
        ) from None


def _lora(path: Path, config: Mapping[str, Any]) -> Lora:
    file = SafetensorsFile.open(path)
    halves: dict[str, dict[str, str]] = {}
    for key in file.tensors:
        match = _KEY.fullmatch(key)
        if match is None:
            raise FileFormatError(
                f"{path.name} has {key[:120]!r}; plain LoRA has base_model.model.MODULE.lora_A."
                "weight and lora_B.weight alone",
                code="unknown_layout",
            )
        halves.setdefault(match[1], {})[match[2]] = key
    alone = next((name for name, each in halves.items() if len(each) != 2), None)
    if alone is not None:
        raise FileFormatError(f"{path.name} has one half of {alone[:120]!r}", code="unknown_layout")
    tensors = file.load(file.tensors, keep_type=True)
    parts = {}
    for name, each in halves.items():
        down, up = tensors[each["A"]], tensors[each["B"]]
        parts[name] = LoraPart(down, up, _scale(config, name, len(down)))
    return Lora.of(parts)


def _scale(config: Mapping[str, Any], name: str, rank: int) -> float:
    """alpha / r, or alpha / √r, with the alpha that the configuration gives this module."""
    patterns = config.get("alpha_pattern") or {}
    alpha = config.get("lora_alpha")
    if isinstance(patterns, dict):
        hits = [one for key, one in patterns.items() if name == key or name.endswith(f".{key}")]
        alpha = hits[0] if hits else alpha
    if isinstance(alpha, bool) or not isinstance(alpha, int | float):
        raise FileFormatError(f"{CONFIG} has no number 'lora_alpha'", code="unknown_layout")
    rank = max(rank, 1)
    return float(alpha) / (rank**0.5 if config.get("use_rslora") else rank)


def _width(lora: Lora) -> int:
    """What most modules of a block read or write: the stream."""
    sizes = [size for part in lora.parts.values() for size in (part.down.shape[1], len(part.up))]
    return max(set(sizes), key=lambda size: (sizes.count(size), -size))


def _asked_layers(about: dict[str, Any] | None, layers: tuple[int, ...]) -> tuple[int, ...]:
    """Those that `ao_config.json` says it was trained on, else 25, 50 and 75 % of the model."""
    listed = (about or {}).get("act_layer_combinations")
    if isinstance(listed, list):
        flat = [one for each in listed if isinstance(each, list) for one in each]
        if flat and all(isinstance(one, int) and one in layers for one in flat):
            return tuple(sorted(set(flat)))
    return tuple(sorted({len(layers) * part // 4 for part in (1, 2, 3)} & set(layers)))
