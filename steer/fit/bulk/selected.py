"""Which tokens of many texts are kept: a selection, asked of each text as a whole.

A text that is read in pieces is asked before it is cut, so that a piece's tokens are what they were
in their text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeAlias

from steer.engines.base import Engine
from steer.engines.selecting import TokenChoice
from steer.errors import SpecError
from steer.fit.data.prompt import Prompt, render
from steer.fit.states import chosen_places, prompt_tokens
from steer.prompts.rendering import rendered_roles
from steer.prompts.roles import RoleRanges
from steer.spec import Where

Tokens: TypeAlias = tuple[int, ...]


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


def pieces(
    engine: Engine, prompts: Sequence[Prompt], length: int | None = None
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
    prompts: Sequence[Prompt],
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
            length = len(render(tokenizer, asked))
            roles = partial(_with_answer, tokenizer, asked, len(tokens))
            return choice.positions(tokens, roles, length)

        return SelectedTokens(where, of_answered)
    found: list[Sequence[int]] = []
    for prompt in prompts:
        chosen = chosen_places(choice, tokenizer, prompt, render(tokenizer, prompt))
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


def _cut(engine: Engine, prompt: Prompt, length: int | None) -> list[Tokens]:
    if length is None:
        return [tuple(prompt_tokens(engine, prompt))]
    tokens = tuple(render(engine.tokenizer, prompt))
    cut = [tokens[start : start + length] for start in range(0, len(tokens), length)]
    return cut[:1] + [piece for piece in cut[1:] if len(piece) > 1]


def _with_answer(tokenizer: object, prompt: Prompt, length: int) -> RoleRanges | None:
    """Whose words a prompt's tokens are, `length` with the model's answer."""
    asked = rendered_roles(tokenizer, prompt)
    return None if asked is None else asked.answered(length - asked.length)
