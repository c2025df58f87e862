"""What form an answer has: text, or JSON of a schema. Chats and responses write it differently."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

_OBJECT = {"type": "object"}


class _Format(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class PlainText(_Format):
    """Any text."""

    type: Literal["text"] = "text"

    @property
    def schema_text(self) -> str | None:
        """The schema that the answer must satisfy, as JSON text."""
        return None


class JsonObject(_Format):
    """Any JSON object."""

    type: Literal["json_object"]

    @property
    def schema_text(self) -> str | None:
        return json.dumps(_OBJECT)


class NamedSchema(_Format):
    """A schema; it is followed to the letter, whatever `strict` says."""

    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class JsonSchema(_Format):
    """The chat's form of a schema."""

    type: Literal["json_schema"]
    json_schema: NamedSchema

    @property
    def schema_text(self) -> str | None:
        return json.dumps(self.json_schema.schema_)


class ResponsesJsonSchema(NamedSchema):
    """The responses' form, in which the schema is not within another object."""

    type: Literal["json_schema"]

    @property
    def schema_text(self) -> str | None:
        return json.dumps(self.schema_)


ResponseFormat = Annotated[PlainText | JsonObject | JsonSchema, Field(discriminator="type")]
TextFormat = Annotated[PlainText | JsonObject | ResponsesJsonSchema, Field(discriminator="type")]
