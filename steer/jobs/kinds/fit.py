"""Jobs that fit: one kind for each method of the table, on the serving engine."""

from __future__ import annotations

from typing import Any

from steer.artefacts.concepts.probe import ConceptProbe
from steer.artefacts.control_vector import ControlVector
from steer.artefacts.detector import Detector
from steer.artefacts.lens import Lens
from steer.artefacts.oracle import Oracle
from steer.engines.base import Engine
from steer.errors import SteerError
from steer.fit.bulk.kept import StatesEngine
from steer.fit.requests.inline import count
from steer.fit.requests.pairs import PairsRequest
from steer.fit.requests.request import Artefact, FitPlace, FitRequest, check_request
from steer.jobs.kinds.captured import reading_engine, with_layers
from steer.jobs.kinds.kind import JobContext, JobKind
from steer.registry.registry import Registry


def fit_kind(request: type[FitRequest]) -> JobKind[FitRequest]:
    """Fits by `request`, and registers what comes out.

    The kind is called `fit/NAME`, which is its route as well; from pairs, as on the command line,
    `fit` alone.
    """
    form = request.form
    return JobKind(
        name="fit" if request is PairsRequest else f"fit/{request.command}",
        params=request,
        run=_run,
        check=_check,
        data=frozenset() if form is None else frozenset({form.field, "data"}),
        shown=_shown,
        summary=request.summary,
        # A second run registers the same content again, which is no new version; at worst, where
        # the arithmetic differs, one more version.
        repeatable=True,
    )


def _check(engine: Engine, registry: Registry, request: FitRequest) -> None:
    reading = reading_engine(engine, registry, request)
    check_request(request, reading, registry)
    if not isinstance(reading, StatesEngine):
        return
    for at, point in request.points():
        # Without layers the site is asked for by block 0, which need not be kept.
        if at == "/site" and any(kept.site == point.site for kept in reading.points):
            continue
        try:
            reading.check_kept(point)
        except SteerError as error:
            raise error.at(at) from None


def _run(context: JobContext, request: FitRequest) -> dict[str, Any]:
    engine = reading_engine(context.engine, context.registry, request)
    request = with_layers(request, engine)
    data = request.taken()
    found = request.run(
        FitPlace(
            engine,
            context.registry,
            progress=context.counter(request.work(data), request.doing),
        ),
        data,
    )
    kept = [_kept(context.registry, name, one) for name, one in found.artefacts.items()]
    if request.many:
        return {"artefacts": kept, "notes": list(found.notes)}
    return {**kept[0], "notes": list(found.notes)}


def _shown(request: FitRequest) -> dict[str, Any]:
    """How much data came, in its place."""
    if request.form is None:
        return {}
    field = request.form.field
    return {field: count(getattr(request, field), getattr(request, "data", None))}


def _kept(registry: Registry, name: str, artefact: Artefact) -> dict[str, Any]:
    entry, created = registry.add(name, artefact)
    return {
        entry.kind: entry.id,
        "name": entry.name,
        "version": entry.version,
        "sha256": entry.sha256,
        "created": created,
        "layers": list(artefact.card.layers),
        **_measures(artefact),
    }


def _measures(artefact: Artefact) -> dict[str, Any]:
    """What the fit measured of it, where it measures something."""
    card = artefact.card
    if isinstance(artefact, Lens):
        return {"kl": card.provenance["kl"]}
    if isinstance(artefact, Oracle):
        return {"right": card.provenance["right"]}
    if isinstance(artefact, ConceptProbe):
        return {"probe_form": artefact.form.model_dump(mode="json", exclude_none=True)}
    if isinstance(artefact, Detector):
        return {
            "threshold": artefact.threshold,
            "detection": artefact.detection.model_dump(mode="json", exclude_none=True),
        }
    if not isinstance(artefact, ControlVector):
        return {}
    return {
        "default_layers": list(card.used_layers),
        "measures": {
            str(layer): one.model_dump(mode="json") for layer, one in sorted(card.measures.items())
        },
    }
