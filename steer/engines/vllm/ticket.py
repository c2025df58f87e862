"""What one request carries through vLLM: which plan steers it, and which of its tokens.

A ticket rides in `SamplingParams.extra_args["steer"]` as a JSON string (vLLM's HTTP field
`vllm_xargs` holds flat values only). The front end makes it, the engine core forks the keys of
cached blocks by it, every worker finds the plan by it. The plan itself lies in the plan store and
is named by its hash, so that a request costs some hundred bytes however large its vectors are.

All requests of one plan say the same of it, in a text inside the ticket's own: so that part is
written once and read once in a process, and each whole ticket is read once in a process, whoever
asks for it there.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from steer.batch.tables import MAX_RULES
from steer.errors import SpecError, SteerError
from steer.model import HookPoint
from steer.plan.file import selection_from_json, selection_to_json
from steer.plan.selection import Selection

EXTRA_ARG = "steer"
_VERSION = 3
_PLANS, _TICKETS = 1024, 256
"""How many plans' parts, and whole tickets, a process remembers."""
_SHORT = 16_384
"""Characters of the longest ticket that is remembered."""
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
    only read. `rows` is the number of edit rows that the plan takes in the tables, `latents` how
    many numbers kernels hold of a token for it (`SteeringPlan.latents`); a plan that is `graphless`
    does what no kernel does. `selections` has one entry per rule of the plan. With
    `measure` the sizes of edits are measured; with `attached` the receipt comes on the engine's
    last output where it can (`core/attached.py`).
    """

    key: str
    n: int = 1
    fingerprint: str = ""
    plan: str | None = None
    rows: int = 0
    selections: tuple[Selection, ...] = ()
    measure: bool = False
    attached: bool = False
    latents: int = 0
    graphless: bool = False
    capture: CaptureOrder | None = field(default=None, compare=False)

    def as_extra_args(self) -> dict[str, str]:
        """The entry of `SamplingParams.extra_args`, or of `vllm_xargs`."""
        content: dict[str, Any] = {"v": _VERSION, "key": self.key, "n": self.n}
        if self.plan is not None:
            steering = _Steering(
                self.fingerprint,
                self.plan,
                self.rows,
                self.selections,
                self.latents,
                self.graphless,
            )
            content |= {"steering": _written(steering), "measure": self.measure}
            content |= {"attached": True} if self.attached else {}
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
            return (_read if len(text) <= _SHORT else _read.__wrapped__)(text)
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

    @cached_property
    def reads_tokens(self) -> bool:
        """Whether which tokens it selects depends on their ids."""
        return any(selection.reads_tokens for selection in self.selections)


class _Steering(NamedTuple):
    """What a ticket says of its plan, in the words of `Ticket`."""

    fingerprint: str = ""
    plan: str | None = None
    rows: int = 0
    selections: tuple[Selection, ...] = ()
    latents: int = 0
    graphless: bool = False


@lru_cache(_PLANS)
def _written(steering: _Steering) -> str:
    content = steering._asdict() | {
        "selections": [selection_to_json(one) for one in steering.selections]
    }
    return json.dumps(content, separators=(",", ":"), sort_keys=True)


@lru_cache(_PLANS)
def _steering(text: str) -> _Steering:
    content: Mapping[str, Any] = json.loads(text)
    plan = content.get("plan")
    if plan is not None and not _SHA256.fullmatch(plan):
        raise ValueError(f"plan {plan!r}")
    selections = tuple(selection_from_json(one) for one in content.get("selections", ()))
    if len(selections) > MAX_RULES:
        raise ValueError(f"{len(selections)} rules")
    fingerprint, rows = content.get("fingerprint", ""), content.get("rows", 0)
    latents, graphless = int(content.get("latents", 0)), bool(content.get("graphless", False))
    return _Steering(str(fingerprint), plan, int(rows), selections, latents, graphless)


@lru_cache(_TICKETS)
def _read(text: str) -> Ticket:
    content: Mapping[str, Any] = json.loads(text)
    if content["v"] != _VERSION:
        raise ValueError(f"version {content['v']!r}")
    order = content.get("capture")
    capture = None
    if order is not None:
        points = tuple(HookPoint(int(layer), site) for layer, site in order["points"])
        capture = CaptureOrder(points, tuple(int(position) for position in order["positions"]))
    steering = _steering(content["steering"]) if "steering" in content else _Steering()
    return Ticket(
        str(content["key"]),
        int(content["n"]),
        **steering._asdict(),
        measure=bool(content.get("measure", False)),
        attached=bool(content.get("attached", False)),
        capture=capture,
    )
