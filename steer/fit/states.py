"""States of prompts, from the serving engine, one batch at a time.

Everything that is fitted reads through here, so that it works on any engine and holds no more than
one batch of states: prompts · tokens · layers · d floats, where `tokens` is 1 for the last token or
an index, and the longest prompt's length otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor

from steer.engines.base import CaptureRequest, Engine
from steer.engines.selecting import TokenChoice, roles_under
from steer.errors import SpecError, SteerError
from steer.fit.data.prompt import POSITION_NAMES, Positions, Prompt, read_positions, render
from steer.model import HookPoint
from steer.plan.plan import SteeringPlan
from steer.prompts import Marked, check_text_length
from steer.prompts.rendering import prompt_length, rendered_roles
from steer.spec import Site, Where

Progress: TypeAlias = Callable[[int], None]
"""Told of every item just done; whatever it raises ends the fit, which is how a job is
cancelled."""


@dataclass(frozen=True)
class Reading:
    """Which states are read: hook points of one site, at which tokens, in which batches."""

    site: Site
    layers: tuple[int, ...]
    positions: Positions
    batch: int
    choice: TokenChoice | None = None
    """`positions`, made ready for the model, where they are a selection."""

    def places(
        self, tokenizer: Any, prompt: Prompt, tokens: Sequence[int], *, none: bool = False
    ) -> Sequence[int]:
        """The positions in `tokens` (what `render` gave) that are read, in rising order.

        Raises `SteerError` where there are none; `SpecError` (`nothing_selected`) for a selection,
        unless it may select `none`.
        """
        if self.choice is None:
            assert not isinstance(self.positions, Where)
            return read_positions(tokenizer, prompt, tokens, self.positions)
        found = chosen_places(self.choice, tokenizer, prompt, tokens)
        if not found and not none:
            raise SpecError(
                f"{self.choice.at[1:]!r} selects none of the {len(tokens)} tokens of the prompt "
                f"{str(prompt)[:60]!r}: every prompt needs a token to be read at",
                param=self.choice.at,
                code="nothing_selected",
            )
        return found

    @property
    def points(self) -> tuple[HookPoint, ...]:
        return tuple(HookPoint(layer, self.site) for layer in self.layers)


def make_reading(
    engine: Engine,
    *,
    site: Site = "resid_post",
    layers: Sequence[int] | None = None,
    positions: Positions = "last",
    batch: int = 16,
    at: str = "/positions",
) -> Reading:
    """A reading, checked against the model; `layers` None is all of them. Raises `SteerError`; what
    is wrong with a selection stands at `at`."""
    chosen = tuple(range(engine.info.n_layers)) if layers is None else tuple(sorted(set(layers)))
    if batch < 1:
        raise SteerError(f"batch ({batch!r}) must be at least 1", code="invalid_option")
    if not chosen:
        raise SteerError("'layers' names no layer", code="invalid_option")
    if isinstance(positions, bool) or (
        positions not in POSITION_NAMES and not isinstance(positions, int | Where)
    ):
        raise SteerError(
            f"{positions!r} is no position: use an index, a selection, or one of "
            + ", ".join(POSITION_NAMES),
            code="invalid_option",
        )
    choice = TokenChoice.of(engine, positions, at=at) if isinstance(positions, Where) else None
    reading = Reading(site, chosen, positions, batch, choice)
    for point in reading.points:
        engine.info.check_point(point)
    return reading


def read_rows(
    engine: Engine,
    prompts: Sequence[Prompt],
    reading: Reading,
    plan: SteeringPlan | None = None,
) -> dict[int, Tensor]:
    """One state for each prompt, `[n, width]` float32 per layer: the mean where several are
    read, of all tokens without the first. Under `plan`, as the model has them with its edits."""
    tokens = [prompt_tokens(engine, prompt) for prompt in prompts]
    places = [
        reading.places(engine.tokenizer, prompt, row)
        for prompt, row in zip(prompts, tokens, strict=True)
    ]
    if reading.positions == "mean":
        places = [behind_first(one) for one in places]
    # One position for the whole batch is read alone; else every token is, and the rest dropped.
    single = -1 if reading.positions == "last" else reading.positions
    wanted = (single,) if isinstance(single, int) else None
    plans = None if plan is None else [plan] * len(tokens)
    roles = [roles_under(engine, plan, prompt) for prompt in prompts]
    captured = engine.capture(CaptureRequest(tokens, reading.points, wanted, plans, roles=roles))
    rows: dict[int, Tensor] = {}
    for point in reading.points:
        states = [one.states[point] for one in captured]
        if wanted is None:
            states = [s[list(p)] for s, p in zip(states, places, strict=True)]
        rows[point.layer] = torch.stack([state.mean(0) for state in states])
    return rows


def behind_first(places: Sequence[int]) -> Sequence[int]:
    """Positions in a text, in rising order, without its first one where there are others.

    That token has seen nothing but itself, so that it says nothing of the text; and in many models
    it is what heads attend to that look for nothing, with a state a hundred times as long as
    others', which would be all that is left of a mean (2309.17453, 2402.17762).
    """
    return places[1:] if places[0] == 0 and len(places) > 1 else places


def read_tokens(
    engine: Engine, prompts: Sequence[Prompt], reading: Reading
) -> Iterator[tuple[list[int], dict[int, Tensor]]]:
    """For each prompt, the tokens that were read and their states `[tokens, width]` per layer."""
    for tokens, places, states in read_places(engine, prompts, reading):
        yield [tokens[n] for n in places], states


def read_places(
    engine: Engine,
    prompts: Sequence[Prompt],
    reading: Reading,
    *,
    none: bool = False,
    known: Sequence[list[int]] | None = None,
) -> Iterator[tuple[list[int], Sequence[int], dict[int, Tensor]]]:
    """For each prompt its tokens, the positions that were read, and their states
    `[positions, width]` per layer. A selection may select `none` of a prompt's tokens. `known` are
    the tokens of all (`prompt_tokens`), where the caller has them."""
    for first in range(0, len(prompts), reading.batch):
        group = prompts[first : first + reading.batch]
        if known is None:
            tokens = [prompt_tokens(engine, prompt) for prompt in group]
        else:
            tokens = list(known[first : first + reading.batch])
        captured = engine.capture(CaptureRequest(tokens, reading.points))
        for prompt, row, one in zip(group, tokens, captured, strict=True):
            places = list(reading.places(engine.tokenizer, prompt, row, none=none))
            yield row, places, {p.layer: one.states[p][places] for p in reading.points}


def chosen_places(
    choice: TokenChoice, tokenizer: Any, prompt: Prompt, tokens: Sequence[int]
) -> tuple[int, ...]:
    """The positions in `tokens` (what `render` gave) that are selected; what was generated begins
    with the prompt's response. Raises `SteerError`."""
    return choice.positions(
        tokens, partial(rendered_roles, tokenizer, prompt), prompt_length(tokenizer, prompt)
    )


def prompt_tokens(engine: Engine, prompt: Prompt) -> list[int]:
    """`prompt` as tokens that fit the model's context; raises `SteerError`."""
    asked = prompt.prompt if isinstance(prompt, Marked) else prompt
    check_text_length(engine.tokenizer, asked, engine.info.max_length, param=None)
    tokens = render(engine.tokenizer, prompt)
    check_length(engine, tokens, prompt)
    return tokens


def check_length(engine: Engine, tokens: Sequence[int], prompt: Any) -> None:
    """Raises `SteerError` unless `tokens` fit the model's context."""
    if not 0 < len(tokens) <= engine.info.max_length:
        raise SteerError(
            f"a prompt has {len(tokens)} tokens and the context {engine.info.max_length}: "
            f"shorten {str(prompt)[:60]!r}",
            code="context_length_exceeded",
        )
