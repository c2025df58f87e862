"""The steering spec: what a request asks to have done to the model's activations.

One schema for the server, the command line and the library. A spec is frozen, refuses unknown
fields, and has a canonical `fingerprint()`: two specs that mean the same have the same one. This
module knows JSON and nothing else: no torch, no registry, no model.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Annotated, Any, ClassVar, Literal, Self, TypeAlias, get_args, get_origin

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    model_validator,
)

from steer.errors import Problem, SpecError, pointer, quoted
from steer.references import Names, Reference, references_in

MAX_INTERVENTIONS = 64
MAX_FEATURES = 256
MAX_MARKS = 16
"""The most texts that one field of `where` looks for."""
MAX_TEXTS = 32
"""The most different texts, or pairs of them, that a spec looks for: each is followed token by
token."""
MAX_INTEGER = 2**53 - 1
"""The largest integer of a spec: the last that all readers of JSON agree on (RFC 8259, 6)."""

Phase: TypeAlias = Literal["prompt", "generation"]
Role: TypeAlias = Literal["system", "user", "assistant", "tool"]
ROLES: tuple[Role, ...] = get_args(Role)
Site: TypeAlias = Literal[
    "resid_pre",
    "resid_mid",
    "resid_post",
    "attn_out",
    "mlp_out",
    "mlp_act",
    "head_out",
    "attn_in",
    "mlp_in",
]
SITES: tuple[Site, ...] = get_args(Site)

_STORED_NAME = "[A-Za-z0-9][A-Za-z0-9._-]{0,127}"
_NAME = re.compile(_STORED_NAME + "(@[0-9a-f]{6,64})?")


def _no_negative_zero(value: float) -> float:
    return value + 0.0


def _check_name(value: str) -> str:
    if not _NAME.fullmatch(value):
        raise ValueError(
            f"{value!r} is not an artefact name: use letters, digits, '.', '_' and '-' "
            "(at most 128, no slashes), optionally followed by '@' and a hash"
        )
    return value


def check_name(value: str) -> str:
    """`value` as the name of something to be stored: as in a spec, without a hash.

    Raises `ValueError`.
    """
    if "@" in _check_name(value):
        raise ValueError(f"{value!r} ends in a hash: a stored name is only the part before '@'")
    return value


def _check_strength(value: Any) -> Any:
    if isinstance(value, str) and value in _STRENGTH_WORDS:
        return value
    if isinstance(value, bool) or not isinstance(value, int | float | dict | BaseModel):
        objects = ", ".join(f'{{"{key}": x}}' for key in STRENGTH_KEYS)
        raise ValueError(
            f"{quoted(value)} is not a strength: give a number (multiples of the stored vector), "
            + " or ".join([objects, *(f'"{word}"' for word in _STRENGTH_WORDS)])
        )
    if isinstance(value, dict) and set(value) not in [{key} for key in STRENGTH_KEYS]:
        raise ValueError(
            f"a strength object has exactly one of the keys {', '.join(STRENGTH_KEYS)}; "
            f"got {quoted(sorted(value, key=str)[:8])}"
        )
    if isinstance(value, int | float) and not math.isfinite(value):
        raise ValueError(f"strength {value!r} is not a finite number")
    return value


def _strength_tag(value: Any) -> str:
    tags = {"norm": "a norm", "kl": "a kl", "effect": "an effect"}
    if isinstance(value, str):
        return "auto"
    if isinstance(value, dict):
        return next(tags[key] for key in value)
    models: dict[type, str] = {
        NormStrength: "a norm",
        KLStrength: "a kl",
        EffectStrength: "an effect",
    }
    return models.get(type(value), "a number")


def _values_tag(value: Any) -> str:
    return "numbers" if isinstance(value, list | tuple) else "a number"


def _value_tag(value: Any) -> str:
    return "a norm" if isinstance(value, dict | BaseModel) else _values_tag(value)


def _few_enough(value: Any) -> Any:
    # Every wrong intervention is named, so that there must not be too many to name.
    if isinstance(value, list | tuple) and len(value) > MAX_INTERVENTIONS:
        raise ValueError(
            f"a spec has at most {MAX_INTERVENTIONS} interventions; got {len(value)}: send fewer"
        )
    return value


def _sorted_layers(value: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(sorted(set(value)))


Number: TypeAlias = Annotated[
    float, Field(strict=True, allow_inf_nan=False), AfterValidator(_no_negative_zero)
]
Index: TypeAlias = Annotated[int, Field(strict=True, ge=0, le=MAX_INTEGER)]
Bound: TypeAlias = Annotated[int, Field(strict=True, ge=-MAX_INTEGER, le=MAX_INTEGER)]
Name: TypeAlias = Annotated[
    str,
    AfterValidator(_check_name),
    Field(json_schema_extra={"pattern": f"^{_NAME.pattern}$"}),
]
StoredName: TypeAlias = Annotated[
    str,
    AfterValidator(check_name),
    Field(json_schema_extra={"pattern": f"^{_STORED_NAME}$"}),
]
OneEach: TypeAlias = Annotated[
    tuple[Number, ...], Field(min_length=1, max_length=MAX_FEATURES, fail_fast=True)
]
Values: TypeAlias = Annotated[
    Annotated[Number, Tag("a number")] | Annotated[OneEach, Tag("numbers")],
    Discriminator(_values_tag),
]
Layers: TypeAlias = Annotated[
    tuple[Index, ...],
    Field(min_length=1, max_length=1024, fail_fast=True),
    AfterValidator(_sorted_layers),
]


def exactly_one(*names: str) -> dict[str, Any]:
    """For the JSON schema of an object in which one of `names` must be there and not null."""
    given = [
        {"required": [name], "properties": {name: {"not": {"type": "null"}}}} for name in names
    ]
    return {"oneOf": given}


class _Frozen(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)


class NormStrength(_Frozen):
    """A fraction of the token's own norm: the edit has length norm · ‖x‖."""

    norm: Number


class KLStrength(_Frozen):
    """The strength at which the next-token distribution moves by `kl` nats (needs a calibrated
    card)."""

    kl: Annotated[Number, Field(gt=0)]


class EffectStrength(_Frozen):
    """The strength that reaches this share of the attribute's range (needs a calibrated card)."""

    effect: Number


Strength: TypeAlias = Annotated[
    Annotated[Number, Tag("a number")]
    | Annotated[NormStrength, Tag("a norm")]
    | Annotated[KLStrength, Tag("a kl")]
    | Annotated[EffectStrength, Tag("an effect")]
    | Annotated[Literal["auto"], Tag("auto")],
    Discriminator(_strength_tag),
    BeforeValidator(_check_strength),
]


def _strength_forms() -> tuple[list[str], list[str]]:
    """The keys and the words that state a strength, read off the union that parses them."""
    keys: list[str] = []
    words: list[str] = []
    for member in get_args(get_args(Strength)[0]):
        form = get_args(member)[0]
        if isinstance(form, type) and issubclass(form, BaseModel):
            keys.extend(form.model_fields)
        elif get_origin(form) is Literal:
            words.extend(get_args(form))
    return keys, words


STRENGTH_KEYS, _STRENGTH_WORDS = _strength_forms()
STRENGTH_UNITS = ("multiple", *STRENGTH_KEYS, *_STRENGTH_WORDS)
"""What a strength may be given in: multiples of the stored vector (a plain number), the key of an
object, or a word."""


class InlineVector(_Frozen):
    """A vector that travels with the request: base64 of a safetensors file.

    The file holds one row per layer (`layers.N`), or a single row that `layer` places.
    """

    data: Annotated[str, Field(min_length=1, max_length=64 << 20)]
    layer: Index | None = None


LensRef: TypeAlias = Annotated[Name, Names("lens")]


class TokenVector(_Frozen):
    """The direction along which a lens reads a token: of each layer the unit direction in which the
    token's logit grows fastest.

    `token` is an id, or a text that is one token of the model (a leading space counts); `lens` a
    registered lens, tuned or Jacobian, or, left out, the logit lens.
    """

    token: Index | Annotated[str, Field(min_length=1, max_length=1024)]
    lens: LensRef | None = None


def _vector_tag(value: Any) -> str:
    if isinstance(value, TokenVector) or (isinstance(value, dict) and "token" in value):
        return "a token"
    return "inline" if isinstance(value, dict | InlineVector) else "a name"


VectorRef: TypeAlias = Annotated[
    Annotated[Name, Tag("a name")]
    | Annotated[InlineVector, Tag("inline")]
    | Annotated[TokenVector, Tag("a token")],
    Discriminator(_vector_tag),
    Names("vector"),
]
SAERef: TypeAlias = Annotated[Name, Names("sae")]
AdapterRef: TypeAlias = Annotated[Name, Names("low_rank")]
MapRef: TypeAlias = Annotated[Name, Names("affine")]
DetectorRef: TypeAlias = Annotated[Name, Names("detector")]


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


class Schedule(_Frozen):
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


def _unsaid() -> Any:
    """A field that is null unless it says something, and then is not written."""
    return Field(default=None, exclude_if=lambda value: value is None)


class Where(_Frozen):
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
            tuple[tuple[Bound, Bound | None], ...],
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
    ) = _unsaid()
    after: Marks | None = _unsaid()
    before: Marks | None = _unsaid()
    between: Pairs | None = _unsaid()
    outside: Pairs | None = _unsaid()
    every: Schedule | None = _unsaid()
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


GateScope: TypeAlias = Literal["prompt", "token"]


class WhenDirection(_Frozen):
    """A gate: act only where the residual stream points along a condition direction.

    The value is the cosine between the residual and the direction (`measure: "cosine"`), or the
    projection on the unit direction (`"projection"`). Scope `token` decides for every token by
    itself. Scope `prompt` decides once, on the last prompt token, and holds the decision for the
    rest of the request; it therefore acts from the last prompt token on (CAST, 2409.05907).
    """

    model_config = ConfigDict(
        json_schema_extra={
            "anyOf": [
                {"required": [name], "properties": {name: {"type": "number"}}}
                for name in ("above", "below")
            ]
        }
    )

    vector: VectorRef
    above: Number | None = None
    below: Number | None = None
    scope: GateScope = "prompt"
    measure: Literal["cosine", "projection"] = "cosine"
    layer: Index | None = None

    @model_validator(mode="after")
    def _check(self) -> WhenDirection:
        if self.above is None and self.below is None:
            raise ValueError("a gate needs 'above', 'below' or both")
        if self.above is not None and self.below is not None and self.above >= self.below:
            raise ValueError(f"no value is above {self.above} and below {self.below}")
        return self


class WhenDetected(_Frozen):
    """A gate: act only where a detector fires on the token that is read.

    The value is the detector's score at its own hook point, before anything is edited there; it
    must exceed `threshold`, or the detector's own where none is given. `scope` is that of a gate by
    a direction. One that pools the scores of several tokens is refused: a gate reads one.
    """

    detector: DetectorRef
    threshold: Number | None = None
    scope: GateScope = "prompt"


def _when_tag(value: Any) -> str:
    named = isinstance(value, WhenDetected) or (isinstance(value, dict) and "detector" in value)
    return "a detector" if named else "a direction"


When: TypeAlias = Annotated[
    Annotated[WhenDirection, Tag("a direction")] | Annotated[WhenDetected, Tag("a detector")],
    Discriminator(_when_tag),
]


class _Intervention(_Frozen):
    takes_card_where: ClassVar[bool] = True
    """Whether the card of what the first field names says which tokens, where the spec does not."""

    layers: Layers | Literal["all"] | None = None
    site: Site | None = None
    where: Where | None = None
    when: When | None = None


class Add(_Intervention):
    """x + α·v. `strength` defaults to the card's; "auto" is the calibrated one that reaches 90 %
    of the attribute's range."""

    kind: Literal["add"] = "add"
    vector: VectorRef
    strength: Strength | None = None


class Ablate(_Intervention):
    """x − α·v̂v̂ᵀx: directional ablation (2406.11717); α = 1 removes the direction."""

    kind: Literal["ablate"] = "ablate"
    vector: VectorRef
    strength: Number = 1.0


class Project(_Intervention):
    """Move the projection on v̂ to `value`, or keep it on one side of it.

    `value` is in units of the residual stream, or the name of what the card records for each layer:
    the mean projection of a class, or the "cap" that the vector was made for (2601.10387).
    """

    kind: Literal["project"] = "project"
    vector: VectorRef
    value: Number | Literal["positive", "negative", "cap"]
    mode: Literal["set", "at_least", "at_most"] = "set"

    @model_validator(mode="after")
    def _check(self) -> Project:
        if self.value == "cap" and self.mode != "at_most":
            raise ValueError(f"a cap bounds from above: give mode 'at_most', not {self.mode!r}")
        return self


class NormValue(_Frozen):
    """Values in shares of the token's own norm: at the value 1 a feature's decoder row, times its
    activation, is as long as the token."""

    norm: Values


ClampValue: TypeAlias = Annotated[
    Annotated[Number, Tag("a number")]
    | Annotated[OneEach, Tag("numbers")]
    | Annotated[NormValue, Tag("a norm")],
    Discriminator(_value_tag),
]


class Clamp(_Intervention):
    """Fix, bound, scale or add to SAE features, leaving the reconstruction error untouched.

    `value` is an activation (for mode `scale` a factor, for `add` what is added), or a share of the
    token's norm; one for all features, or one each. `drop` sets them to 0 and `keep_only` all
    others; both have none. With `only_if_active` a token is changed only where the feature is
    active. `balance` is the activation that counts as full, f̂ = f / balance within 0 and 1: what is
    added is multiplied by 1 − f̂, what is taken away by f̂ (G-SAE, 2506.19382). `with_absorbers`
    clamps with each feature those whose decoder rows have at least this cosine with its own, which
    may be active in its place (absorption, 2409.14507). `k` takes the place of the SAE's own k, or
    is the number of features that matching pursuit picks at most.
    """

    kind: Literal["clamp"] = "clamp"
    sae: SAERef
    features: Annotated[
        tuple[Index, ...], Field(min_length=1, max_length=MAX_FEATURES, fail_fast=True)
    ]
    value: ClampValue | None = None
    mode: Literal["set", "at_least", "at_most", "scale", "add", "drop", "keep_only"] = "set"
    # Written only where they say something, so that older specs keep their fingerprint.
    only_if_active: bool = Field(default=False, strict=True, exclude_if=lambda value: not value)
    balance: Annotated[Number, Field(gt=0)] | None = None
    with_absorbers: Annotated[Number, Field(gt=0, le=1)] | None = None
    k: Annotated[int, Field(ge=1, strict=True)] | None = None

    @property
    def numbers(self) -> tuple[float, ...]:
        """The value of each feature; 0 where the mode has none."""
        value = self.value.norm if isinstance(self.value, NormValue) else self.value
        if isinstance(value, tuple):
            return value
        return (0.0 if value is None else value,) * len(self.features)

    @model_validator(mode="after")
    def _check(self) -> Clamp:
        if len(set(self.features)) != len(self.features):
            raise ValueError("'features' names a feature twice")
        if len(self.numbers) != len(self.features):
            raise ValueError(
                f"'value' lists {len(self.numbers)} numbers for {len(self.features)} features: "
                "give one number, or one for each feature"
            )
        self._check_mode()
        return self

    def _check_mode(self) -> None:
        """Raises `ValueError` for what says nothing in this mode."""
        valueless = self.mode in ("drop", "keep_only")
        if valueless and self.value is not None:
            raise ValueError(
                f"mode {self.mode!r} sets features to 0: leave 'value' out, or use mode 'set'"
            )
        if not valueless and self.value is None:
            raise ValueError(f"mode {self.mode!r} needs a 'value'")
        if self.mode == "scale" and isinstance(self.value, NormValue):
            raise ValueError("mode 'scale' takes a factor: a factor has no norm")
        if (valueless or self.mode == "scale") and self.only_if_active:
            raise ValueError(
                f"mode {self.mode!r} changes nothing where a feature is silent: leave "
                "'only_if_active' out"
            )
        if self.mode != "add" and self.balance is not None:
            raise ValueError(f"'balance' weighs what mode 'add' adds; the mode is {self.mode!r}")
        if self.mode == "add" and self.balance is None and not self.only_if_active and self.k:
            raise ValueError(
                "'k' says how features are found, and this 'add' looks at none: leave 'k' out"
            )


class Concept(_Intervention):
    """Steer towards what a text means to an SAE (Concept Steerers, 2501.19066).

    The text is encoded without the top-k limit and λ·Σ zᵢ·W_dec[i] is added. With `contrast`, the
    latents of that text are subtracted. With `explain` the receipt lists the features that the text
    lit.
    """

    kind: Literal["concept"] = "concept"
    sae: SAERef
    text: Annotated[str, Field(min_length=1, max_length=4096)]
    contrast: Annotated[str, Field(min_length=1, max_length=4096)] | None = None
    strength: Number = 1.0
    # Written only where it says something, so that older specs keep their fingerprint.
    explain: bool = Field(default=False, strict=True, exclude_if=lambda value: not value)


class Swap(_Intervention):
    """x + β·‖x‖·(v̂_add − v̂_remove): exchange one concept for another (LRC, 2311.08968)."""

    takes_card_where: ClassVar[bool] = False

    kind: Literal["swap"] = "swap"
    remove: VectorRef
    add: VectorRef
    strength: Number = 0.06


class Exchange(_Intervention):
    """What lies along one direction goes to another, by as much as there is of it.

    With the unit directions v̂ and t̂ of `vector` and `toward`, mode `move` is x + α·⟨v̂, x⟩(t̂ − v̂).
    In mode `both` the coordinates along the two, by which they make up the part of x that they
    span, change places: x + α·(c_v − c_t)(t̂ − v̂) for x = c_v v̂ + c_t t̂ + …; in mode `one_way` only
    where that of `vector` is the larger.
    """

    takes_card_where: ClassVar[bool] = False

    kind: Literal["exchange"] = "exchange"
    vector: VectorRef
    toward: VectorRef
    mode: Literal["move", "both", "one_way"] = "move"
    strength: Number = 1.0


class ReadWrite(_Intervention):
    """x + α·f(⟨r, x⟩ + b)·w: reads one direction and writes another (PSR, 2605.03907).

    f is a ReLU, whose `threshold` is where it begins to act: f(u) = u above it, else 0. `measure`
    says what is read: the `product` with the vector as it is stored, the `projection` on its unit
    direction, or the `cosine`. `strength` is in multiples of the vector written; with a norm, what
    is written has the length norm · f · ‖x‖.
    """

    takes_card_where: ClassVar[bool] = False

    kind: Literal["read_write"] = "read_write"
    read: VectorRef
    write: VectorRef
    measure: Literal["product", "projection", "cosine"] = "product"
    bias: Number = 0.0
    activation: Literal["relu", "linear"] = "relu"
    threshold: Number = 0.0
    strength: Number | NormStrength = 1.0

    @model_validator(mode="after")
    def _check(self) -> ReadWrite:
        if self.activation == "linear" and self.threshold != 0:
            raise ValueError(
                f"a linear activation has no threshold, and {self.threshold!r} would have no "
                "effect: leave 'threshold' out, or use the activation 'relu'"
            )
        return self


class LowRank(_Intervention):
    """x + α·Σ f(⟨r, x⟩ + b)·w over the rows of an adapter: a trained low-rank intervention.

    LoReFT (2404.03592) is one: x + α·Rᵀ(Wx + b − Rx). f is the identity, or a ReLU where the
    adapter's file has thresholds. `strength` is α and defaults to the card's, which is 1 unless
    the adapter's file says more.
    """

    kind: Literal["low_rank"] = "low_rank"
    adapter: AdapterRef
    strength: Number | None = None


class Affine(_Intervention):
    """x + λ((ω ⊙ x + β) − x): a map of each channel by itself (Linear-AcT, 2410.23054).

    Where the map's file gives bounds, a channel outside them keeps its value. `strength` is λ and
    defaults to the card's.
    """

    kind: Literal["affine"] = "affine"
    map: MapRef
    strength: Number | None = None


class Rotate(_Intervention):
    """Rotate in the plane of `vector` and `toward`, from the first to the second.

    Mode `by` turns by an angle; mode `to` turns to it: what x has in the plane then lies at that
    angle from `vector`, as long as before (Angular Steering, 2510.26243). With `only: "positive"`
    a state whose projection on `vector` is not positive is left alone.
    """

    kind: Literal["rotate"] = "rotate"
    vector: VectorRef
    toward: VectorRef
    degrees: Number
    # Written only where they say something, so that older specs keep their fingerprint.
    mode: Literal["by", "to"] = Field(default="by", exclude_if=lambda value: value == "by")
    only: Literal["positive"] | None = None


class Patch(_Intervention):
    """Replace the state by a given one (Patchscopes, 2401.06102)."""

    takes_card_where: ClassVar[bool] = False

    kind: Literal["patch"] = "patch"
    vector: VectorRef


Intervention: TypeAlias = Annotated[
    Add
    | Ablate
    | Project
    | Clamp
    | Concept
    | Swap
    | Exchange
    | ReadWrite
    | LowRank
    | Affine
    | Rotate
    | Patch,
    Field(discriminator="kind"),
]
KINDS: tuple[str, ...] = tuple(
    str(member.model_fields["kind"].default) for member in get_args(get_args(Intervention)[0])
)


class SteeringSpec(_Frozen):
    """Interventions in the order in which they run, each seeing the result of the one before.

    `where` and `when` given here are the default of every intervention. `norm: "preserve"`
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
    for item in error.errors(include_url=False):
        where = at + pointer(*_json_path(item["loc"], value, item["type"]))
        message = item["msg"].removeprefix("Value error, ")
        code = "invalid_spec"
        if item["type"] == "extra_forbidden":
            code, message = "unknown_field", f"unknown field {item['loc'][-1]!r}: remove it"
        elif item["type"] == "union_tag_invalid":
            message = f"{item['input'].get('kind')!r} is not a kind: use one of {', '.join(KINDS)}"
        elif item["type"] == "union_tag_not_found":
            message = f"an intervention needs a 'kind': one of {', '.join(KINDS)}"
        elif item["type"] == "missing":
            message = f"the field {item['loc'][-1]!r} is required"
        elif item["type"] != "value_error":
            message = f"{message}; got {quoted(item['input'])}"
        found.setdefault(where, Problem(message, code, where or None))
    # A list whose items are wrong is also reported as too short: only the items are of interest.
    return [
        problem
        for where, problem in found.items()
        if "after validation, not 0" not in problem.message
        or not any(other.startswith(where + "/") for other in found)
    ]


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
