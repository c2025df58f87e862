"""An engine that reads kept states in place of running a model.

What is fitted on states asks an engine for those of token ids; here they come from a folder, so
every such fit runs on it unchanged, without the model, and comes to the same.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from torch import Tensor

from steer.engines.base import (
    Captured,
    CaptureRequest,
    Completion,
    EngineStats,
    GenerationRequest,
    QueriesKeys,
    TokenEvent,
)
from steer.errors import SteerError, Unsupported
from steer.fit.bulk.shards import CapturedStates, text_digest, whole_card
from steer.model import Capabilities, HookPoint
from steer.prompts.roles import found_roles


class StatesEngine:
    """An `Engine` that captures from the folder of a capture, and can do nothing else.

    `tokenizer` is the model's. A text is found by its token ids, and what a text begins with in it,
    where all tokens up to there are kept. Raises `SteerError` (`states_not_kept`) for what the
    folder does not hold, `Unsupported` (`no_model`) for what only a model can say.
    """

    def __init__(self, folder: Path, tokenizer: Any) -> None:
        card = whole_card(folder)
        if card.pooled != "none" or card.steering is not None:
            raise SteerError(
                f"{folder.name!r} holds states that are "
                + ("pooled" if card.pooled != "none" else "steered")
                + ", and a fit reads those of single tokens of the unsteered model: capture them "
                "without 'pooled' and 'steering'",
                code="states_not_kept",
            )
        self._states = {
            point: CapturedStates.open(folder, point, verify=n == 0)
            for n, point in enumerate(one.point for one in card.points)
        }
        self._first = next(iter(self._states.values()))
        self._numbers = {one.tobytes(): n for n, one in enumerate(self._first.digests)}
        self._begun: dict[int, dict[bytes, int]] = {}
        """The texts by their beginnings, of each length that was asked for."""
        self.info, self.tokenizer = card.info, tokenizer
        self.capabilities = Capabilities(
            engine="kept",
            kinds=(),
            sites=card.info.sites,
            captures=tuple(dict.fromkeys(point.site for point in self._states)),
            no_unembedding="only states are kept here, and no model runs",
            roles=found_roles(tokenizer),
        )

    @property
    def points(self) -> frozenset[HookPoint]:
        """Where states are kept."""
        return frozenset(self._states)

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers whose states are kept."""
        return tuple(sorted({point.layer for point in self._states}))

    def capture(self, request: CaptureRequest) -> list[Captured]:
        beside = request.logits != "none" or request.logprobs is not None or request.attention
        if beside or any(request.plans or ()):
            self._refuse(request)
        for point in request.points:
            self.info.check_point(point)
            self.check_kept(point)
        return [
            Captured(self._read(tuple(one), request.points, request.positions))
            for one in request.prompts
        ]

    def check_kept(self, point: HookPoint) -> None:
        """Raises `SteerError` (`states_not_kept`) for a hook point whose states are not here."""
        if point not in self._states:
            known = ", ".join(map(str, self._states))
            raise _not_kept(f"the states at {point}; it holds those at {known}")

    def _read(
        self, tokens: tuple[int, ...], points: Sequence[HookPoint], asked: Sequence[int] | None
    ) -> dict[HookPoint, Tensor]:
        number = self._number(tokens)
        if number is None:
            raise _not_kept(
                f"a text of {len(tokens)} tokens that begins with "
                f"{self.tokenizer.decode(list(tokens[:12]))!r}"
            )
        start, stop = self._first.text_starts[number : number + 2]
        here = self._first.positions[start:stop]
        wanted = np.asarray(range(len(tokens)) if asked is None else asked)
        wanted = np.where(wanted < 0, wanted + len(tokens), wanted)
        found = np.minimum(np.searchsorted(here, wanted), max(len(here) - 1, 0))
        if not len(here) or (here[found] != wanted).any():
            raise _not_kept(
                f"every token of text {number} that is read: of its {len(tokens)} tokens it holds "
                f"{len(here)}"
            )
        return {point: self._states[point].rows(start + found) for point in points}

    def _number(self, tokens: tuple[int, ...]) -> int | None:
        """The text that is `tokens`, or begins with them: what stands behind a token changes
        nothing of its state."""
        digest = text_digest(tokens)
        found = self._numbers.get(digest)
        return self._beginnings(len(tokens)).get(digest) if found is None else found

    def _beginnings(self, length: int) -> dict[bytes, int]:
        if length not in self._begun:
            first, found = self._first, dict[bytes, int]()
            for number, (start, stop) in enumerate(pairwise(first.text_starts.tolist())):
                # Positions ascend, so that the last of them says that none is left out.
                if start + length <= stop and first.positions[start + length - 1] == length - 1:
                    ids = first.tokens[start : start + length].tolist()
                    found.setdefault(text_digest(ids), number)
            self._begun[length] = found
        return self._begun[length]

    def start(self) -> None:
        """Nothing runs."""

    def stop(self) -> None:
        """Nothing runs."""

    def admit(self, request: GenerationRequest) -> None:
        self._refuse(request)

    def generate(self, request: GenerationRequest) -> AsyncIterator[TokenEvent]:
        self._refuse(request)

    def complete(self, requests: Sequence[GenerationRequest]) -> list[Completion]:
        self._refuse(requests)

    def unembed(self, states: Tensor) -> Tensor:
        self._refuse(states)

    def token_rows(self, tokens: Sequence[int]) -> Tensor:
        self._refuse(tokens)

    def project(self, point: HookPoint, states: Tensor) -> Tensor:
        self._refuse(point, states)

    def carry(
        self,
        source: HookPoint,
        target: HookPoint,
        states: Tensor,
        channels: range | None = None,
    ) -> Tensor:
        self._refuse(source, target, states, channels)

    def queries_and_keys(self, layer: int, states: Tensor) -> QueriesKeys:
        self._refuse(layer, states)

    def stats(self) -> EngineStats:
        return EngineStats()

    def _refuse(self, *_asked: object) -> NoReturn:
        raise Unsupported(
            "this needs the model's answers, and only its states are kept: leave out --states "
            "('states'), or choose what needs no answers (of pairs: --choose separation)",
            code="no_model",
        )


def _not_kept(what: str) -> SteerError:
    return SteerError(
        f"the capture does not hold {what}: capture the same texts, at these hook points and "
        "tokens",
        code="states_not_kept",
    )
