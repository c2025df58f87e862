"""Keys of cached blocks: states that steering shaped are shared only where it was the same.

vLLM names a full block by its tokens, its parent's name and extra keys. Steer adds one extra key
to every block that ends after the first steered position of a request:

    ("steer", "<fingerprint>:<digest of the plan's hash and of the pattern>")

The pattern is which rules select each token of the block, and how much of their edits ramps leave
it. It belongs in the key, because a
fingerprint does not say where it acts. Take a spec that steers the prompt only: request A has the
prompt X and generates Y; request B has the prompt X + Y. The tokens and the fingerprint are equal,
and Y is plain in A and steered in B. Names are chained, so a block's name covers the pattern from
the first steered position on. Where a prompt-scope gate has a say, the prompt's length is in the
key as well: it is where the gate was decided. The plan's hash is in the digest, because a ticket's
fingerprint is a claim, and the plan is what runs: a ticket made by hand cannot put its states
under another plan's name.

What follows from an onward gate cannot be named: whether it had opened by the end of a block
depends on states. So from the first token that such a gate reads, a request's blocks carry a key of
the request's own. It finds them again itself, after a preemption; nobody else does. The same holds
of gates that pool the scores of several tokens: who took another's block would have to know the
scores in it. Those of the prompt's scope read its last tokens, whatever their rules select.

Blocks before the first steered token carry no key and are shared with everybody. What a request
leaves behind (`key`, `measure`) is no part of the key, nor is an order to capture.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache, wraps
from typing import Any
from uuid import uuid4

import numpy as np
from numpy.typing import NDArray

from steer.engines.vllm.internals import CACHE_KEYS
from steer.engines.vllm.options import registry_location
from steer.engines.vllm.seams import check, version
from steer.engines.vllm.ticket import Ticket
from steer.errors import EngineError
from steer.plan.file import load_selections
from steer.plan.selection import EVERYWHERE, Selection, factors_of, rules_selecting, trace_of
from steer.plan.texts.trace import TokenTrace
from steer.registry.blobs.plan_store import PlanStore

ExtraKeys = tuple[Any, ...] | None

_NAME = "generate_block_hash_extra_keys"
_ORIGINAL = "steer_original"
_MEMO = "_steer_footprint"
_REMEMBERED = 256
"""Plans whose texts a process remembers."""


@dataclass
class Footprint:
    """How far a request's tokens were looked at, and where steering first showed.

    `first` is the first steered position, `first_gated` the first that a prompt-scope gate has a
    say in, `first_own` the first from which on blocks are the request's own; None as long as none
    was met below `scanned`. `own` is what no other request has.

    `gated` are the rules with a prompt-scope gate, and `keeps` those with any other that remembers
    the tokens which it has read, as bits; `pooled` is how many of a prompt's last tokens a
    prompt-scope gate reads, 0 where it is one.
    """

    ticket: Ticket
    gated: int
    keeps: int = 0
    pooled: int = 0
    selections: tuple[Selection, ...] = ()
    trace: TokenTrace | None = None
    scanned: int = 0
    first: int | None = None
    first_gated: int | None = None
    first_own: int | None = None
    own: str = field(default_factory=lambda: uuid4().hex)

    @staticmethod
    def of(ticket: Ticket) -> Footprint:
        gated = sum(
            1 << number
            for number, selection in enumerate(ticket.selections)
            if _gated_by_prompt(selection)
        )
        lasts = enumerate(ticket.pooled)
        pools = {number: last for number, last in lasts if last > 1}
        return Footprint(
            ticket,
            gated,
            ticket.onward | sum(1 << number for number in pools if not gated >> number & 1),
            max((last for number, last in pools.items() if gated >> number & 1), default=0),
            _selections(ticket),
        )

    def scan(self, request: Any, end: int) -> None:
        """Looks at the tokens up to `end`; each is looked at once, in the order they are known."""
        if end <= self.scanned:
            return
        start, self.scanned = self.scanned, end
        if start == 0:
            prompt = request.all_token_ids[: request.num_prompt_tokens]
            self.trace = trace_of(self.selections, prompt, self.ticket.roles)
        if self.trace is not None:
            self.trace.read(start, _ids(request, start, end))
        bits = self._selected(request, start, end)
        if self.first is None:
            self.first = _first(bits != 0, start)
        if self.first_gated is None and self.gated:
            self.first_gated = _first((bits & self.gated) != 0, start)
        if self.first_own is None and (self.keeps or self.pooled):
            positions = np.arange(start, end)
            left = request.num_prompt_tokens - positions
            pooled = (left > 0) & (left <= self.pooled)
            self.first_own = _first(((bits & self.keeps) != 0) | pooled, start)

    def key(self, request: Any, start: int, end: int) -> tuple[str, str] | None:
        """The extra key of the block of positions `start` to `end`; None before any steering, and
        before whatever a gate has to know of the request's own tokens."""
        if self.ticket.plan is None:
            return None
        self.scan(request, end)
        if not any(first is not None and first < end for first in (self.first, self.first_own)):
            return None
        bits = self._selected(request, start, end)
        pattern = bits.tobytes() + self._factors(request, start, bits)
        digest = hashlib.sha256(self.ticket.plan.encode() + pattern).hexdigest()
        text = f"{self.ticket.fingerprint}:{digest}"
        if self.first_gated is not None and self.first_gated < end:
            text += f"@{request.num_prompt_tokens}"
        if self.first_own is not None and self.first_own < end:
            text += f"@{self.own}"
        return ("steer", text)

    def _selected(self, request: Any, start: int, end: int) -> NDArray[np.uint8]:
        """Which rules select each of the positions `start` to `end`, as bits `[end - start]`."""
        positions = np.arange(start, end, dtype=np.int64)
        ids, length = _ids(request, start, end), request.num_prompt_tokens
        return rules_selecting(self.selections, positions, length, ids, self.trace)

    def _factors(self, request: Any, start: int, bits: NDArray[np.uint8]) -> bytes:
        """The factors of the rules that select each of the tokens from `start` on, as `bits` say;
        nothing without ramps."""
        positions = np.arange(start, start + len(bits), dtype=np.int64)
        factors = factors_of(self.selections, positions, request.num_prompt_tokens)
        if factors is None:
            return b""
        selected = bits >> np.arange(len(factors), dtype=np.uint8)[:, None] & 1
        return np.where(selected, factors, np.float32(0)).tobytes()


def ticket_of(request: Any) -> Ticket | None:
    """The ticket of one of vLLM's requests, parsed once; raises `SpecError` for a bad one."""
    footprint = _footprint(request)
    return None if footprint is None else footprint.ticket


def fork_block_keys() -> None:
    """Puts Steer's key into the names of cached blocks, in this process.

    Does nothing the second time, except for modules imported in between. Raises `Unsupported` for
    a version of vLLM that makes its keys otherwise.
    """
    from vllm.v1.core import kv_cache_utils  # noqa: PLC0415

    forked = vars(kv_cache_utils).get(_NAME)
    if not hasattr(forked, _ORIGINAL):
        check(*CACHE_KEYS)
        forked = _forked(vars(kv_cache_utils)[_NAME])
        setattr(kv_cache_utils, _NAME, forked)
    original = getattr(forked, _ORIGINAL)
    # Modules that import the name later get the fork; these have the original already.
    for module in _holders():
        if vars(module)[_NAME] is original:
            setattr(module, _NAME, forked)


def assert_forked() -> None:
    """Raises `EngineError` where a block of a steered request would go without Steer's key.

    Asks every module that makes keys for the key of a steered block, and for a plain one.
    """
    from vllm import SamplingParams  # noqa: PLC0415
    from vllm.v1.core import kv_cache_utils  # noqa: PLC0415
    from vllm.v1.request import Request  # noqa: PLC0415

    def request(ticket: Ticket | None) -> Any:
        extra = None if ticket is None else ticket.as_extra_args()
        return Request("steer", [0, 0], SamplingParams(max_tokens=1, extra_args=extra), None)

    ticket = Ticket("proof", fingerprint="proof", plan="0" * 64, selections=(EVERYWHERE,))
    expected = Footprint.of(ticket).key(request(ticket), 0, 2)
    for module in {kv_cache_utils, *_holders()}:
        make = vars(module)[_NAME]
        steered, _ = make(request(ticket), 0, 2, 0)
        plain, _ = make(request(None), 0, 2, 0)
        if expected not in (steered or ()) or plain is not None:
            raise EngineError(
                f"cached blocks of steered requests would be shared with plain ones: "
                f"{module.__name__}.{_NAME} of vLLM {version()} does not carry Steer's key. "
                "Steer's plugin must be loaded in this process (see VLLM_PLUGINS), and no other "
                "plugin may replace this function",
                code="cache_not_forked",
            )


def _holders() -> list[Any]:
    """Every module that has the name: those that make keys import it by name."""
    modules = list(sys.modules.values())
    return [one for one in modules if _NAME in getattr(one, "__dict__", {})]


def _forked(original: Callable[..., tuple[ExtraKeys, int]]) -> Callable[..., Any]:
    @wraps(original)
    def generate_block_hash_extra_keys(
        request: Any, start_token_idx: int, end_token_idx: int, start_mm_idx: int
    ) -> tuple[ExtraKeys, int]:
        keys, mm_idx = original(request, start_token_idx, end_token_idx, start_mm_idx)
        footprint = _footprint(request)
        if footprint is not None:
            key = footprint.key(request, start_token_idx, end_token_idx)
            if key is not None:
                keys = (*(keys or ()), key)
        return keys, mm_idx

    setattr(generate_block_hash_extra_keys, _ORIGINAL, original)
    return generate_block_hash_extra_keys


def _footprint(request: Any) -> Footprint | None:
    memo = vars(request).get(_MEMO, request)  # the request itself stands for "not parsed yet"
    if memo is request:
        params = request.sampling_params
        ticket = None if params is None else Ticket.of(params.extra_args)
        memo = None if ticket is None else Footprint.of(ticket)
        setattr(request, _MEMO, memo)
    return memo if isinstance(memo, Footprint) else None


def _selections(ticket: Ticket) -> tuple[Selection, ...]:
    """The ticket's selections, which can read tokens where they look for texts."""
    if not ticket.reads_texts or ticket.plan is None:
        return ticket.selections
    return _of_plan(ticket.plan)


@lru_cache(_REMEMBERED)
def _of_plan(plan: str) -> tuple[Selection, ...]:
    return load_selections(PlanStore(registry_location()).get(plan))


def _ids(request: Any, start: int, end: int) -> NDArray[np.int64]:
    return np.asarray(request.all_token_ids[start:end], dtype=np.int64)


def _gated_by_prompt(selection: Selection) -> bool:
    excluded = selection.excluded
    return selection.from_last_prompt_token or (excluded is not None and _gated_by_prompt(excluded))


def _first(chosen: Any, start: int) -> int | None:
    hits = np.flatnonzero(chosen)
    return start + int(hits[0]) if len(hits) else None
