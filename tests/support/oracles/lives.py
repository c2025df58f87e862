"""Requests whose tokens come in any pieces: chunks, batches, again, and behind drafts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from hypothesis import strategies as st

from steer.batch.ledger import PositionLedger
from steer.batch.requests import Span, SteeredRequest
from steer.batch.step import Step, build_step
from steer.batch.tables import Tables
from steer.plan.plan import SteeringPlan


@dataclass
class Told:
    """A token: its id, and what a gate reads of it."""

    token: int
    value: float


@dataclass
class Life:
    """A request: what its tokens are in the end, and how many have come."""

    row: int
    prompt_length: int
    tokens: list[Told]
    computed: int = 0


@dataclass
class Tabled:
    """A plan and where it runs."""

    plan: SteeringPlan
    tables: Tables
    slot: int
    ledger: PositionLedger


def lead(
    data: st.DataObject,
    sequences: Sequence[list[Told]],
    tokens: st.SearchStrategy[Told],
    where: Tabled,
    run: Callable[[Step, list[Told]], None],
    *,
    found_again: bool = False,
) -> list[Life]:
    """Lives through `sequences`, each from a prompt of at least one token to its end, in passes
    that `run` is shown with the tokens of each. Dropped drafts are drawn from `tokens`. With
    `found_again` a request that was taken back may go on where it had been, as if what lies between
    had been kept by a cache."""
    lives = [
        Life(3 - row, data.draw(st.integers(1, len(told)), "prompt"), told)
        for row, told in enumerate(sequences)
    ]
    reached = {one.row: 0 for one in lives}
    while running := [one for one in lives if one.computed < len(one.tokens)]:
        chosen = data.draw(
            st.lists(st.sampled_from(range(len(running))), min_size=1, unique=True), "batch"
        )
        spans, shown = [], list[Told]()
        for one in (running[n] for n in chosen):
            start = one.computed
            if found_again and start < reached[one.row]:
                start = data.draw(st.sampled_from([start, reached[one.row]]), "found")
            if data.draw(st.integers(0, 5), "again") == 5:  # taken up again after a preemption
                start -= data.draw(st.integers(0, start), "back")
            start = min(start, len(one.tokens) - 1)
            end = len(one.tokens) - data.draw(st.integers(0, len(one.tokens) - start - 1), "left")
            dropped: list[Told] = []
            if end > one.prompt_length and data.draw(st.booleans(), "drafts"):
                dropped = data.draw(st.lists(tokens, max_size=3), "dropped")
            mine = [*one.tokens[start:end], *dropped]
            positions = np.arange(start, start + len(mine))
            ids = np.array([told.token for told in mine])
            request = SteeredRequest(one.row, one.prompt_length, where.plan, where.slot)
            spans.append(Span(request, len(shown), positions, ids))
            shown += mine
            one.computed = end
            # What drafts have written over is kept by nobody.
            reached[one.row] = end if dropped else max(reached[one.row], end)
        step = build_step(where.tables, where.ledger, spans, len(shown))
        where.ledger.expect(
            np.concatenate([np.full(len(span.positions), span.request.row) for span in spans]),
            np.concatenate([span.positions for span in spans]),
        )
        if step is not None:
            run(step, shown)
    return lives
