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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

from steer.batch.tables import MAX_RULES
from steer.errors import SpecError, SteerError
from steer.model import HookPoint
from steer.plan.file import selection_from_json, selection_to_json
from steer.plan.selection import Selection
from steer.prompts.roles import RoleRanges
from steer.spec import ROLES

EXTRA_ARG = "steer"
_VERSION = 6
_PLANS, _TICKETS = 1024, 256
"""How many plans' parts, and whole tickets, a process remembers."""
_SHORT = 16_384
"""Characters of the longest ticket that is remembered."""
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class CaptureOrder:
    """States to keep while a prompt is computed: hook points, and absolute positions in it; and the
    layers whose `attention` is told, at the first `attended` of these positions."""

    points: tuple[HookPoint, ...]
    positions: tuple[int, ...]
    attention: tuple[int, ...] = ()
    attended: int = 0


@dataclass(frozen=True)
class ReadoutOrder:
    """What is read of the request's tokens while it runs: the hash of its `ReadoutPlan` in the plan
    store, and whether tokens of the prompt are read, which then must be computed. With `attached`
    the numbers come on the engine's own outputs (`core/attached_readouts.py`)."""

    plan: str
    prompt: bool
    attached: bool = False


@dataclass(frozen=True)
class Ticket:
    """How one request is steered and read.

    `key` names what the request leaves behind (receipt, captured states); `n` is the number of
    choices that share it. `plan` is the plan's hash in the plan store, None where the request is
    only read. `rows` is the number of edit rows that the plan takes in the tables, `latents` how
    many numbers kernels hold of a token for it (`SteeringPlan.latents`); a plan that is `graphless`
    does what no kernel does. `onward` are the rules, as bits, whose gate stays open from the token
    that opens it, and `pooled` says how many tokens each rule's gate takes together
    (`SteeringPlan.pooled`). `selections` has one entry per rule of the plan. With
    `measure` the sizes of edits are measured; with `attached` the receipt comes on the engine's
    last output where it can (`core/attached.py`). `roles` say whose words the prompt is, where the
    plan asks. Texts in `selections` are only named: what they do to tokens stands in the plan.
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
    roles: RoleRanges | None = None
    graphless: bool = False
    onward: int = 0
    pooled: tuple[int, ...] = ()
    capture: CaptureOrder | None = field(default=None, compare=False)
    readouts: ReadoutOrder | None = field(default=None, compare=False)

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
                self.onward,
                self.pooled,
            )
            content |= {"steering": _written(steering), "measure": self.measure}
            content |= {"attached": True} if self.attached else {}
            if self.roles is not None:
                content["roles"] = [self.roles.length, self.roles.ranges]
        if self.capture is not None:
            content["capture"] = {
                "points": [[point.layer, point.site] for point in self.capture.points],
                "positions": list(self.capture.positions),
            }
            if self.capture.attention:
                content["capture"] |= {
                    "attention": list(self.capture.attention),
                    "attended": self.capture.attended,
                }
        if self.readouts is not None:
            order = self.readouts
            content["readouts"] = [order.plan, order.prompt, order.attached]
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

    @property
    def computes_prompt(self) -> bool:
        """Whether every token of the prompt must be computed: states that come from the prefix
        cache are never seen."""
        return self.capture is not None or (self.readouts is not None and self.readouts.prompt)

    @property
    def brings_readouts(self) -> bool:
        """Whether what is read comes on the engine's own outputs; choices that share a ticket are
        asked for."""
        return self.readouts is not None and self.readouts.attached and self.n == 1

    @cached_property
    def reads_tokens(self) -> bool:
        """Whether which tokens it selects depends on their ids."""
        return any(selection.reads_tokens for selection in self.selections)

    @cached_property
    def reads_texts(self) -> bool:
        """Whether it depends on texts, so that the plan is needed to say which."""
        return any(selection.automata for selection in self.selections)

    @cached_property
    def reads_roles(self) -> bool:
        """Whether it depends on whose words tokens are."""
        return any(selection.reads_roles for selection in self.selections)


class _Steering(NamedTuple):
    """What a ticket says of its plan, in the words of `Ticket`."""

    fingerprint: str = ""
    plan: str | None = None
    rows: int = 0
    selections: tuple[Selection, ...] = ()
    latents: int = 0
    graphless: bool = False
    onward: int = 0
    pooled: tuple[int, ...] = ()


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
    onward = int(content.get("onward", 0))
    pooled = tuple(int(last) for last in content.get("pooled", ()))
    return _Steering(
        str(fingerprint), plan, int(rows), selections, latents, graphless, onward, pooled
    )


def _roles(length: int, spans: Sequence[Sequence[Any]]) -> RoleRanges:
    found = tuple((int(start), int(end), role) for start, end, role in spans)
    for start, end, role in found:
        if not 0 <= start < end <= length or role not in ROLES:
            raise ValueError(f"roles {(start, end, role)!r} of {length} tokens")
    return RoleRanges(int(length), found)


@lru_cache(_TICKETS)
def _read(text: str) -> Ticket:
    content: Mapping[str, Any] = json.loads(text)
    if content["v"] != _VERSION:
        raise ValueError(f"version {content['v']!r}")
    order = content.get("capture")
    capture = None
    if order is not None:
        points = tuple(HookPoint(int(layer), site) for layer, site in order["points"])
        positions, layers = order["positions"], order.get("attention", ())
        capture = CaptureOrder(
            points,
            tuple(int(position) for position in positions),
            tuple(int(layer) for layer in layers),
            int(order.get("attended", 0)),
        )
    readouts = None
    if "readouts" in content:
        sha256, prompt, attached = content["readouts"]
        if not _SHA256.fullmatch(sha256):
            raise ValueError(f"read-outs {sha256!r}")
        readouts = ReadoutOrder(sha256, bool(prompt), bool(attached))
    steering = _steering(content["steering"]) if "steering" in content else _Steering()
    roles = content.get("roles")
    return Ticket(
        str(content["key"]),
        int(content["n"]),
        **steering._asdict(),
        measure=bool(content.get("measure", False)),
        attached=bool(content.get("attached", False)),
        roles=None if roles is None else _roles(*roles),
        capture=capture,
        readouts=readouts,
    )
