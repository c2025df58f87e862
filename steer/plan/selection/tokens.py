"""Which tokens of a sequence are selected: masks of positions, and of what is known of tokens."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from steer.plan.selection.counting import Counted, Factors, Ints, Mask, Ramp
from steer.plan.texts.automaton import TokenAutomaton
from steer.plan.texts.condition import TextCondition
from steer.plan.texts.trace import TokenTrace
from steer.prompts.roles import RoleRanges
from steer.spec import Phase, Role

_FEW_TOKENS = 8
FOREVER = 1 << 62
"""A position that no sequence comes to."""


@dataclass(frozen=True)
class Selection:
    """A `Where` with its token strings turned into ids, and its texts into automata.

    `from_last_prompt_token` is set by prompt-scope gates, which are decided there. Of a token that
    is selected, a `ramp` says how much of the edit it gets; one that would get nothing of it is not
    selected.
    """

    phases: frozenset[Phase] | None = None
    ranges: tuple[tuple[int, int | None], ...] | None = None
    tokens: frozenset[int] | None = None
    excluded: Selection | None = None
    from_last_prompt_token: bool = False
    roles: frozenset[Role] | None = None
    counted: Counted | None = None
    texts: tuple[TextCondition, ...] = ()
    ramp: Ramp | None = None

    def mask(
        self, positions: Ints, prompt_length: int, tokens: Ints, trace: TokenTrace | None = None
    ) -> Mask:
        """True for each token `[T]` that is selected; `trace` has read them where one is needed."""
        chosen: Mask = np.ones(len(positions), dtype=bool)
        if self.phases is not None and len(self.phases) == 1:
            generated = positions >= prompt_length
            chosen &= generated if "generation" in self.phases else ~generated
        if self.ranges is not None:
            chosen &= self._in_ranges(positions, prompt_length)
        if self.tokens is not None:
            chosen &= _among(tokens, self.tokens)
        if self.counted is not None:
            chosen &= self.counted.mask(positions, prompt_length)
        if self.roles is not None or self.texts:
            assert trace is not None, "texts and roles are known to a trace alone"
            if self.roles is not None:
                chosen &= trace.in_roles(self.roles, positions)
            for condition in self.texts:
                chosen &= condition.mask(trace, positions)
        if self.excluded is not None:
            chosen &= ~self.excluded.mask(positions, prompt_length, tokens, trace)
        if self.from_last_prompt_token:
            chosen &= positions >= prompt_length - 1
        if self.ramp is not None:
            chosen &= self.ramp.factors(positions, prompt_length) > 0
        return chosen

    def anchored(self, prompt_length: int) -> Selection:
        """The selection whose mask over any longer prompt is that of this one over a prompt of
        `prompt_length`: a generated sequence can then be read as one prompt."""
        start, end = 0, None
        if self.phases is not None and len(self.phases) == 1:
            generation = "generation" in self.phases
            start, end = (prompt_length, None) if generation else (0, prompt_length)
        if self.from_last_prompt_token:
            start = max(start, prompt_length - 1)
        ranges = []
        for first, last in self.ranges if self.ranges is not None else ((0, None),):
            low = max(start, _absolute(first, prompt_length))
            bounds = (end, None if last is None else _absolute(last, prompt_length))
            high = min((bound for bound in bounds if bound is not None), default=None)
            if high is None or low < high:
                ranges.append((low, high))
        counted = self.counted
        if counted is not None and counted.origin is None:
            counted = replace(counted, origin=prompt_length)
        ramp = self.ramp
        if ramp is not None and ramp.origin is None:
            ramp = replace(ramp, origin=prompt_length)
        return Selection(
            ranges=tuple(ranges),
            tokens=self.tokens,
            roles=self.roles,
            counted=counted,
            texts=self.texts,
            excluded=None if self.excluded is None else self.excluded.anchored(prompt_length),
            ramp=ramp,
        )

    def positions(
        self,
        tokens: Sequence[int],
        prompt_length: int | None = None,
        roles: RoleRanges | None = None,
    ) -> tuple[int, ...]:
        """Where in a whole sequence the selected tokens stand; its prompt are the first
        `prompt_length` tokens (None: all). `roles` are those of all of it, and must be known where
        the selection reads them."""
        length = len(tokens) if prompt_length is None else prompt_length
        ids = np.asarray(tokens, dtype=np.int64)
        trace = trace_of([self], ids, roles)
        mask = self.mask(np.arange(len(ids)), length, ids, trace)
        return tuple(np.flatnonzero(mask).tolist())

    def _in_ranges(self, positions: Ints, prompt_length: int) -> Mask:
        chosen: Mask = np.zeros(len(positions), dtype=bool)
        for start, end in self.ranges or ():
            inside = positions >= _absolute(start, prompt_length)
            if end is not None:
                inside &= positions < _absolute(end, prompt_length)
            chosen |= inside
        return chosen

    @property
    def reads_tokens(self) -> bool:
        """Whether the mask depends on token ids, and so cannot be known in advance."""
        return any(one.tokens is not None or one.texts for one in self._parts)

    @property
    def reads_roles(self) -> bool:
        """Whether the mask depends on whose message a token stands in."""
        return any(one.roles is not None for one in self._parts)

    @property
    def automata(self) -> tuple[TokenAutomaton, ...]:
        """What reads the request's tokens for this selection."""
        texts = (text for one in self._parts for text in one.texts)
        return tuple(automaton for text in texts for automaton in text.automata)

    @property
    def varies(self) -> bool:
        """Whether a token's id does not say, however late it comes, whether it is selected: that
        depends on the tokens before it, or on its number."""
        counts = any(one.counted is not None and one.counted.nth > 1 for one in self._parts)
        return counts or bool(self.automata)

    @property
    def _parts(self) -> tuple[Selection, ...]:
        return (self,) if self.excluded is None else (self, self.excluded)

    @property
    def reads_prompt(self) -> bool:
        """Whether the mask, or the ramp, depends on where the prompt ends."""
        return (
            (self.phases is not None and len(self.phases) == 1)
            or (self.counted is not None and self.counted.origin is None)
            or (self.ramp is not None and self.ramp.origin is None)
            or any(bound is not None and bound < 0 for one in self.ranges or () for bound in one)
            or self.from_last_prompt_token
            or (self.excluded is not None and self.excluded.reads_prompt)
        )

    def fixed_from(self, prompt_length: int) -> int:
        """The position from which on the mask depends on the tokens alone, unless it `varies`."""
        return max(self._edges(prompt_length))

    def fixed_until(self, position: int, prompt_length: int) -> int:
        """The position up to which the mask depends on the tokens alone, from `position` on, unless
        it `varies`; `FOREVER` where it always will."""
        later = (edge for edge in self._edges(prompt_length) if edge > position)
        return min(later, default=FOREVER)

    def _edges(self, prompt_length: int) -> list[int]:
        """The positions at which the mask may begin to say something else of the same token."""
        found = [prompt_length]
        if self.ramp is not None:
            found += self.ramp.edges(prompt_length)
        for selection in self._parts:
            if selection.counted is not None:
                found += selection.counted.edges(prompt_length)
            if selection.from_last_prompt_token:
                found.append(prompt_length - 1)
            for bounds in selection.ranges or ():
                found += [_absolute(one, prompt_length) for one in bounds if one is not None]
        return found

    def first(
        self, prompt: Sequence[int], horizon: int, roles: RoleRanges | None = None
    ) -> int | None:
        """The first position before `horizon` that is, or (for token triggers, texts, and roles
        that are not known) may be, selected."""
        if self.reads_roles and roles is None:
            return 0
        length = max(horizon, len(prompt))
        ids = np.full(length, -1, dtype=np.int64)
        ids[: len(prompt)] = prompt
        positions = np.arange(length, dtype=np.int64)
        trace = trace_of([self], prompt, roles)
        if trace is not None:
            trace.read(len(prompt), ids[len(prompt) :])
        hits = np.flatnonzero(self.mask(positions, len(prompt), ids, trace))
        first = int(hits[0]) if len(hits) else None
        if self.reads_tokens and (first is None or first > len(prompt)):
            return len(prompt)
        return first


def trace_of(
    selections: Iterable[Selection],
    prompt: Sequence[int] | Ints,
    roles: RoleRanges | None = None,
) -> TokenTrace | None:
    """What `selections` need to know of a request with this prompt; None where they need
    nothing."""
    selections = tuple(selections)
    automata = [automaton for one in selections for automaton in one.automata]
    if not automata and not any(one.reads_roles for one in selections):
        return None
    return TokenTrace(automata, prompt, roles)


def rules_selecting(
    selections: Sequence[Selection],
    positions: Ints,
    prompt_length: int,
    tokens: Ints,
    trace: TokenTrace | None = None,
) -> NDArray[np.uint8]:
    """Which of the rules with these selections select each token, as bits `[T]`: rule n is bit
    n."""
    bits = np.zeros(len(positions), dtype=np.uint8)
    for number, selection in enumerate(selections):
        chosen = selection.mask(positions, prompt_length, tokens, trace)
        bits |= chosen.astype(np.uint8) << np.uint8(number)
    return bits


def fixed_until(selections: Iterable[Selection], position: int, prompt_length: int) -> int:
    """The position up to which the masks of `selections` depend on the tokens alone, from
    `position` on, unless one `varies`; `position` itself where it is the prompt's."""
    if position < prompt_length:
        return position
    each = (one.fixed_until(position, prompt_length) for one in selections)
    return min(each, default=FOREVER)


def factors_of(
    selections: Sequence[Selection], positions: Ints, prompt_length: int
) -> Factors | None:
    """The factor by which what each rule with these selections does to each token is multiplied,
    `[P, T]`; None where none has a ramp."""
    if all(one.ramp is None for one in selections):
        return None
    found = np.ones((len(selections), len(positions)), dtype=np.float32)
    for number, selection in enumerate(selections):
        if selection.ramp is not None:
            found[number] = selection.ramp.factors(positions, prompt_length)
    return found


def _among(tokens: Ints, chosen: frozenset[int]) -> Mask:
    """Which of `tokens` are in `chosen`; a decode step asks about a single one."""
    if len(tokens) <= _FEW_TOKENS:
        return np.array([token in chosen for token in tokens.tolist()], dtype=bool)
    return np.isin(tokens, list(chosen))


def _absolute(bound: int, prompt_length: int) -> int:
    return bound if bound >= 0 else max(prompt_length + bound, 0)


EVERYWHERE = Selection()
