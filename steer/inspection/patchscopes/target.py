"""The target prompts that Patchscopes read states with (2401.06102), and the place to patch."""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

from pydantic import Field, model_validator

from steer.engines.base import Engine
from steer.errors import SteerError
from steer.prompts import EncodedPrompt, Place, PromptInput, encode_prompt

Preset: TypeAlias = Literal["identity", "attribute", "custom"]

IDENTITY_PROMPT = "cat -> cat\n1135 -> 1135\nhello -> hello\n?"
"""Token identity: what is patched over the last token is said again."""

ENTITY_PROMPT = (
    "Syria: Country in the Middle East, Leonardo DiCaprio: American actor, "
    "Samsung: South Korean multinational, x"
)
"""Entity description: what is patched over the x is described."""


class TargetPrompt(PromptInput):
    """T and i*: the prompt, and the place to patch.

    The place is `position` (a number, or a piece of the prompt: then that piece's last token), or
    the token `placeholder`, which must be one token by itself; with neither it is the last token.
    """

    position: Place | None = None
    placeholder: Annotated[str, Field(min_length=1, max_length=256)] | None = None

    @model_validator(mode="after")
    def _one_place(self) -> TargetPrompt:
        if self.position is not None and self.placeholder is not None:
            raise ValueError("give 'position' or 'placeholder', not both")
        return self


_PRESETS = {
    "identity": TargetPrompt(text=IDENTITY_PROMPT),
    "attribute": TargetPrompt(text=ENTITY_PROMPT, placeholder="x"),
}


def encode_target(
    engine: Engine, preset: Preset, given: TargetPrompt | None
) -> tuple[EncodedPrompt, int]:
    """The target prompt and the absolute position to patch; `given` replaces the preset's.

    Raises `SteerError` for a placeholder that is missing or not one token.
    """
    chosen = given or _PRESETS[preset]
    placeholder = chosen.placeholder
    if preset == "attribute" and chosen.position is None and placeholder is None:
        placeholder = "x"
    try:
        prompt = encode_prompt(engine, chosen, at="/target")
        if placeholder is not None:
            return prompt, prompt.placeholder(placeholder, param="/target/placeholder")
        place = -1 if chosen.position is None else chosen.position
        return prompt, prompt.position(place, param="/target/position")
    except SteerError as error:
        if given is None:
            # The prompt is ours: what the caller chose is the preset.
            error.param = "/preset"
        raise
