"""Which tokens: `where`."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeAlias, get_args

from pydantic import (
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    model_validator,
)
from pydantic_core import PydanticCustomError

from steer.errors import SpecError
from steer.spec.base import Bound, Frozen, Index

MAX_MARKS = 16
"""The most texts that one field of `where` looks for."""


Phase: TypeAlias = Literal["prompt", "generation"]
Role: TypeAlias = Literal["system", "user", "assistant", "tool"]
ROLES: tuple[Role, ...] = get_args(Role)


def _mark_tag(value: Any) -> str:
    return "a text" if isinstance(value, str) else "token ids"


Mark: TypeAlias = Annotated[
    Annotated[str, Field(min_length=1, max_length=64), Tag("a text")]
    | Annotated[
        tuple[Index, ...], Field(min_length=1, max_length=16, fail_fast=True), Tag("token ids")
    ],
    Discriminator(_mark_tag),
]
"""What is looked for among a request's tokens: a text, or token ids that follow one another."""
Marks: TypeAlias = Annotated[
    tuple[Mark, ...], Field(min_length=1, max_length=MAX_MARKS, fail_fast=True)
]
Pairs: TypeAlias = Annotated[
    tuple[tuple[Mark, Mark | None], ...], Field(min_length=1, max_length=MAX_MARKS, fail_fast=True)
]


def _check_range_form(value: Any) -> Any:
    if not isinstance(value, int) or isinstance(value, bool):
        return value
    alone = f"[{value}, {value + 1}]"
    if value == -1:
        alone = '[-1, null] (of the prompt alone with "phases": ["prompt"])'
    raise PydanticCustomError(
        "range_form",
        "a range [first, end] is needed, its end not included or null: for the token {place} write "
        "{alone}",
        {"place": value, "alone": alone},
    )


PositionRange: TypeAlias = Annotated[tuple[Bound, Bound | None], BeforeValidator(_check_range_form)]


class Schedule(Frozen):
    """Which of the generated tokens, by their number: every `nth` from the first on, and of these
    those among the `first` so many."""

    model_config = ConfigDict(
        json_schema_extra={
            "anyOf": [
                {"required": [name], "properties": {name: {"type": "integer"}}}
                for name in ("nth", "first")
            ]
        }
    )

    nth: Annotated[Index, Field(ge=1)] | None = None
    first: Annotated[Index, Field(ge=1)] | None = None

    @model_validator(mode="after")
    def _check(self) -> Schedule:
        if self.nth is None and self.first is None:
            raise ValueError("a schedule needs 'nth', 'first' or both")
        return self


def unsaid() -> Any:
    """A field that is null unless it says something, and then is not written."""
    return Field(default=None, exclude_if=lambda value: value is None)


class Where(Frozen):
    """Which tokens an intervention touches. All the fields given must agree (logical and).

    `positions` are half-open ranges of absolute positions; a negative bound counts from the end
    of the prompt, and an end of null is open: `[[-1, null]]` is the last prompt token and
    everything generated. `tokens` are ids, or strings that are one token of the model. `roles` are
    those of a chat's messages: the tokens of what they say, without the template's marks around
    it; what is generated is the assistant's. `every` counts generated tokens.

    The others look for texts, or token ids, in prompt and answer as in one sequence. One is met
    from the token after that in which it ends. `after` selects once any of the texts has been met,
    `before` as long as none has; `between` after an opening and up to the token in which the next
    closing ends, as often as they come (a closing of null never comes); `outside` all but that, the
    opening itself and what may be the beginning of one.

    One that has only `except` takes these tokens away from what would be selected without it: an
    intervention's from the spec's, the spec's from those that a card says. With any other field it
    stands in their place.
    """

    phases: (
        Annotated[tuple[Phase, ...], Field(min_length=1, max_length=2, fail_fast=True)] | None
    ) = None
    positions: (
        Annotated[
            tuple[PositionRange, ...],
            Field(min_length=1, max_length=256, fail_fast=True),
        ]
        | None
    ) = None
    tokens: (
        Annotated[
            tuple[Index | Annotated[str, Field(min_length=1, max_length=1024)], ...],
            Field(min_length=1, max_length=1024, fail_fast=True),
        ]
        | None
    ) = None
    # Written only where they say something, so that the cards of older files keep their hash.
    roles: (
        Annotated[tuple[Role, ...], Field(min_length=1, max_length=len(ROLES), fail_fast=True)]
        | None
    ) = unsaid()
    after: Marks | None = unsaid()
    before: Marks | None = unsaid()
    between: Pairs | None = unsaid()
    outside: Pairs | None = unsaid()
    every: Schedule | None = unsaid()
    except_: Where | None = Field(default=None, alias="except")

    @model_validator(mode="after")
    def _check(self) -> Where:
        for start, end in self.positions or ():
            if end is not None and (start < 0) == (end < 0) and start >= end:
                raise ValueError(
                    f"the range [{start}, {end}] is empty: ranges are half-open [start, end); "
                    "use null as the end for 'to the last token'"
                )
        if self.except_ is not None and self.except_.except_ is not None:
            raise ValueError("'except' may not contain another 'except'")
        return self

    @property
    def selects(self) -> bool:
        """Whether any field says which tokens, beside the one that takes some away."""
        return any(
            getattr(self, name) is not None for name in type(self).model_fields.keys() - {"except_"}
        )

    @property
    def roles_at(self) -> str | None:
        """The pointer, within this, of the first field that names roles; None where none does."""
        if self.roles is not None:
            return "/roles"
        return "/except/roles" if self.except_ is not None and self.except_.roles else None

    @property
    def texts(self) -> frozenset[object]:
        """The texts and pairs that are looked for, each once."""
        mine = (*(self.after or ()), *(self.before or ()))
        pairs = (*(self.between or ()), *(self.outside or ()))
        return frozenset([(mark, None) for mark in mine]).union(
            pairs, self.except_.texts if self.except_ is not None else ()
        )

    def over(self, default: Where | None) -> Where:
        """What this selects where `default` would hold without it.

        Raises `SpecError` (`two_exceptions`) where both take tokens away in ways that no single
        `except` can say.
        """
        if default is None or self.selects:
            return self
        return default.model_copy(update={"except_": _either(self.except_, default.except_)})


_JOINED_BY_EITHER = frozenset({"phases", "positions", "tokens", "roles", "after", "between"})
"""Fields of which a longer list selects the tokens of each entry."""


def _either(one: Where | None, other: Where | None) -> Where | None:
    """What selects the tokens of both."""
    if one is None or other is None or one == other:
        return other if one is None else one
    mine, theirs = (where.model_dump(exclude_none=True) for where in (one, other))
    if len(mine) > 1 or mine.keys() != theirs.keys() or not mine.keys() <= _JOINED_BY_EITHER:
        raise SpecError(
            "'except' alone narrows a selection that has an 'except' of its own, "
            f"{other.model_dump_json(exclude_none=True)}, and the two do not make one: say the "
            "whole 'where'",
            param="/except",
            code="two_exceptions",
        )
    ((field, values),) = mine.items()
    return Where.model_validate({field: tuple(dict.fromkeys((*values, *theirs[field])))})
