"""Strengths that need a calibration, and limits on all others: each becomes a plain number.

A calibration holds for the use it was measured in. Whoever asks for a KL or an effect in another
use (other layers, other tokens, another model) is refused, because the number would be made up.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from steer.artefacts.calibration import Calibration
from steer.artefacts.control_vector import ControlVector
from steer.errors import SteerError, Unsupported
from steer.model import bare_name
from steer.plan.kinds import Sources, vector_points
from steer.plan.selection import Selection, resolve
from steer.spec import Add, NormStrength

Tokenize: TypeAlias = Callable[[str], list[int]]


@dataclass(frozen=True)
class ResolvedStrength:
    """The number a strength became, and what was asked for, as JSON."""

    strength: float
    requested: Any
    capped: bool = False


@dataclass(frozen=True)
class Use:
    """How a spec uses a vector, besides its strength."""

    selection: Selection
    preserve_norm: bool
    tokenize: Tokenize | None


def resolve_strength(item: Add, use: Use, sources: Sources) -> ResolvedStrength | None:
    """The number that `item.strength` stands for; None where it stands for itself.

    With a `sources.strength_limit`, a calibrated vector is held to its calibrated range and use.
    Raises `SteerError`: `not_calibrated`, `outside_calibration`.
    """
    vector = sources.vector(item.vector, "vector")
    strength = vector.card.default_strength if item.strength is None else item.strength
    calibration = vector.card.calibration
    plain = isinstance(strength, float | int | NormStrength)
    if plain and (calibration is None or sources.strength_limit == "off"):
        return None
    if calibration is None:
        raise Unsupported(
            f"the vector {vector.card.name!r} has no calibration, so its strength cannot be given "
            f"as {_unit(strength)!r}: give a number, or {{'norm': x}}; `steer calibrate` makes a "
            "calibrated version",
            code="not_calibrated",
            param="/strength",
        )
    _check_use(item, vector, calibration, use, sources)
    if isinstance(strength, NormStrength):
        raise Unsupported(
            f"this server holds {vector.card.name!r} to its calibrated strengths, 0 to "
            f"{calibration.safe_strength:g}, and {{'norm': x}} cannot be compared with them: give "
            "a number, {'kl': x}, {'effect': x} or 'auto'",
            code="outside_calibration",
            param="/strength",
        )
    if isinstance(strength, float | int):
        return _limited(float(strength), vector, calibration, sources.strength_limit)
    number = calibration.strength_for(strength)
    asked = strength if isinstance(strength, str) else strength.model_dump(mode="json")
    return ResolvedStrength(number, asked)


def _limited(
    strength: float,
    vector: ControlVector,
    calibration: Calibration,
    limit: Literal["off", "refuse", "cap"],
) -> ResolvedStrength | None:
    nearest = min(max(strength, 0.0), calibration.safe_strength)
    if nearest == strength:
        return None
    if limit == "refuse":
        raise SteerError(
            f"strength {strength:g} of {vector.card.name!r} is outside its calibrated range, 0 to "
            f"{calibration.safe_strength:g}, which this server does not allow",
            code="outside_calibration",
            param="/strength",
        )
    return ResolvedStrength(nearest, strength, capped=True)


def _check_use(
    item: Add, vector: ControlVector, calibration: Calibration, use: Use, sources: Sources
) -> None:
    """Raises `Unsupported` (`not_calibrated`) unless `item` uses the vector as calibrated."""
    points = vector_points(item, [("vector", vector)], sources.model)
    layers = tuple(point.layer for point in points)
    place = f"layers {list(calibration.layers)} at {calibration.site}"
    here = f"layers {list(layers)} at {points[0].site}"
    differs: tuple[str, str] | None = None
    if not sources.model.is_called(calibration.model):
        here = f"{sources.model.name!r}"
        made = bare_name(calibration.model)
        differs = "/vector", f"on the model {made!r}, and this is {here}"
    elif (layers, points[0].site) != (calibration.layers, calibration.site):
        param = "/layers" if item.layers else "/vector"
        differs = param, f"on {place}, and here it acts on {here}"
    elif use.selection != resolve(calibration.where, use.tokenize, param="/vector"):
        differs = "/strength", "on other tokens than 'where' selects here"
    elif use.preserve_norm:
        differs = "/strength", 'without "norm": "preserve"'
    elif (vector.sha256, points[0].site) in (sources.composed or {}):
        differs = "/strength", "as it is, and 'compose' changes it here"
    if differs is not None:
        raise Unsupported(
            f"the vector {vector.card.name!r} was calibrated {differs[1]}: use it as calibrated, "
            "give its strength as a number where that is allowed, or calibrate it for this use",
            code="not_calibrated",
            param=differs[0],
        )


def _unit(strength: Any) -> str:
    return strength if isinstance(strength, str) else str(next(iter(strength.model_dump())))
