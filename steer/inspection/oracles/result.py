"""What is answered about states, beside what is said without them."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

from steer.artefacts.oracle_form import OracleForm


class Said(BaseModel):
    """An answer, with the geometric mean of its tokens' probabilities."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    text: str
    probability: float


class AskControls(BaseModel):
    """What the same model, with the same adapter, says to the same question without the states
    (2509.13316): of the source's `text` in their place; of `shuffled` states, their coordinates
    permuted; and of `none`, the placeholders as they are."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    text: Said
    shuffled: Said
    none: Said


class AskCell(Said):
    """The answer to one question about the states after one layer.

    `from_state` is whether the answer is none that a control gives: only then has the state been
    needed for it, which does not make it true.
    """

    layer: int
    question: int
    controls: AskControls
    from_state: bool


class AskResult(BaseModel):
    """`cells` run over questions within layers; `trained` is whether an oracle answered, or the
    model as it is, which was never taught to read states."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    object: Literal["inspect.ask"] = "inspect.ask"
    model: str
    oracle: str | None = None
    trained: bool
    form: OracleForm
    site: str
    source_tokens: tuple[str, ...]
    positions: tuple[int, ...]
    layers: tuple[int, ...]
    questions: tuple[str, ...]
    cells: tuple[AskCell, ...]
    fingerprint: str | None = None
