"""In which form states are shown to an oracle, and the forms of the papers."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, model_validator

from steer.spec import Index, Number

FormName: TypeAlias = Literal["activation_oracle", "latent_qa", "selfie"]

MAX_RANK = 512
"""Of an oracle's adapter; it stands here, without torch, for those who only ask."""


class OracleForm(BaseModel):
    """What the model is shown, and what is done to it there.

    `message` is what the user of the chat says: `{states}` are the placeholders, `{question}` is
    the question, `{layer}` the layer that was read. `opening` is what the answer begins with, and
    may hold the question in its place. Each state stands at `repeat` placeholders. After block
    `layer` (0-based; at its input for `resid_pre`) a state v is put there: `add` makes x +
    strength · ‖x‖ · v̂, `replace` makes v.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    message: Annotated[str, Field(min_length=1, max_length=4096)]
    placeholder: Annotated[str, Field(min_length=1, max_length=64)] = " ?"
    repeat: Annotated[int, Field(strict=True, ge=1, le=16)] = 1
    opening: Annotated[str, Field(max_length=4096)] = ""
    layer: Index = 1
    site: Literal["resid_pre", "resid_post"] = "resid_post"
    mode: Literal["add", "replace"] = "add"
    strength: Number = 1.0

    @model_validator(mode="after")
    def _has_places(self) -> OracleForm:
        if self.message.count("{states}") != 1 or "{states}" in self.opening:
            raise ValueError("'message' holds {states} once, and 'opening' does not")
        if (self.message + self.opening).count("{question}") != 1:
            raise ValueError("'message' or 'opening' holds {question}, once")
        return self


FORMS: Mapping[FormName, OracleForm] = MappingProxyType(
    {
        "activation_oracle": OracleForm(message="Layer: {layer}\n{states} \n{question}"),
        "latent_qa": OracleForm(message="{states}\n{question}", layer=0, mode="replace"),
        "selfie": OracleForm(
            message="{states}",
            placeholder=" _",
            repeat=5,
            opening="{question}",
            site="resid_pre",
            mode="replace",
        ),
    }
)
"""Activation oracles (2512.15674), whose text this is; LatentQA (2412.08686), which puts the states
of a middle block in place of those after block 0; SelfIE (2403.10949), where the question is how
the answer begins, as `Sure, I will summarize the message:`."""
