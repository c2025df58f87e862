"""Our own files: safetensors with the card in its metadata, under the key `steer`."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any, NoReturn

from pydantic import ValidationError
from torch import Tensor

from steer.artefacts.adapter_parts import EditRows
from steer.artefacts.affine import AffineMap, Channels
from steer.artefacts.artefact import Artefact
from steer.artefacts.concepts.network import CodeNetwork
from steer.artefacts.concepts.probe import ConceptProbe
from steer.artefacts.control_vector import Card, ControlVector, LowRankAdapter
from steer.artefacts.detector import Detector
from steer.artefacts.kinds import ArtefactKind
from steer.artefacts.lens import Lens
from steer.artefacts.lora import lora_from
from steer.artefacts.oracle import Oracle
from steer.artefacts.sae.base import SAE
from steer.errors import FileFormatError
from steer.formats.guards.safetensors import SafetensorsFile

_ROW = re.compile(r"layers\.(0|[1-9]\d{0,5})")
_PART = re.compile(r"layers\.(0|[1-9]\d{0,5})\.(rotation|weight|bias)")
_JACOBIAN = re.compile(r"layers\.(0|[1-9]\d{0,5})\.jacobian")
_NAMED = re.compile(r"layers\.(0|[1-9]\d{0,5})\.([a-z]+)")


def is_canonical(file: SafetensorsFile) -> bool:
    return "steer" in file.metadata


def read_canonical(file: SafetensorsFile) -> Artefact:
    """The artefact in one of our own files, its card checked against its tensors."""
    about = _metadata(file.metadata["steer"])
    if "architecture" in about:
        # Its own reader checks everything; the header is known to be sound by now.
        with file.path.open("rb") as stream:
            return SAE.from_file(stream)
    card = read_card(about)
    return READERS[card.kind](file, card)


def read_card(about: dict[str, Any]) -> Card:
    """A card from JSON; raises `FileFormatError` for a wrong one."""
    try:
        card = Card.model_validate(about)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        raise FileFormatError(
            f"the file's card is not valid: {place}: {first['msg']}", code="invalid_card"
        ) from error
    if not math.isfinite(card.default_strength):
        raise FileFormatError(
            f"the card's default strength {card.default_strength!r} is not finite",
            code="invalid_card",
        )
    return card


def check_card(card: Card, rebuilt: Card) -> None:
    """Raises unless `card` says of its tensors what `rebuilt`, made from them, says."""
    for field in ("width", "layers"):
        claimed, real = getattr(card, field), getattr(rebuilt, field)
        if claimed != real:
            raise FileFormatError(
                f"the card says {field} {claimed!r}, the tensors have {real!r}",
                code="invalid_card",
            )
    outside = sorted(set(card.default_layers or ()) - set(card.layers))
    if outside:
        raise FileFormatError(
            f"the card's default layers {outside} are not among its layers", code="invalid_card"
        )


def _metadata(text: str) -> dict[str, Any]:
    try:
        about = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise FileFormatError(
            f"the file's card is not JSON: {error}", code="invalid_card"
        ) from None
    if not isinstance(about, dict):
        raise FileFormatError("the file's card is not a JSON object", code="invalid_card")
    return about


def _vector(file: SafetensorsFile, card: Card) -> ControlVector:
    layers = {key: int(_matched(_ROW, key)[1]) for key in file.tensors}
    rows = {layers[key]: row for key, row in file.load(layers).items()}
    vector = ControlVector.owning(rows)
    check_card(card, vector.card)
    return ControlVector(vector.directions, card.model_copy(update={"name": ""}))


def _low_rank(file: SafetensorsFile, card: Card) -> LowRankAdapter:
    if any(key.endswith(".read") for key in file.tensors):
        found = _by_layer(file, "an adapter", ("read", "write", "bias"), ("threshold",))
        adapter = LowRankAdapter.of({layer: EditRows(**named) for layer, named in found.items()})
    else:
        for key in file.tensors:
            _matched(_PART, key)
        adapter = LowRankAdapter.of(complete_parts(file))
    check_card(card, adapter.card)
    return LowRankAdapter(adapter.parts, card.model_copy(update={"name": ""}))


def _affine(file: SafetensorsFile, card: Card) -> AffineMap:
    found = _by_layer(file, "an affine map", ("scale", "shift"), ("lower", "upper"))
    made = AffineMap.of({layer: Channels(**named) for layer, named in found.items()})
    check_card(card, made.card)
    return AffineMap(made.channels, card.model_copy(update={"name": ""}))


def _lens(file: SafetensorsFile, card: Card) -> Lens:
    jacobians = {key: int(match[1]) for key in file.tensors if (match := _JACOBIAN.fullmatch(key))}
    if jacobians and len(jacobians) == len(file.tensors):
        held = file.load(jacobians, keep_type=True)
        matrices = {layer: held[key] for key, layer in jacobians.items()}
        return _own_lens(Lens.of_jacobians(matrices, depth=card.depth), card)
    layers = sorted({int(_matched(_PART, key)[1]) for key in file.tensors})
    wanted = {f"layers.{layer}.{part}" for layer in layers for part in ("weight", "bias")}
    if wanted != set(file.tensors):
        raise FileFormatError(
            "a lens has layers.N.weight and layers.N.bias for each layer, or layers.N.jacobian"
        )
    tensors = file.load(wanted, keep_type=True)
    lens = Lens.of(
        {n: (tensors[f"layers.{n}.weight"], tensors[f"layers.{n}.bias"]) for n in layers}
    )
    return _own_lens(lens, card)


def _own_lens(lens: Lens, card: Card) -> Lens:
    """`lens`, made of a file's tensors, with the file's card, checked against it."""
    check_card(card, lens.card)
    if card.depth != lens.card.depth:
        raise FileFormatError(
            f"the card says depth {card.depth!r}, which only a lens without a map for its model's "
            "last block has",
            code="invalid_card",
        )
    if card.site != lens.card.site:
        raise FileFormatError(
            f"the card says site {card.site!r}; a lens reads at resid_pre", code="invalid_card"
        )
    return Lens(lens.translators, card.model_copy(update={"name": ""}))


def _detector(file: SafetensorsFile, card: Card) -> Detector:
    found = _by_layer(file, "a detector", ("direction", "bias", "threshold"), ())
    if len(found) != 1:
        raise FileFormatError(f"a detector reads at one layer; this file has {sorted(found)}")
    if card.detection is None:
        raise FileFormatError(
            "the card of a detector says under 'detection' how its scores are pooled",
            code="invalid_card",
        )
    ((layer, named),) = found.items()
    for name in ("bias", "threshold"):
        if named[name].shape != (1,):
            shape = list(named[name].shape)
            raise FileFormatError(f"layers.{layer}.{name} has the shape {shape}; it is one number")
    bias, threshold = float(named["bias"]), float(named["threshold"])
    made = Detector.of(named["direction"], layer=layer, bias=bias, threshold=threshold)
    check_card(card, made.card)
    return Detector(made.direction, made.bias, made.threshold, card.model_copy(update={"name": ""}))


def _oracle(file: SafetensorsFile, card: Card) -> Oracle:
    if card.oracle is None:
        raise FileFormatError(
            "the file's card is an oracle's and does not say how it is asked", code="invalid_card"
        )
    check_card(card, card)
    lora = lora_from(file.load(file.tensors, keep_type=True))
    return Oracle(lora, card.model_copy(update={"name": ""}))


def _probe(file: SafetensorsFile, card: Card) -> ConceptProbe:
    if card.probe is None:
        raise FileFormatError(
            "the file's card is a probe's and does not say what it was taught ('probe')",
            code="invalid_card",
        )
    wanted = {f"probe.{one.name}": one.name for one in fields(CodeNetwork)}
    if set(file.tensors) != set(wanted):
        raise FileFormatError(
            f"a probe has the tensors {', '.join(sorted(wanted))}; this file has "
            f"{', '.join(sorted(file.tensors))[:200]}"
        )
    held = file.load(wanted)
    network = CodeNetwork(**{name: held[key] for key, name in wanted.items()})
    made = ConceptProbe.of(network, form=card.probe, layers=card.layers, site=card.site)
    check_card(card, made.card)
    return ConceptProbe(network, card.model_copy(update={"name": ""}))


def _sae(_: SafetensorsFile, card: Card) -> NoReturn:
    # An SAE's card stands inside its configuration, by which its file was told from these.
    raise FileFormatError(
        f"the file's card says {card.kind!r}, but its metadata are not those of an SAE"
    )


READERS: Mapping[ArtefactKind, Callable[[SafetensorsFile, Card], Artefact]] = {
    "vector": _vector,
    "low_rank": _low_rank,
    "sae": _sae,
    "lens": _lens,
    "affine": _affine,
    "detector": _detector,
    "oracle": _oracle,
    "probe": _probe,
}
"""Reads the tensors beside a card of each kind, and checks them against it."""


def complete_parts(file: SafetensorsFile) -> dict[int, tuple[Any, Any, Any]]:
    """Rotation, weight and bias of each layer in the keys `layers.N.rotation` and so on."""
    layers = sorted({int(match[1]) for key in file.tensors if (match := _PART.fullmatch(key))})
    names = ("rotation", "weight", "bias")
    keys = [f"layers.{layer}.{part}" for layer in layers for part in names]
    missing = [key for key in keys if key not in file.tensors]
    if missing or not keys:
        raise FileFormatError(
            "a low-rank adapter has layers.N.rotation, layers.N.weight and layers.N.bias for each "
            f"layer; missing: {', '.join(missing[:5]) or 'all'}"
        )
    tensors = file.load(keys)
    return {
        layer: (
            tensors[f"layers.{layer}.rotation"],
            tensors[f"layers.{layer}.weight"],
            tensors[f"layers.{layer}.bias"],
        )
        for layer in layers
    }


def _by_layer(
    file: SafetensorsFile, what: str, needed: tuple[str, ...], more: tuple[str, ...]
) -> dict[int, dict[str, Tensor]]:
    """The tensors called `layers.N.NAME`, by layer and name; every layer has those `needed`."""
    found: dict[int, dict[str, Tensor]] = {}
    for key, tensor in file.load(file.tensors).items():
        layer, name = _matched(_NAMED, key).groups()
        found.setdefault(int(layer), {})[name] = tensor
    for place, named in sorted(found.items()):
        wrong = sorted(set(named) ^ {*needed, *(name for name in more if name in named)})
        if wrong:
            raise FileFormatError(
                f"{what} has layers.N.{', layers.N.'.join(needed)} for each layer, and may have "
                f"{' and '.join(more)}; layer {place} has {', '.join(sorted(named))}"
            )
    return found


def _matched(pattern: re.Pattern[str], key: str) -> re.Match[str]:
    match = pattern.fullmatch(key)
    if match is None:
        raise FileFormatError(f"the file has a card, but its tensor {key!r} is not named by layer")
    return match
