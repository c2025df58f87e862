"""What one request carries through vLLM: which plan steers it, and which of its tokens.

A ticket rides in `SamplingParams.extra_args["steer"]` as a JSON string (vLLM's HTTP field
`vllm_xargs` holds flat values only). The front end makes it, the engine core forks the keys of
cached blocks by it, every worker finds the plan by it. The plan itself lies in the plan store and
is named by its hash, so that a request costs some hundred bytes however large its vectors are.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from steer.errors import SpecError, SteerError
from steer.model import HookPoint
from steer.plan.file import selection_from_json, selection_to_json
from steer.plan.selection import Selection

EXTRA_ARG = "steer"
_VERSION = 1
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class CaptureOrder:
    """States to keep while a prompt is computed: hook points, and absolute positions in it."""

    points: tuple[HookPoint, ...]
    positions: tuple[int, ...]


@dataclass(frozen=True)
class Ticket:
    """How one request is steered and read.

    `key` names what the request leaves behind (receipt, captured states); `n` is the number of
    choices that share it. `plan` is the plan's hash in the plan store, None where the request is
    only read. `rows` is the number of edit rows that the plan takes in the tables, `competes` what
    the plan says of itself. `selections` has one entry per rule of the plan.
    """

    key: str
    n: int = 1
    fingerprint: str = ""
    plan: str | None = None
    rows: int = 0
    selections: tuple[Selection, ...] = ()
    measure: bool = False
    competes: bool = False
    capture: CaptureOrder | None = field(default=None, compare=False)

    def as_extra_args(self) -> dict[str, str]:
        """The entry of `SamplingParams.extra_args`, or of `vllm_xargs`."""
        content: dict[str, Any] = {"v": _VERSION, "key": self.key, "n": self.n}
        if self.plan is not None:
            content |= {
                "fingerprint": self.fingerprint,
                "plan": self.plan,
                "rows": self.rows,
                "selections": [selection_to_json(one) for one in self.selections],
                "measure": self.measure,
                "competes": self.competes,
            }
        if self.capture is not None:
            content["capture"] = {
                "points": [[point.layer, point.site] for point in self.capture.points],
                "positions": list(self.capture.positions),
            }
        return {EXTRA_ARG: json.dumps(content, separators=(",", ":"), sort_keys=True)}

    @staticmethod
    def of(extra_args: Mapping[str, Any] | None) -> Ticket | None:
        """The ticket in `extra_args`; None where there is none. Raises `SpecError` for a bad one.

        Only front ends with Steer make tickets; a client that writes one by hand is refused here.
        """
        text = None if extra_args is None else extra_args.get(EXTRA_ARG)
        if text is None:
            return None
        try:
            return _read(json.loads(text))
        except (SteerError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise SpecError(
                f"extra_args[{EXTRA_ARG!r}] is not a ticket of this version of Steer ({error}): "
                "send the spec in the field 'steering' instead",
                code="invalid_ticket",
            ) from error

    def selected(
        self, positions: NDArray[np.int64], prompt_length: int, tokens: NDArray[np.int64]
    ) -> NDArray[np.uint8]:
        """Which rules select each token, as bits `[T]`: rule n is bit n."""
        bits = np.zeros(len(positions), dtype=np.uint8)
        for number, selection in enumerate(self.selections):
            chosen = selection.mask(positions, prompt_length, tokens)
            bits |= chosen.astype(np.uint8) << np.uint8(number)
        return bits

    @property
    def graphless(self) -> bool:
        """Whether steps with this request run without their CUDA graph: it takes states out of the
        pass, or chooses among all latents of an SAE. Every worker must say the same of a step,
        so that it depends on nothing but the ticket."""
        return self.competes or self.capture is not None

    @property
    def reads_tokens(self) -> bool:
        return any(selection.reads_tokens for selection in self.selections)


def _read(content: Mapping[str, Any]) -> Ticket:
    if content["v"] != _VERSION:
        raise ValueError(f"version {content['v']!r}")
    plan = content.get("plan")
    if plan is not None and not _SHA256.fullmatch(plan):
        raise ValueError(f"plan {plan!r}")
    order = content.get("capture")
    capture = None
    if order is not None:
        points = tuple(HookPoint(int(layer), site) for layer, site in order["points"])
        capture = CaptureOrder(points, tuple(int(position) for position in order["positions"]))
    selections = tuple(selection_from_json(one) for one in content.get("selections", ()))
    if len(selections) > 8:
        raise ValueError(f"{len(selections)} rules")
    return Ticket(
        key=str(content["key"]),
        n=int(content["n"]),
        fingerprint=str(content.get("fingerprint", "")),
        plan=plan,
        rows=int(content.get("rows", 0)),
        selections=selections,
        measure=bool(content.get("measure", False)),
        competes=bool(content.get("competes", False)),
        capture=capture,
    )
