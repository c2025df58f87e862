"""The whole spec, and what is wrong with one."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BeforeValidator,
    Field,
    ValidationError,
)

from steer.errors import Problem, SpecError, pointer, quoted
from steer.references import Reference, references_in
from steer.spec.base import Frozen
from steer.spec.field_names import fields_at, nearest, nearest_kind, unknown_field
from steer.spec.gates import When
from steer.spec.interventions import KINDS, Intervention
from steer.spec.ramps import RampPoints
from steer.spec.selection import Where, unsaid
from steer.spec.wording import in_json_words

MAX_INTERVENTIONS = 64
MAX_TEXTS = 32
"""The most different texts, or pairs of them, that a spec looks for: each is followed token by
token."""


def _few_enough(value: Any) -> Any:
    # Every wrong intervention is named, so that there must not be too many to name.
    if isinstance(value, list | tuple) and len(value) > MAX_INTERVENTIONS:
        raise ValueError(
            f"a spec has at most {MAX_INTERVENTIONS} interventions; got {len(value)}: send fewer"
        )
    return value


class SteeringSpec(Frozen):
    """Interventions in the order in which they run, each seeing the result of the one before.

    `where`, `when` and `ramp` given here are the default of every intervention. A ramp multiplies
    what an intervention changes in a token by a factor that follows the number of the generated
    token. `norm: "preserve"`
    rescales each token to its norm before the edit. `compose: "orthogonal"` removes the overlap
    between the vectors that are added at the same hook point, and of those that are ablated there
    removes all that they span; what else meets there is refused.
    """

    interventions: Annotated[
        tuple[Intervention, ...],
        Field(min_length=1, max_length=MAX_INTERVENTIONS),
        BeforeValidator(_few_enough),
    ]
    where: Where | None = None
    when: When | None = None
    ramp: RampPoints | None = unsaid()
    norm: Literal["preserve"] | None = None
    compose: Literal["orthogonal"] | None = None

    def fingerprint(self) -> str:
        """32 hex digits that identify this spec's meaning (names are taken as written)."""
        return self._fingerprint

    @property
    def roles_at(self) -> str | None:
        """The pointer of the first `where` that names roles; None where only a card's does."""
        places = [("/where", self.where)] + [
            (pointer("interventions", place, "where"), item.where)
            for place, item in enumerate(self.interventions)
        ]
        for at, where in places:
            if where is not None and where.roles_at is not None:
                return at + where.roles_at
        return None

    def references(self) -> Iterator[Reference]:
        """Every artefact that the spec refers to, vectors that it carries included."""
        return iter(self._references)

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """A copy with other fields, which has nothing of what was worked out of the old ones."""
        copied = super().model_copy(update=update, deep=deep)
        for name in ("_fingerprint", "_references"):
            copied.__dict__.pop(name, None)
        return copied

    # A spec is frozen, and one that is kept is asked for these by every request.

    @cached_property
    def _fingerprint(self) -> str:
        canonical = json.dumps(
            self.model_dump(mode="json", by_alias=True, exclude_none=True),
            sort_keys=True,
            separators=(",", ":"),
            ensure_ascii=False,
        )
        return hashlib.sha256(b"steer/spec/1\n" + canonical.encode()).hexdigest()[:32]

    @cached_property
    def _references(self) -> tuple[Reference, ...]:
        return tuple(references_in(self))


def parse_spec(value: Mapping[str, Any] | SteeringSpec, *, at: str = "") -> SteeringSpec:
    """`value` as a `SteeringSpec`.

    Raises `SpecError` that names every wrong field; `at` is the JSON pointer of the spec itself.
    """
    if isinstance(value, SteeringSpec):
        return value
    try:
        return SteeringSpec.model_validate(value)
    except ValidationError as error:
        problems = tuple(_problems(error, value, at))
        first = problems[0]
        more = f" (and {len(problems) - 1} more problems)" if len(problems) > 1 else ""
        raise SpecError(
            first.message + more, param=first.param, code=first.code, problems=problems
        ) from None


def _problems(error: ValidationError, value: Any, at: str) -> list[Problem]:
    """pydantic's errors as problems: one per field, in the words of a caller who sees JSON."""
    found: dict[str, Problem] = {}
    short = set()
    for item in error.errors(include_url=False):
        where = at + pointer(*_json_path(item["loc"], value, item["type"]))
        message = in_json_words(item)
        code = "invalid_spec"
        if item["type"] == "extra_forbidden":
            fields = fields_at(SteeringSpec, item["loc"])
            code, message = "unknown_field", unknown_field(str(item["loc"][-1]), fields)
        elif item["type"] == "union_tag_invalid":
            message = _no_kind(item["input"].get("kind"))
        elif item["type"] == "union_tag_not_found":
            message = _kind_missing(item["input"])
        elif item["type"] == "missing":
            message = f"the field {item['loc'][-1]!r} is required"
        elif item["type"] not in ("value_error", "negative_layer"):
            message = f"{message}; got {quoted(item['input'])}"
        if item["type"] == "too_short":
            short.add(where)
        found.setdefault(where, Problem(message, code, where or None))
    # A list whose items are wrong is also reported as too short: only the items are of interest.
    return [
        problem
        for where, problem in found.items()
        if where not in short or not any(other.startswith(where + "/") for other in found)
    ]


def _no_kind(given: Any) -> str:
    kind = nearest_kind(given, KINDS) if isinstance(given, str) else None
    told = "" if kind is None else f" (did you mean {kind!r}?)"
    return f"{quoted(given)} is not a kind: use one of {', '.join(KINDS)}{told}"


def _kind_missing(given: Any) -> str:
    named = given if isinstance(given, Mapping) else {}
    other = next((key for key in named if nearest(str(key), ("kind",)) is not None), None)
    told = "" if other is None else f", and {other!r} is unknown"
    return f"an intervention needs a 'kind', one of {', '.join(KINDS)}{told}"


def _json_path(loc: tuple[str | int, ...], value: Any, error_type: str) -> list[str | int]:
    """`loc` without the parts that pydantic adds for union members."""
    path: list[str | int] = []
    for place, part in enumerate(loc):
        last = place == len(loc) - 1
        if isinstance(value, Mapping) and part in value:
            path.append(part)
            value = value[part]
        elif isinstance(value, list | tuple) and isinstance(part, int):
            path.append(part)
            value = value[part] if part < len(value) else None
        elif last and error_type == "missing":
            path.append(part)
    return path
