"""The way out: a vector as a file for us, for any reader of safetensors, or for GGUF's tools."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, TypeAlias

from safetensors.torch import save_file

from steer.artefacts.control_vector import Card, ControlVector
from steer.artefacts.kinds import NAMED, ArtefactKind
from steer.errors import Unsupported
from steer.formats.vectors.gguf import write_gguf

ExportFormat: TypeAlias = Literal["safetensors", "safetensors-plain", "gguf"]
SUFFIXES: dict[ExportFormat, str] = {
    "safetensors": ".safetensors",
    "safetensors-plain": ".safetensors",
    "gguf": ".gguf",
}


def check_exported(kind: ArtefactKind) -> None:
    """Raises `Unsupported` for a kind that comes as its canonical file alone, with all layers."""
    if not NAMED[kind].exported:
        raise Unsupported(
            f"a {kind} comes as safetensors only, with all its layers: leave out 'format' and "
            "'layers'",
            code="unsupported_format",
            param="/format",
        )


def export_vector(vector: ControlVector, path: Path, format: ExportFormat) -> tuple[str, ...]:
    """Writes `vector` to `path`; what readers of that file will not know of it, as sentences.

    `safetensors` is our own file, with the card; `safetensors-plain` holds the rows `layers.N`
    alone; `gguf` is for llama.cpp and repeng, with the card under a key of ours. Raises
    `Unsupported` for what GGUF cannot hold: block 0, and sites other than resid_post.
    """
    if format == "safetensors":
        path.write_bytes(vector.to_bytes())
        return ()
    if format == "gguf":
        write_gguf(vector, path)
        return _unheard("llama.cpp and repeng do not read the card", vector.card)
    save_file({f"layers.{n}": row for n, row in vector.directions.items()}, path)
    lost = _unheard("the file has no card", vector.card)
    if vector.card.site != "resid_post":
        lost += (f"the file has no card: its rows belong at {vector.card.site}, not resid_post",)
    return lost


def _unheard(why: str, card: Card) -> tuple[str, ...]:
    """What the card says about use, which a reader of the rows alone will do otherwise."""
    lost = []
    if card.default_where is not None:
        where = card.default_where.model_dump_json(by_alias=True, exclude_none=True)
        lost.append(f"{why}: they steer every token, not only {where}")
    if card.default_layers is not None and card.default_layers != card.layers:
        chosen = ", ".join(map(str, card.default_layers))
        lost.append(f"{why}: they steer all its layers, not only {chosen}")
    if card.default_strength != 1.0:
        lost.append(f"{why}: give them the strength {card.default_strength:g} yourself")
    return tuple(lost)
