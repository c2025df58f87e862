"""Hidden states of any size as one safetensors file, written while they are read.

The file holds `positions` (int64 `[positions]`) and for each layer `layers.<n>` (float32
`[positions, width]`); its metadata say of which model, site, tokens and steering they are.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from steer.engines.base import CaptureRequest, Engine
from steer.inspection.selection import roles_for
from steer.model import HookPoint
from steer.plan.plan import SteeringPlan
from steer.prompts import EncodedPrompt

PIECE_NUMBERS = 1 << 24
"""The most numbers that are held at a time; more are read by running the prompt again."""


@dataclass(frozen=True)
class StateFile:
    """`size` bytes, which come in `pieces`."""

    size: int
    pieces: Iterator[bytes]


@dataclass(frozen=True)
class StateSelection:
    """What is read: `points` at one site and absolute `positions` of `prompt`, under `plan`."""

    prompt: EncodedPrompt
    points: tuple[HookPoint, ...]
    positions: tuple[int, ...]
    plan: SteeringPlan | None = None


def state_file(engine: Engine, selected: StateSelection) -> StateFile:
    """The states of `selected`. What is wrong with running them comes with the first piece."""
    head = _head(engine, selected)
    positions = np.asarray(selected.positions, dtype="<i8").tobytes()
    width = engine.info.width(selected.points[0].site)
    numbers = len(selected.points) * len(selected.positions) * width
    size = len(head) + len(positions) + 4 * numbers
    return StateFile(size, _pieces(engine, head + positions, selected))


def _head(engine: Engine, selected: StateSelection) -> bytes:
    """The length of the header and the header, padded to eight bytes as the format asks."""
    site = selected.points[0].site
    rows, width = len(selected.positions), engine.info.width(site)
    metadata = {
        "format": "pt",
        "object": "inspect.activations",
        "model": engine.info.name,
        "site": site,
        "tokens": json.dumps(selected.prompt.tokens, ensure_ascii=False),
    }
    if selected.plan is not None:
        metadata["fingerprint"] = selected.plan.fingerprint
    entries: dict[str, object] = {"__metadata__": metadata}
    end = 8 * rows
    entries["positions"] = {"dtype": "I64", "shape": [rows], "data_offsets": [0, end]}
    for point in selected.points:
        start, end = end, end + 4 * rows * width
        entries[f"layers.{point.layer}"] = {
            "dtype": "F32",
            "shape": [rows, width],
            "data_offsets": [start, end],
        }
    header = json.dumps(entries, ensure_ascii=False).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header


def _pieces(engine: Engine, head: bytes, selected: StateSelection) -> Iterator[bytes]:
    """As many layers in one pass as may be held, or a part of one layer's positions."""
    points, positions = selected.points, selected.positions
    rows = max(1, PIECE_NUMBERS // engine.info.width(points[0].site))
    together = max(1, rows // len(positions))
    for first in range(0, len(points), together):
        read = points[first : first + together]
        for start in range(0, len(positions), rows):
            capture = CaptureRequest(
                [selected.prompt.ids],
                points=read,
                positions=positions[start : start + rows],
                plans=[selected.plan],
                roles=[roles_for(selected.plan, selected.prompt)],
            )
            states = engine.capture(capture)[0].states
            for point in read:
                yield head + states[point].numpy().astype("<f4", copy=False).tobytes()
                head = b""
