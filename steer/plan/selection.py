"""Which tokens an intervention touches: `Where`, resolved against a model, as masks.

A token is prompt or generation by its absolute position against the prompt's length, and by
nothing else. Chunked prefill, preemption and prefix caching change when a token is computed,
never what it is; so every mask here is a function of (position, prompt length, token id), and where
texts or roles are asked for also of the tokens before it and of the prompt's messages, which a
`TokenTrace` knows. How much of an edit a token gets (`Ramp`) is a function of the first two.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from steer.errors import SpecError, Unsupported, pointer
from steer.plan.texts.automaton import TokenAutomaton, compile_automaton
from steer.plan.texts.condition import RELATIONS, TextCondition, TextRelation
from steer.plan.texts.trace import TokenTrace
from steer.prompts.roles import RoleRanges
from steer.spec import Mark, Phase, RampPoints, Role, Schedule, Where

Mask = NDArray[np.bool_]
Ints = NDArray[np.int64]
Factors = NDArray[np.float32]


@dataclass(frozen=True)
class Counted:
    """A `Schedule`; it counts from the position `origin`, or else from the prompt's end."""

    nth: int = 1
    first: int | None = None
    origin: int | None = None

    def mask(self, positions: Ints, prompt_length: int) -> Mask:
        number = positions - (prompt_length if self.origin is None else self.origin)
        chosen: Mask = (number >= 0) & (number % self.nth == 0)
        return chosen if self.first is None else chosen & (number < self.first)


@dataclass(frozen=True)
class Ramp:
    """How much of an edit a token gets: `points` joined by straight lines, constant before the
    first and after the last.

    It counts from the position `origin`, or else from the prompt's end. Factors are within 0 and 1.
    """

    points: RampPoints
    origin: int | None = None

    @staticmethod
    def of(points: RampPoints | None) -> Ramp | None:
        """The ramp through `points`; None where it leaves every edit as it is."""
        if points is None or all(factor == 1 for _, factor in points):
            return None
        return Ramp(points)

    def factors(self, positions: Ints, prompt_length: int) -> Factors:
        """The factor of each token `[T]`, float32."""
        tokens, factors = self._columns
        number = positions - (prompt_length if self.origin is None else self.origin)
        return np.interp(number, tokens, factors).astype(np.float32)

    @property
    def largest(self) -> float:
        """The largest factor that a token may get."""
        return max(factor for _, factor in self.points)

    def fixed_from(self, prompt_length: int) -> int:
        """The position from which on the factor stays as it is."""
        return self.points[-1][0] + (prompt_length if self.origin is None else self.origin)

    @cached_property
    def _columns(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        tokens, factors = zip(*self.points, strict=True)
        return np.array(tokens, dtype=np.float64), np.array(factors, dtype=np.float64)


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
        """The position from which on the mask depends on the tokens alone, unless it `varies`, and
        no factor changes."""
        bounds = [prompt_length]
        if self.ramp is not None:
            bounds.append(self.ramp.fixed_from(prompt_length))
        for selection in self._parts:
            if selection.counted is not None:
                origin, first = selection.counted.origin, selection.counted.first
                bounds.append((prompt_length if origin is None else origin) + (first or 0))
            for start, end in selection.ranges or ():
                bounds.append(_absolute(start, prompt_length))
                bounds.append(prompt_length if end is None else _absolute(end, prompt_length))
        return max(bounds)

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


_FEW_TOKENS = 8
EVERYWHERE = Selection()


@dataclass(frozen=True)
class TokenReader:
    """What turns a `Where` into a selection: how the model reads a text (`tokenize`), the bytes
    that each of its tokens stands for (`vocabulary`), and the `roles` that are found in its
    chats."""

    tokenize: Callable[[str], list[int]] | None = None
    vocabulary: Callable[[], Sequence[bytes]] | None = None
    roles: Collection[Role] = ()


NO_READER = TokenReader()


def resolve(where: Where | None, reader: TokenReader = NO_READER, *, param: str = "") -> Selection:
    """`where` as a `Selection`; a token string must be exactly one token of the model.

    Raises `SpecError`, and `Unsupported` (`roles_unsupported`) for roles that are not found in the
    model's chats; `param` is the pointer of `where`.
    """
    if where is None:
        return EVERYWHERE
    tokens = None
    if where.tokens is not None:
        tokens = frozenset(
            token
            if isinstance(token, int)
            else _single_token(token, reader.tokenize, f"{param}/tokens/{i}")
            for i, token in enumerate(where.tokens)
        )
    if where.roles is not None:
        _check_roles(where.roles, reader.roles, param + "/roles")
    return Selection(
        phases=None if where.phases is None else frozenset(where.phases),
        ranges=where.positions,
        tokens=tokens,
        roles=None if where.roles is None else frozenset(where.roles),
        counted=None if where.every is None else _counted(where.every),
        texts=_texts(where, reader, param),
        excluded=None
        if where.except_ is None
        else resolve(where.except_, reader, param=f"{param}/except"),
    )


def _counted(schedule: Schedule) -> Counted:
    return Counted(1 if schedule.nth is None else schedule.nth, schedule.first)


def _check_roles(asked: Sequence[Role], known: Collection[Role], param: str) -> None:
    for place, role in enumerate(asked):
        if role not in known:
            found = f"it finds {', '.join(sorted(known))}" if known else "it finds none"
            raise Unsupported(
                f"this engine does not find messages of the role {role!r} in the model's chats "
                f"({found}): leave it out, or say the tokens by 'positions', 'between' or 'after'",
                param=param + pointer(place),
                code="roles_unsupported",
            )


def _texts(where: Where, reader: TokenReader, param: str) -> tuple[TextCondition, ...]:
    found = []
    for relation in RELATIONS:
        pairs = _pairs(where, relation)
        if not pairs:
            continue
        if reader.vocabulary is None:
            raise Unsupported(
                f"{relation!r} looks for texts among tokens, which nobody follows here: "
                "send the spec to an engine, or select by 'phases', 'positions' or 'tokens'",
                param=f"{param}/{relation}",
                code="texts_unsupported",
            )
        vocabulary = reader.vocabulary()
        automata = [compile_automaton(*pair, vocabulary) for pair in pairs]
        found.append(TextCondition(relation, tuple(automata)))
    return tuple(found)


def _pairs(where: Where, relation: TextRelation) -> Sequence[tuple[Mark, Mark | None]]:
    """The marks that one field of `where` looks for, each with its closing where it has one."""
    match relation:
        case "after":
            return [(mark, None) for mark in where.after or ()]
        case "before":
            return [(mark, None) for mark in where.before or ()]
        case "between":
            return where.between or ()
        case "outside":
            return where.outside or ()


def _single_token(text: str, tokenize: Callable[[str], list[int]] | None, param: str) -> int:
    if tokenize is None:
        raise SpecError(
            f"the token {text!r} is a string and there is no tokenizer here: give its id",
            param=param,
        )
    ids = tokenize(text)
    if len(ids) != 1:
        raise SpecError(
            f"{text!r} is {len(ids)} tokens ({ids}): a trigger is one token; give one of these "
            "ids, or a string that is a single token (a leading space counts)",
            param=param,
            code="not_one_token",
        )
    return ids[0]


def _among(tokens: Ints, chosen: frozenset[int]) -> Mask:
    """Which of `tokens` are in `chosen`; a decode step asks about a single one."""
    if len(tokens) <= _FEW_TOKENS:
        return np.array([token in chosen for token in tokens.tolist()], dtype=bool)
    return np.isin(tokens, list(chosen))


def _absolute(bound: int, prompt_length: int) -> int:
    return bound if bound >= 0 else max(prompt_length + bound, 0)
