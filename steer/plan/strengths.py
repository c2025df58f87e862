"""Strengths that need a calibration, and limits on all others: each becomes a plain number.

A calibration holds for the use it was measured in. Whoever asks for a KL or an effect in another
use (other layers, other tokens, another model) is refused, because the number would be made up.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from steer.artefacts.calibration import Calibration
from steer.artefacts.control_vector import ControlVector
from steer.errors import SpecError, SteerError, Unsupported
from steer.model import bare_name
from steer.plan.resolve import Compilation, Resolved, ResolvedStrength, StrengthLimit
from steer.plan.selection import resolve
from steer.spec import Add, NormStrength, Strength, TokenVector


def resolve_strength(one: Resolved, asked: Compilation) -> Resolved:
    """`one` with the number that its strength stands for; as it is where it adds no vector.

    With a limit of strengths, a calibrated vector is held to its calibrated range and use.
    Raises `SteerError`: `not_calibrated`, `outside_calibration`.
    """
    if not isinstance(one.item, Add):
        return one
    vector, strength = one.vector("vector"), one.item.strength
    if strength is None:
        _check_said(one.item)
        strength = vector.card.default_strength
    found = _resolved(strength, vector, one, asked)
    if found is None and strength is one.item.strength:
        return one
    number = strength if found is None else found.strength
    return replace(one, item=one.item.model_copy(update={"strength": number}), strength=found)


def _check_said(item: Add) -> None:
    """Raises `SpecError` (`no_strength`) where no card says how much of a direction to add."""
    if isinstance(item.vector, TokenVector):
        raise SpecError(
            f"the direction of the token {item.vector.token!r} has length 1 and no strength of its "
            "own: give 'strength', best as a share of each state's length, {'norm': 0.1}",
            code="no_strength",
            param="/strength",
        )


def _resolved(
    strength: Strength, vector: ControlVector, one: Resolved, asked: Compilation
) -> ResolvedStrength | None:
    """What `strength` becomes; None where it stands for itself."""
    calibration, limit = vector.card.calibration, asked.policy.strength_limit
    plain = isinstance(strength, float | int | NormStrength)
    if plain and (calibration is None or limit == "off"):
        return None
    if calibration is None:
        raise Unsupported(
            f"the vector {vector.card.name!r} has no calibration, so its strength cannot be given "
            f"as {_unit(strength)!r}: give a number, or {{'norm': x}}; `steer calibrate` makes a "
            "calibrated version",
            code="not_calibrated",
            param="/strength",
        )
    _check_use(vector, calibration, one, asked)
    if not plain and one.ramp is not None:
        raise Unsupported(
            f"the vector {vector.card.name!r} was calibrated at one strength on all its tokens, so "
            f"under a ramp {_unit(strength)!r} says nothing: give 'strength' as a number, or leave "
            "out 'ramp'",
            code="not_calibrated",
            param=one.ramp_param,
        )
    if isinstance(strength, NormStrength):
        raise Unsupported(
            f"this server holds {vector.card.name!r} to its calibrated strengths, 0 to "
            f"{calibration.safe_strength:g}, and {{'norm': x}} cannot be compared with them: give "
            "a number, {'kl': x}, {'effect': x} or 'auto'",
            code="outside_calibration",
            param="/strength",
        )
    if isinstance(strength, float | int):
        most = 1.0 if one.ramp is None else one.ramp.largest
        return _limited(float(strength), most, vector, calibration, limit)
    number = calibration.strength_for(strength)
    requested = strength if isinstance(strength, str) else strength.model_dump(mode="json")
    return ResolvedStrength(number, requested, above_null=calibration.above_null)


def _limited(
    strength: float,
    most: float,
    vector: ControlVector,
    calibration: Calibration,
    limit: StrengthLimit,
) -> ResolvedStrength | None:
    """`strength` as `limit` allows it where a ramp lets tokens have at most `most` of it."""
    reached = strength * most
    if 0 <= reached <= calibration.safe_strength:
        return None
    if limit == "refuse":
        raise SteerError(
            f"strength {reached:g} of {vector.card.name!r} is outside its calibrated range, 0 to "
            f"{calibration.safe_strength:g}, which this server does not allow",
            code="outside_calibration",
            param="/strength",
        )
    nearest = 0.0 if reached < 0 else calibration.safe_strength / most
    return ResolvedStrength(nearest, strength, capped=True)


def _check_use(
    vector: ControlVector, calibration: Calibration, one: Resolved, asked: Compilation
) -> None:
    """Raises `Unsupported` (`not_calibrated`) unless `one` uses the vector as calibrated."""
    model, site = asked.sources.model.name, one.points[0].site
    layers = tuple(point.layer for point in one.points)
    differs: tuple[str, str] | None = None
    if not asked.sources.model.is_called(calibration.model):
        made = bare_name(calibration.model)
        differs = "/vector", f"on the model {made!r}, and this is {model!r}"
    elif (layers, site) != (calibration.layers, calibration.site):
        place = f"layers {list(calibration.layers)} at {calibration.site}"
        here = f"layers {list(layers)} at {site}"
        param = "/layers" if one.item.layers else "/vector"
        differs = param, f"on {place}, and here it acts on {here}"
    elif one.fault is None and one.selection != resolve(
        calibration.where, asked.reader, param="/vector"
    ):
        differs = "/strength", "on other tokens than 'where' selects here"
    elif asked.spec.norm == "preserve":
        differs = "/strength", 'without "norm": "preserve"'
    elif asked.spec.compose is not None:
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
