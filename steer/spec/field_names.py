"""What an unknown field is a slip of the pen for: the fields of the object that it stands in."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from difflib import get_close_matches
from typing import Any, Literal, NamedTuple, get_args, get_origin

from pydantic import BaseModel, Tag

_ELSEWHERE: Mapping[str, tuple[str, ...]] = {
    "strength": (
        *("alpha", "amount", "amplitude", "coeff", "coef", "coefficient", "factor", "intensity"),
        *("magnitude", "multiplier", "scale", "scale_factor", "scaling", "steering_strength"),
        "weight",
    ),
    "vector": (
        *("control_vector", "direction", "name", "steering_vector", "vector_id", "vector_name"),
        "vec",
    ),
    "kind": ("action", "intervention", "intervention_type", "method", "op", "operation", "type"),
    "layers": ("at", "block", "blocks", "layer_ids", "layer_idx", "target_layer", "target_layers"),
    "site": ("component", "hook", "hook_name", "hook_point", "location", "point"),
    "features": ("feature", "feature_id", "feature_idx", "feature_ids", "feature_index", "index"),
    "sae": ("sae_id", "sae_name"),
    "where": ("at_tokens", "token_selection"),
    "positions": ("indices", "position", "token_positions"),
    "top": ("k", "n", "top_k", "topk"),
    "phases": ("phase", "when_phase"),
    "value": ("clamp_value", "target", "target_value"),
    "above": ("gt", "greater_than", "min", "minimum", "threshold"),
    "below": ("less_than", "lt", "max", "maximum"),
    "token": ("target", "target_token"),
    "spec": ("interventions", "steering", "steering_spec"),
    "text": ("content", "input", "prompt", "sentence", "string"),
    "label": ("class", "labels", "y"),
    "positive": ("accepted", "chosen", "pos", "win", "yes"),
    "negative": ("lose", "neg", "no", "rejected"),
    "values": ("array", "direction", "numbers", "row", "vec", "vector", "weights"),
}
"""What other packages call a field of ours."""


_KINDS_ELSEWHERE: Mapping[str, tuple[str, ...]] = {
    "add": ("actadd", "activation_addition", "addition", "caa", "steer"),
    "ablate": ("ablation", "directional_ablation", "erase", "project_out", "remove"),
    "clamp": ("feature", "sae", "set_feature", "steer_feature"),
    "project": ("cap", "projection", "set_projection"),
    "low_rank": ("adapter", "loreft", "reft"),
    "affine": ("act", "linear_act", "map"),
    "rotate": ("angular", "rotation"),
    "patch": ("interchange", "replace", "set"),
}
"""What other packages call a kind of ours."""


def nearest_kind(name: str, kinds: Collection[str]) -> str | None:
    """The one of `kinds` that `name` is a slip of the pen for, or stands for elsewhere."""
    word = name.strip().lower().replace("-", "_").replace(" ", "_")
    return _nearest(word, kinds, _KINDS_ELSEWHERE)


def nearest(name: str, fields: Collection[str]) -> str | None:
    """The one of `fields` that `name` is a slip of the pen for, or stands for elsewhere."""
    return name if name in fields else _nearest(name.lower(), fields, _ELSEWHERE)


def _nearest(
    word: str, ours: Collection[str], elsewhere: Mapping[str, tuple[str, ...]]
) -> str | None:
    for own, names in elsewhere.items():
        if own in ours and word in names:
            return own
    return next(iter(get_close_matches(word, sorted(ours), n=1, cutoff=0.8)), None)


def unknown_field(name: str, fields: Collection[str]) -> str:
    """What is said of a field that is none of `fields`, those of the object it stands in."""
    field = nearest(name, fields)
    if field is not None:
        return f"unknown field {name!r}: the field is {field!r}"
    if not fields:
        return f"unknown field {name!r}: remove it"
    return f"unknown field {name!r}: remove it; the fields here are {', '.join(sorted(fields))}"


def fields_at(model: type[BaseModel], loc: tuple[str | int, ...]) -> frozenset[str]:
    """The fields of the object in which the last part of `loc` stands, pydantic's path into a
    `model`; of all that it may be, where that is not told."""
    here = [_Choice(model)]
    for part in loc[:-1]:
        chosen = [each for each in here if each.is_called(part)] if len(here) > 1 else []
        inside = [
            one
            for each in here
            for name, field in each.model.model_fields.items()
            if part in (name, field.alias)
            for one in _choices(field.annotation)
        ]
        # A part that is no field is a place in a list, or says which of several objects it is.
        here = chosen or inside or here
    return frozenset(
        field.alias or name for each in here for name, field in each.model.model_fields.items()
    )


class _Choice(NamedTuple):
    """A model that a value may be, and what pydantic's paths call it among several."""

    model: type[BaseModel]
    tag: str | None = None

    def is_called(self, part: str | int) -> bool:
        kind = self.model.model_fields.get("kind")
        return part == self.tag or (kind is not None and part in get_args(kind.annotation))


def _choices(annotation: Any, tag: str | None = None) -> Iterator[_Choice]:
    """The models that a value of this type may be, or hold in lists."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield _Choice(annotation, tag)
    elif get_origin(annotation) is not Literal:
        inner = get_args(annotation)
        tag = next((one.tag for one in inner if isinstance(one, Tag)), tag)
        for one in inner:
            yield from _choices(one, tag)
