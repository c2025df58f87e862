"""Which fields of a spec name artefacts, marked in their types, and the one walk that reads them.

A field is marked with `Names` anywhere in its type: `Annotated[str, Names("sae")]`, an optional
one, or a tuple of them. All that stands in a marked field are references, so that whoever adds a
field adds its mark, and every reader of specs knows it. This module knows JSON and nothing else.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

from pydantic import BaseModel

from steer.errors import pointer

NamedKind: TypeAlias = Literal["vector", "sae", "low_rank", "affine", "lens", "detector"]
"""The kinds of artefacts that a spec can name."""


@dataclass(frozen=True)
class Names:
    """The mark of a field that names artefacts of this kind."""

    kind: NamedKind


class Reference(NamedTuple):
    """An artefact that a spec refers to: by its name, or a vector that the spec itself carries or
    describes.

    `param` is a JSON pointer relative to where the walk began.
    """

    kind: NamedKind
    ref: Any
    param: str

    @property
    def name(self) -> str | None:
        """The reference as a name with or without a hash; None for what is no name."""
        return self.ref if isinstance(self.ref, str) else None


def references_in(model: BaseModel, at: str = "") -> Iterator[Reference]:
    """Everything that `model` and the models in it refer to; its own fields come first."""
    yield from own_references(model, at)
    for field, key in _fields(type(model)).nested:
        for where, value in _leaves(getattr(model, field), at + pointer(key)):
            if isinstance(value, BaseModel):
                yield from references_in(value, where)


def own_references(model: BaseModel, at: str = "") -> Iterator[Reference]:
    """What the marked fields of `model` refer to, in the order of the fields; behind what names
    artefacts itself, these."""
    for field, key, kind in _fields(type(model)).marked:
        for where, value in _leaves(getattr(model, field), at + pointer(key)):
            yield Reference(kind, value, where)
            if isinstance(value, BaseModel):
                yield from own_references(value, where)


def value_at(document: Any, param: str) -> Any:
    """What stands in `document`, the JSON of a spec or a part of it, at a reference's pointer."""
    place = document
    for part in param.split("/")[1:]:
        place = place[int(part)] if isinstance(place, list) else place[part]
    return place


def put_at(document: dict[str, Any], param: str, value: Any) -> None:
    """Puts `value` where a reference stands in `document`."""
    above, _, last = param.rpartition("/")
    place = value_at(document, above)
    place[int(last) if isinstance(place, list) else last] = value


class _Fields(NamedTuple):
    marked: tuple[tuple[str, str, NamedKind], ...]
    nested: tuple[tuple[str, str], ...]


@functools.cache
def _fields(model: type[BaseModel]) -> _Fields:
    """The fields of `model` that hold references, and those that hold other models."""
    marked: list[tuple[str, str, NamedKind]] = []
    nested = []
    for name, field in model.model_fields.items():
        key = field.alias or name
        parts = [*field.metadata, *_parts(field.annotation)]
        kinds = {part.kind for part in parts if isinstance(part, Names)}
        if len(kinds) > 1:
            raise TypeError(f"{model.__name__}.{name} is marked as {sorted(kinds)}: give one mark")
        if kinds:
            marked.append((name, key, kinds.pop()))
        elif any(isinstance(part, type) and issubclass(part, BaseModel) for part in parts):
            nested.append((name, key))
    return _Fields(tuple(marked), tuple(nested))


def _parts(annotation: Any) -> Iterator[Any]:
    """`annotation` and all that it is made of: members of unions, items of tuples, marks."""
    yield annotation
    for part in get_args(annotation):
        yield from _parts(part)


def _leaves(value: Any, at: str) -> Iterator[tuple[str, Any]]:
    """`value`, or each item of the tuples in it, with its pointer; nothing for None."""
    if isinstance(value, tuple):
        for place, item in enumerate(value):
            yield from _leaves(item, f"{at}/{place}")
    elif value is not None:
        yield at, value
