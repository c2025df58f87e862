"""Which tokens an intervention touches: `Where`, resolved against a model, as masks.

A token is prompt or generation by its absolute position against the prompt's length, and by
nothing else. Chunked prefill, preemption and prefix caching change when a token is computed,
never what it is; so every mask here is a function of (position, prompt length, token id).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from steer.errors import SpecError
from steer.spec import Phase, Where

Mask = NDArray[np.bool_]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Selection:
    """A `Where` with its token strings turned into ids.

    `from_last_prompt_token` is set by prompt-scope gates, which are decided there.
    """

    phases: frozenset[Phase] | None = None
    ranges: tuple[tuple[int, int | None], ...] | None = None
    tokens: frozenset[int] | None = None
    excluded: Selection | None = None
    from_last_prompt_token: bool = False

    def mask(self, positions: Ints, prompt_length: int, tokens: Ints) -> Mask:
        """True for each token `[T]` that is selected."""
        chosen: Mask = np.ones(len(positions), dtype=bool)
        if self.phases is not None and len(self.phases) == 1:
            generated = positions >= prompt_length
            chosen &= generated if "generation" in self.phases else ~generated
        if self.ranges is not None:
            chosen &= self._in_ranges(positions, prompt_length)
        if self.tokens is not None:
            chosen &= _among(tokens, self.tokens)
        if self.excluded is not None:
            chosen &= ~self.excluded.mask(positions, prompt_length, tokens)
        if self.from_last_prompt_token:
            chosen &= positions >= prompt_length - 1
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
        return Selection(
            ranges=tuple(ranges),
            tokens=self.tokens,
            excluded=None if self.excluded is None else self.excluded.anchored(prompt_length),
        )

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
        return self.tokens is not None or (self.excluded is not None and self.excluded.reads_tokens)

    @property
    def reads_prompt(self) -> bool:
        """Whether the mask depends on where the prompt ends."""
        return (
            (self.phases is not None and len(self.phases) == 1)
            or any(bound is not None and bound < 0 for one in self.ranges or () for bound in one)
            or self.from_last_prompt_token
            or (self.excluded is not None and self.excluded.reads_prompt)
        )

    def fixed_from(self, prompt_length: int) -> int:
        """The position from which on the mask depends on the tokens alone."""
        bounds = [prompt_length]
        for selection in (self, self.excluded):
            for start, end in (selection.ranges or ()) if selection else ():
                bounds.append(_absolute(start, prompt_length))
                bounds.append(prompt_length if end is None else _absolute(end, prompt_length))
        return max(bounds)

    def first(self, prompt: Sequence[int], horizon: int) -> int | None:
        """The first position before `horizon` that is, or (for token triggers) may be, selected."""
        length = max(horizon, len(prompt))
        ids = np.full(length, -1, dtype=np.int64)
        ids[: len(prompt)] = prompt
        positions = np.arange(length, dtype=np.int64)
        hits = np.flatnonzero(self.mask(positions, len(prompt), ids))
        first = int(hits[0]) if len(hits) else None
        if self.reads_tokens and (first is None or first > len(prompt)):
            return len(prompt)
        return first


_FEW_TOKENS = 8
EVERYWHERE = Selection()


def resolve(
    where: Where | None, tokenize: Callable[[str], list[int]] | None, *, param: str = ""
) -> Selection:
    """`where` as a `Selection`; a token string must be exactly one token of the model."""
    if where is None:
        return EVERYWHERE
    tokens = None
    if where.tokens is not None:
        tokens = frozenset(
            token
            if isinstance(token, int)
            else _single_token(token, tokenize, f"{param}/tokens/{i}")
            for i, token in enumerate(where.tokens)
        )
    return Selection(
        phases=None if where.phases is None else frozenset(where.phases),
        ranges=where.positions,
        tokens=tokens,
        excluded=None
        if where.except_ is None
        else resolve(where.except_, tokenize, param=f"{param}/except"),
    )


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
