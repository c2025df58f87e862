"""Detectors of a request: looked up with it, and told of in its answer, the metrics and the log."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from typing import Any

from steer.artefacts.arming import ArmedDetector
from steer.engines.base import TokenReadout
from steer.errors import SteerError, Unsupported
from steer.readouts.plan import ReadoutPlan
from steer.readouts.watching import ArmedPlan, Watch, WatchPlan, compile_armed
from steer_server.generation.steering import Steering
from steer_server.http.request_id import request_id
from steer_server.metrics import Metrics
from steer_server.state import Serving

log = logging.getLogger("steer.server")

Entry = dict[str, Any]
HEADER = "x-steer-detections"
"""Of a whole answer: the names of the detectors that fired, commas between them."""


def planned_watch(
    serving: Serving,
    own: ReadoutPlan | None,
    steering: Steering,
    asked: Sequence[ArmedDetector],
    *,
    compare: bool,
) -> WatchPlan:
    """What watches a request that asks for the read-outs `own`: its detectors, its profile's, and
    those that the operator has armed on every request. Errors point into the request.

    One that the operator armed, on the server or in a profile, stays as he armed it, whatever the
    request says of its name; where he armed it on both and not alike, both watch.
    """
    always = serving.settings.armed
    profiles = tuple(one for one in steering.detectors if one not in always)
    names = {one.name for one in (*always, *profiles)}
    if not (always or profiles or asked):
        return WatchPlan(own)
    if compare:
        raise Unsupported(
            "'compare' shows an answer of the unsteered model, which no detector watches: leave "
            "'compare' out, or 'detectors', and ask for no profile that arms one",
            param="/compare",
            code="unsupported_parameter",
        )
    armed = check_armed(serving, always, at=None)
    armed += check_armed(serving, profiles, at="/model")
    mine = check_armed(serving, asked, at="/detectors")
    return WatchPlan(own, (*armed, *(one for one in mine if one.spec.name not in names)))


def check_armed(
    serving: Serving, specs: Sequence[ArmedDetector], *, at: str | None
) -> tuple[ArmedPlan, ...]:
    """The detectors that stand in the list at the pointer `at` of a request; None where they stand
    in none, and `/model` where a profile arms them. Raises `SteerError`."""
    engine = serving.engine
    library = serving.registry.for_model(engine.info)
    try:
        return compile_armed(specs, library, engine.info, engine.capabilities)
    except SteerError as error:
        error.param = at if at in (None, "/model") else f"{at}{error.param or ''}"
        raise


def watched_rows(found: Iterable[TokenReadout]) -> list[tuple[int, tuple[float, ...]]]:
    """Rows as a `Watch` takes them."""
    return [(one.position, one.numbers) for one in found]


def told(metrics: Metrics, watch: Watch, index: int, name: str) -> tuple[Entry, ...]:
    """The entries of choice `index` of the request `name`, at its end; counted and logged."""
    for one in watch.detections:
        spec = one.armed.spec
        if one.score is not None:
            metrics.detector_score(spec.name, one.score)
        if one.fired_at is not None:
            metrics.detector_fired(spec.name, spec.action)
            log.info(
                "request %s (%s): the detector %r fired at position %d: %s",
                name,
                request_id(),
                spec.name,
                one.fired_at,
                spec.action,
            )
    return tuple({"choice": index, **one.as_json()} for one in watch.detections)


def with_detections(fields: dict[str, Any], entries: Sequence[Entry]) -> dict[str, Any]:
    """`fields` of an answer or its last chunk, with what detectors say; where there are none, as
    they are."""
    return {**fields, "detections": list(entries)} if entries else fields


def headers(entries: Iterable[Entry]) -> dict[str, str]:
    """The header of a whole answer in which detectors fired."""
    fired = dict.fromkeys(one["name"] for one in entries if one["fired"])
    return {HEADER: ",".join(fired)} if fired else {}
