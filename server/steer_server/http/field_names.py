"""What an unknown field of a request is a slip of the pen for."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from pydantic import BaseModel
from starlette.types import Scope

from steer.spec.field_names import fields_at, nearest
from steer.spec.field_names import unknown_field as unknown_inside

SPEC_FIELD = "steering"
_SPEC_NAMES = ("interventions", "intervention", "spec")
_FEW = 24
"""So many fields of a body are told where none of them is meant."""


def meant(name: str, fields: Collection[str]) -> str | None:
    """The one of `fields` that `name` is, or stands for: a slip of the pen, or what other servers
    call a spec."""
    if name in fields:
        return name
    if SPEC_FIELD in fields and (name.startswith("steer") or name in _SPEC_NAMES):
        return SPEC_FIELD
    return nearest(name, fields)


def sent_as(field: str) -> str:
    """How `field` is sent."""
    if field == SPEC_FIELD:
        return "a spec is the field 'steering', an object with a list 'interventions'"
    return f"the field is {field!r}"


def unknown_field(loc: tuple[str | int, ...], model: type[BaseModel] | None) -> str:
    """What is said of the field at `loc`, pydantic's path from `"body"` on, of a body that is a
    `model`; None where that is not known."""
    name, fields = str(loc[-1]), fields_at(model, loc[1:]) if model is not None else frozenset()
    if len(loc) > len(("body", name)):
        return unknown_inside(name, fields)
    field = meant(name, fields)
    if field is None and len(fields) <= _FEW:
        return unknown_inside(name, fields)
    return f"unknown field {name!r}: {'remove it' if field is None else sent_as(field)}"


def body_model(scope: Scope) -> type[BaseModel] | None:
    """What the JSON body of the route of `scope` is; None where that is no object of known
    fields."""
    body: Any = getattr(getattr(scope.get("route"), "body_field", None), "field_info", None)
    model = getattr(body, "annotation", None)
    return model if isinstance(model, type) and issubclass(model, BaseModel) else None
