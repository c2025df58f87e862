"""Everything in a plan's file that is not a tensor, as checked JSON objects.

Tensors appear by name. What has its default value is left out of the JSON.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict
from typing import Annotated, Any, TypeAlias, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StrictBool,
    StrictStr,
    ValidationError,
    model_validator,
)

from steer.artefacts.detection import MAX_WINDOW, Pooling
from steer.errors import FileFormatError, SpecError, SteerError
from steer.laws import CENTRED, PRODUCT
from steer.plan.selection import Counted, Ramp, Selection
from steer.plan.texts.automaton import Moves, TokenAutomaton
from steer.plan.texts.condition import TextCondition, TextRelation
from steer.references import put_at
from steer.spec import (
    GateScope,
    Index,
    InlineVector,
    Phase,
    RampPoints,
    Role,
    Site,
    SteeringSpec,
)

VERSION = 1

_DIGEST = "sha256:"

R = TypeVar("R", bound=BaseModel)
# Masks are computed with 64-bit integers.
_Int: TypeAlias = Annotated[int, Field(strict=True, ge=-(1 << 63), lt=1 << 63)]
_Float: TypeAlias = Annotated[float, Field(strict=True, allow_inf_nan=False)]
_Point: TypeAlias = tuple[Index, Site]


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


_Mark: TypeAlias = StrictStr | tuple[_Int, ...]


class AutomatonRecord(_Record):
    """A `TokenAutomaton`; the tensors of what it does are named where it is to read tokens:
    `tokens` `[n, 2]` are tokens and their `rows` `[r, S]`."""

    opening: _Mark
    closing: _Mark | None = None
    digest: Annotated[str, Field(strict=True, pattern=r"^[0-9a-f]{16}\z")]
    tokens: StrictStr | None = None
    rows: StrictStr | None = None


class TextsRecord(_Record):
    """A `TextCondition`."""

    relation: TextRelation
    automata: tuple[AutomatonRecord, ...]


class CountedRecord(_Record):
    """A `Counted`."""

    nth: Annotated[int, Field(strict=True, ge=1, lt=1 << 63)] = 1
    first: Annotated[int, Field(strict=True, ge=1, lt=1 << 63)] | None = None
    origin: _Int | None = None


class TokensRecord(_Record):
    """A `Selection` without exceptions; sets are sorted."""

    phases: tuple[Phase, ...] | None = None
    ranges: tuple[tuple[_Int, _Int | None], ...] | None = None
    tokens: tuple[_Int, ...] | None = None
    from_last: StrictBool = False
    roles: tuple[Role, ...] | None = None
    counted: CountedRecord | None = None
    texts: tuple[TextsRecord, ...] = ()


class RampRecord(_Record):
    """A `Ramp`."""

    points: RampPoints
    origin: _Int | None = None


class SelectionRecord(TokensRecord):
    """A `Selection`. As in a spec, an exception has no exceptions of its own, and no ramp."""

    excluded: TokensRecord | None = None
    ramp: RampRecord | None = None


class GateRecord(_Record):
    """A `Gate`; a bound that is left out does not bind, no bias is 0, and one that does not say how
    many tokens it pools reads one. One that is neither of the prompt's scope nor `onward` is
    decided for each token."""

    name: StrictStr
    point: _Point
    direction: StrictStr
    above: _Float | None = None
    below: _Float | None = None
    cosine: StrictBool
    prompt_scope: StrictBool
    bias: _Float = 0.0
    onward: StrictBool = False
    pooling: Pooling = "max"
    last: Annotated[int, Field(strict=True, ge=1, le=MAX_WINDOW)] = 1

    @model_validator(mode="after")
    def _one_scope(self) -> GateRecord:
        if self.prompt_scope and self.onward:
            raise ValueError("a gate is decided by the prompt, or open onward, and not both")
        return self

    @property
    def scope(self) -> GateScope:
        """The scope of the gate."""
        if self.prompt_scope:
            return "prompt"
        return "onward" if self.onward else "token"


class EditsRecord(_Record):
    """The names of a block's rank-1 edits."""

    read: StrictStr
    write: StrictStr
    laws: StrictStr


class EncoderRecord(_Record):
    """Which encoder a block asks: that of the SAE of this hash, for these features.

    `features` are left out where all of them compete for k places, whichever they are.
    """

    sae: Annotated[str, Field(strict=True, pattern=r"^[0-9a-f]{64}\z")]
    k: Annotated[int, Field(strict=True, ge=1)] | None = None
    measure: Annotated[float, Field(strict=True, ge=PRODUCT, le=CENTRED)] = PRODUCT
    features: Annotated[tuple[Index, ...], Field(min_length=1)] | None = None


class BlockRecord(_Record):
    """A `Block` and where it acts."""

    point: _Point
    shift: StrictStr | None = None
    edits: EditsRecord | None = None
    channels: StrictStr | None = None
    side: StrictStr | None = None
    competition: EncoderRecord | None = None
    reads_at: _Point | None = None
    replace: StrictBool = False
    preserve_norm: StrictBool = False


class RuleRecord(_Record):
    """A `Rule`, its blocks in forward order."""

    selection: SelectionRecord
    gate: GateRecord | None = None
    blocks: tuple[BlockRecord, ...]


class PlanRecord(_Record):
    """A `SteeringPlan`."""

    version: Annotated[int, Field(strict=True)]
    fingerprint: Annotated[str, Field(strict=True, pattern=r"^[0-9a-f]{32}\z")]
    artefacts: tuple[StrictStr, ...]
    strengths: tuple[_Float, ...]
    summary: tuple[dict[str, Any], ...]
    spec: dict[str, Any]
    passes: tuple[RuleRecord, ...]


def checked(kind: type[R], value: object, error: type[SteerError] = FileFormatError) -> R:
    """`value` as a record of `kind`; raises `error` with the first field that is wrong."""
    try:
        return kind.model_validate(value)
    except ValidationError as invalid:
        first = invalid.errors(include_url=False, include_input=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        raise error(
            f"not a valid part of a plan: {place or 'the whole'}: {first['msg']}",
            code="invalid_plan" if error is FileFormatError else None,
        ) from None


WriteMoves: TypeAlias = Callable[[Moves], tuple[str, str]]
"""Stores what an automaton does; the names of its tensors."""
ReadMoves: TypeAlias = Callable[[AutomatonRecord], Moves]
"""The inverse; raises `FileFormatError`."""


def selection_record(selection: Selection, write: WriteMoves | None = None) -> SelectionRecord:
    """The record of `selection`, whose automata are only named without `write`. Raises `SpecError`
    where masks could not be computed with it."""
    if selection.excluded is not None and selection.excluded.excluded is not None:
        raise SpecError("'except' may not contain another 'except'", param="/where/except")
    excluded = None if selection.excluded is None else _tokens(selection.excluded, write)
    fields = {**_tokens(selection, write), "excluded": excluded}
    fields["ramp"] = None if selection.ramp is None else asdict(selection.ramp)
    return checked(SelectionRecord, fields, SpecError)


def selection_of(value: object, read: ReadMoves | None = None) -> Selection:
    """The selection that a record, or the JSON of one, stands for; its automata can read tokens
    where `read` is given."""
    record = checked(SelectionRecord, value)
    excluded = None if record.excluded is None else Selection(**_fields(record.excluded, read))
    ramp = None if record.ramp is None else Ramp(record.ramp.points, record.ramp.origin)
    return Selection(**_fields(record, read), excluded=excluded, ramp=ramp)


def spec_to_json(spec: SteeringSpec) -> dict[str, Any]:
    """`spec` as JSON, with a digest in place of the payload of every inline vector."""
    fields = spec.model_dump(mode="json", by_alias=True, exclude_none=True)
    for reference in spec.references():
        if isinstance(reference.ref, InlineVector):
            put_at(fields, reference.param, _without_payload(reference.ref))
    return fields


def _without_payload(inline: InlineVector) -> dict[str, Any]:
    payload = inline.data if inline.data is not None else json.dumps(inline.values)
    kept = {"data": _digest(payload)}
    return kept if inline.layer is None else kept | {"layer": inline.layer}


def _digest(payload: str) -> str:
    """A digest is not base64: nobody takes it for a vector, and it is known when met again."""
    if payload.startswith(_DIGEST):
        return payload
    return _DIGEST + hashlib.sha256(payload.encode()).hexdigest()


def _tokens(selection: Selection, write: WriteMoves | None) -> dict[str, Any]:
    return {
        "phases": None if selection.phases is None else sorted(selection.phases),
        "ranges": selection.ranges,
        "tokens": None if selection.tokens is None else sorted(selection.tokens),
        "from_last": selection.from_last_prompt_token,
        "roles": None if selection.roles is None else sorted(selection.roles),
        "counted": None if selection.counted is None else asdict(selection.counted),
        "texts": [
            {
                "relation": text.relation,
                "automata": [_automaton(one, write) for one in text.automata],
            }
            for text in selection.texts
        ],
    }


def _automaton(automaton: TokenAutomaton, write: WriteMoves | None) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "opening": automaton.opening,
        "closing": automaton.closing,
        "digest": automaton.digest,
    }
    if write is not None and automaton.moves is not None:
        fields["tokens"], fields["rows"] = write(automaton.moves)
    return fields


def _fields(record: TokensRecord, read: ReadMoves | None) -> dict[str, Any]:
    return {
        "phases": None if record.phases is None else frozenset(record.phases),
        "ranges": record.ranges,
        "tokens": None if record.tokens is None else frozenset(record.tokens),
        "from_last_prompt_token": record.from_last,
        "roles": None if record.roles is None else frozenset(record.roles),
        "counted": None if record.counted is None else Counted(**record.counted.model_dump()),
        "texts": tuple(
            TextCondition(
                text.relation,
                tuple(
                    TokenAutomaton(
                        one.opening, one.closing, one.digest, None if read is None else read(one)
                    )
                    for one in text.automata
                ),
            )
            for text in record.texts
        ),
    }
