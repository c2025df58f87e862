"""What a patchscope answers."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from steer.inspection.next_token import TokenChance
from steer.inspection.patchscopes.target import Preset


class TargetSays(BaseModel):
    """What a target run says: its likeliest next tokens, and what it generates."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    top: tuple[TokenChance, ...]
    text: str | None = None


class ScoredSays(TargetSays):
    """The same, scored: `expected` is the token that `expect` asked for, with its probability;
    `hit` whether it came first."""

    expected: TokenChance | None = None
    hit: bool | None = None


class ShuffledControl(ScoredSays):
    """What the target run says of the state of another `position` of the source prompt, at the same
    layer and of the same length as the cell's own."""

    position: int


class TextControl(ScoredSays):
    """What the target prompt says with the source's text, up to `position`, in the place of the
    state: it has read the text and no state."""

    position: int


class PatchscopeCell(ScoredSays):
    """What the target run says with one state patched in, and beside it with a `shuffled` one."""

    position: int
    layer: int
    target_layer: int
    shuffled: ShuffledControl | None = None


class LayerPrecision(BaseModel):
    """precision@1 over the source positions, for one source and target layer; and in `controls`
    that of the target prompt by itself (`none`), with the text (`text`) and with shuffled states
    (`shuffled`)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    layer: int
    target_layer: int
    precision_at_1: float
    positions: int
    controls: dict[str, float] = Field(default_factory=dict)


class PatchscopeResult(BaseModel):
    """`cells` run over target layers within source layers within positions.

    Three controls (2509.13316) say what may be read without the state: `baseline` is the target
    prompt without a patch, `text_only` the target prompt with the text, once for each position,
    and each cell has its own `shuffled` state. `target_layers` is None where each state was patched
    at its own layer.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    object: Literal["inspect.patchscope"] = "inspect.patchscope"
    model: str
    preset: Preset
    site: str
    source_tokens: tuple[str, ...]
    positions: tuple[int, ...]
    layers: tuple[int, ...]
    target_tokens: tuple[str, ...]
    target_position: int
    target_layers: tuple[int, ...] | None = None
    baseline: TargetSays
    text_only: tuple[TextControl, ...] = ()
    cells: tuple[PatchscopeCell, ...]
    precision: tuple[LayerPrecision, ...] = ()
    fingerprint: str | None = None
