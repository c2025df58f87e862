"""What is asked about states."""

from __future__ import annotations

from typing import Annotated, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, model_validator

from steer.artefacts.oracle_form import FORMS, FormName, OracleForm
from steer.inspection.patchscopes.method import SourcePrompt
from steer.inspection.selection import LayerChoice
from steer.prompts import Place
from steer.spec import Name, Site

MAX_STATES = 8
"""Each state is a rule of its own in the plan that puts it there, and a plan has so many."""

Question: TypeAlias = Annotated[str, Field(min_length=1, max_length=2048)]


class AskRequest(BaseModel):
    """Questions about the states of `source` at `positions`, which are shown together, after each
    of `layers` by itself.

    `oracle` names a registered oracle, `form` how states are shown: the oracle's own by default;
    without an oracle the model is asked as it is, by default in the form of activation oracles.
    `layers` are by default those that the oracle's card names, or those at a quarter, a half and
    three quarters of the model. Every answer comes with what is said without the state.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    source: SourcePrompt
    questions: Annotated[tuple[Question, ...], Field(min_length=1, max_length=32, fail_fast=True)]
    oracle: Name | None = None
    form: FormName | OracleForm | None = None
    positions: Annotated[
        tuple[Place, ...], Field(min_length=1, max_length=MAX_STATES, fail_fast=True)
    ] = (-1,)
    layers: LayerChoice | None = None
    site: Site = "resid_post"
    max_tokens: Annotated[int, Field(strict=True, ge=1, le=256)] = 24

    @model_validator(mode="after")
    def _a_stream(self) -> AskRequest:
        if self.site not in ("resid_pre", "resid_mid", "resid_post"):
            raise ValueError(
                "'site' is one of the residual stream: resid_pre, resid_mid, resid_post"
            )
        return self

    def asked_form(self, own: OracleForm | None) -> OracleForm:
        """How states are shown, where the oracle's form is `own`."""
        if isinstance(self.form, OracleForm):
            return self.form
        if self.form is not None:
            return FORMS[self.form]
        return own or FORMS["activation_oracle"]
