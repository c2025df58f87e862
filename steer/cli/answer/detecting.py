"""Detectors that watch the answers of `steer generate`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from steer.artefacts.arming import ArmedDetector, parse_armed
from steer.cli.reporting import out
from steer.errors import SteerError

if TYPE_CHECKING:
    from steer.engines.base import Engine, GenerationRequest
    from steer.readouts.plan import ReadoutPlan
    from steer.readouts.watching import Watch, WatchPlan
    from steer.registry.registry import Registry

DetectorOption = Annotated[
    list[str] | None,
    typer.Option(
        "--detector",
        help="A registered detector that watches both answers, NAME or NAME:stop; may be repeated. "
        "Those of a profile watch the steered answer.",
    ),
]


def asked_for(detectors: list[str] | None) -> tuple[ArmedDetector, ...]:
    """What the option arms. Raises `SteerError` (`invalid_option`)."""
    try:
        return tuple(map(parse_armed, detectors or ()))
    except ValueError as error:
        raise SteerError(str(error), code="invalid_option", param="--detector") from None


def watch_plan(
    engine: Engine,
    library: Registry,
    own: ReadoutPlan | None,
    profile: Sequence[ArmedDetector],
    asked: Sequence[ArmedDetector],
) -> WatchPlan:
    """What is read of an answer: `own`, and what its detectors need; of two that a profile and the
    command arm under one name, the profile's. Raises `SteerError`."""
    from steer.readouts.watching import WatchPlan, compile_armed

    bound = library.for_model(engine.info)
    found = compile_armed(profile, bound, engine.info, engine.capabilities)
    armed = {one.name for one in profile}
    mine = [one for one in asked if one.name not in armed]
    try:
        found += compile_armed(mine, bound, engine.info, engine.capabilities)
    except SteerError as error:
        error.param = "--detector"
        raise
    return WatchPlan(own, found)


def watched(request: GenerationRequest, plan: WatchPlan) -> tuple[GenerationRequest, Watch | None]:
    """`request` with all that is read of it, and the watch that may end it."""
    watch = plan.watch(len(request.prompt))
    request = replace(request, readouts=plan.readouts)
    if watch is None:
        return request, None
    see = watch.see
    return replace(
        request, halt=lambda found: see((one.position, one.numbers) for one in found)
    ), watch


def detections(watch: Watch | None) -> list[dict[str, Any]]:
    """What each detector said of an answer, as servers say it."""
    return [] if watch is None else [one.as_json() for one in watch.detections]


def show_detections(title: str, found: Sequence[dict[str, Any]]) -> None:
    """A line for each detector."""
    for one in found:
        score = "no token watched" if one["score"] is None else f"at most {one['score']:.3g}"
        said = f"{score}, threshold {one['threshold']:.3g}"
        if one["fired"]:
            ended = ", and ended the answer" if one["action"] == "stop" else ""
            said = f"fired at token {one['position']}{ended} ({said})"
        else:
            said = f"did not fire ({said})"
        out().print(f"{title}: the detector {one['name']!r} {said}", highlight=False, markup=False)
