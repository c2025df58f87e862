"""The kinds of interventions, each with the fields that it takes."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, TypeAlias, get_args

from pydantic import (
    BaseModel,
    Discriminator,
    Field,
    Tag,
    model_validator,
)

from steer.spec.artefacts import AdapterRef, MapRef, SAERef, VectorRef
from steer.spec.base import (
    MAX_FEATURES,
    Frozen,
    Index,
    LayersOrAll,
    Number,
    OneEach,
    Site,
    Values,
    values_tag,
)
from steer.spec.gates import When
from steer.spec.ramps import RampPoints
from steer.spec.selection import Where, unsaid
from steer.spec.strengths import NormStrength, Strength


def _value_tag(value: Any) -> str:
    return "a norm" if isinstance(value, dict | BaseModel) else values_tag(value)


class _Intervention(Frozen):
    takes_card_where: ClassVar[bool] = True
    """Whether the card of what the first field names says which tokens, where the spec does not."""

    layers: LayersOrAll | None = None
    site: Site | None = None
    where: Where | None = None
    when: When | None = None
    ramp: RampPoints | None = unsaid()


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


class NormValue(Frozen):
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
    where that of `vector` is the larger. Above α = ½ mode `both` acts on one layer: at the next one
    the exchanged state comes by, and would be exchanged back.
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
