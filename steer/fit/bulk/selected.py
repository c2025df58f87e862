"""Which tokens of many texts are kept, and which are steered: each text is asked as a whole.

A text that is read in pieces is asked before it is cut, so that a piece's tokens are what they were
in their text. Texts come as prompts, or as token ids, which have no roles.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import cast

from steer.engines.base import CaptureRequest, Engine
from steer.engines.selecting import TokenChoice, roles_under
from steer.errors import SpecError
from steer.fit.data.prompt import Prompt, render
from steer.fit.data.texts import GivenText, Tokens, token_ids
from steer.fit.measure.divergence import anchored
from steer.fit.states import check_length, chosen_places, prompt_tokens
from steer.plan.plan import SteeringPlan
from steer.prompts.rendering import prompt_length, rendered_roles
from steer.prompts.roles import RoleRanges
from steer.spec import Where


@dataclass(frozen=True)
class SelectedTokens:
    """`where`, and the positions that it selects `of` a text, which is given by its number among
    those that are read and by its tokens."""

    where: Where
    of: Callable[[int, Tokens], Sequence[int]]

    @property
    def as_json(self) -> object:
        """What tells one selection from another."""
        return self.where.model_dump(mode="json", by_alias=True, exclude_none=True)


@dataclass(frozen=True)
class SteeredTexts:
    """`plan`, under which every text is read and answered; `lengths` says how many of a text's
    tokens are its prompt, and `roles` whose words the text of this number is, with an answer of so
    many tokens behind it."""

    plan: SteeringPlan
    lengths: Sequence[int]
    roles: Callable[[int, int], RoleRanges | None]

    def asked(self, request: CaptureRequest, first: int, lengths: Sequence[int]) -> CaptureRequest:
        """`request` of the texts from number `first` on, under the plan. What was generated, or is
        a prompt's response, is edited as it is while it is generated; `lengths` are those of the
        texts without answers."""
        plans, roles = [], []
        for n, (text, own) in enumerate(zip(request.prompts, lengths, strict=True), first):
            whole = self.lengths[n] == len(text)
            plans.append(
                self.plan if whole else anchored(self.plan, self.lengths[n], "states of answers")
            )
            roles.append(self.roles(n, len(text) - own))
        return replace(request, plans=plans, roles=roles)


def steered_texts(
    engine: Engine, prompts: Sequence[GivenText], plan: SteeringPlan, length: int | None = None
) -> SteeredTexts:
    """The `pieces` of `prompts` under `plan`. A piece is a prompt of its own, without roles."""
    lengths: list[int] = []
    of: list[Prompt | None] = []
    for asked in prompts:
        cut = _cut(engine, asked, length)
        if len(cut) == 1 and token_ids(asked) is None:
            lengths.append(prompt_length(engine.tokenizer, cast("Prompt", asked)))
            of.append(cast("Prompt", asked))
            continue
        lengths += map(len, cut)
        of += [None] * len(cut)

    def roles(number: int, answer: int) -> RoleRanges | None:
        return roles_under(engine, plan, of[number], answer=answer)

    return SteeredTexts(plan, lengths, roles)


def pieces(
    engine: Engine, prompts: Sequence[GivenText], length: int | None = None
) -> tuple[list[Tokens], list[int]]:
    """Prompts as tokens, and for each the number of its prompt. Those longer than `length` are cut
    into pieces of that many, of which a last one of a single token is dropped; without a `length`
    they must fit the model. Raises `SteerError`."""
    found: list[Tokens] = []
    owners: list[int] = []
    for number, prompt in enumerate(prompts):
        cut = _cut(engine, prompt, length)
        found += cut
        owners += [number] * len(cut)
    return found, owners


def selected_tokens(
    engine: Engine,
    prompts: Sequence[GivenText],
    where: Where,
    length: int | None = None,
    *,
    answered: bool = False,
    at: str = "/where",
) -> SelectedTokens:
    """What `where` selects of the `pieces` of `prompts`. With `answered` each prompt is read with
    an answer that the model gives: then that is what was generated, and else a prompt's response.

    Raises `SteerError` below the pointer `at`: `nothing_selected` where no text has such a token,
    which of answers is known only when they are there.
    """
    choice, tokenizer = TokenChoice.of(engine, where, at=at), engine.tokenizer
    if answered:

        def of_answered(number: int, tokens: Tokens) -> Sequence[int]:
            asked = prompts[number]
            length = len(_tokens(engine, asked))
            roles = partial(_with_answer, tokenizer, asked, len(tokens))
            return choice.positions(tokens, roles, length)

        return SelectedTokens(where, of_answered)
    found: list[Sequence[int]] = []
    for prompt in prompts:
        given = token_ids(prompt)
        chosen = (
            chosen_places(choice, tokenizer, cast("Prompt", prompt), _tokens(engine, prompt))
            if given is None
            else choice.positions(given, lambda: None)
        )
        start = 0
        for piece in _cut(engine, prompt, length):
            end = start + len(piece)
            found.append([place - start for place in chosen if start <= place < end])
            start = end
    if not any(found):
        raise nothing_selected(at, len(prompts))
    return SelectedTokens(where, lambda number, _: found[number])


def nothing_selected(at: str, texts: int) -> SpecError:
    """For a selection of no token that is read."""
    return SpecError(
        f"{at[1:]!r} selects none of the tokens that are read of {texts} texts",
        param=at,
        code="nothing_selected",
    )


def _tokens(engine: Engine, asked: GivenText) -> Tokens:
    given = token_ids(asked)
    return tuple(render(engine.tokenizer, cast("Prompt", asked))) if given is None else given


def _cut(engine: Engine, asked: GivenText, length: int | None) -> list[Tokens]:
    if length is None:
        given = token_ids(asked)
        if given is None:
            return [tuple(prompt_tokens(engine, cast("Prompt", asked)))]
        check_length(engine, given, given)
        return [given]
    tokens = _tokens(engine, asked)
    cut = [tokens[start : start + length] for start in range(0, len(tokens), length)]
    return cut[:1] + [piece for piece in cut[1:] if len(piece) > 1]


def _with_answer(tokenizer: object, prompt: GivenText, length: int) -> RoleRanges | None:
    """Whose words a prompt's tokens are, `length` with the model's answer."""
    if token_ids(prompt) is not None:
        return None
    asked = rendered_roles(tokenizer, cast("Prompt", prompt))
    return None if asked is None else asked.answered(length - asked.length)
