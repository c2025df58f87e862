"""What the server is, how it is, and what it has counted."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from anyio import to_thread
from fastapi import APIRouter, Request, Response
from prometheus_client.exposition import choose_encoder

from steer.inspection import offered
from steer.model import Capabilities
from steer_server.http.error_route import SteerRoute
from steer_server.state import ServingDep

router = APIRouter(tags=["operation"], route_class=SteerRoute)


@router.get("/health")
@router.head("/health", include_in_schema=False)
async def health(serving: ServingDep) -> dict[str, Any]:
    """200 while the server answers; says what it serves and how busy it is."""
    stats = await to_thread.run_sync(serving.engine.stats, limiter=serving.probe_threads)
    return {
        "status": "ok",
        "model": serving.model_name,
        "engine": serving.engine.capabilities.engine,
        "sequences_running": stats.requests_running,
        "sequences_waiting": stats.requests_waiting,
    }


@router.get("/v1/steering/capabilities")
def capabilities(serving: ServingDep) -> dict[str, Any]:
    """What this engine can really do with this model; anything else is refused by name."""
    settings = serving.settings
    model = asdict(serving.engine.info)
    del model["origin"]  # which may be a path of this machine
    return {
        "model": {"id": serving.model_name, **model},
        "engine": _engine(serving.engine.capabilities),
        "limits": {
            "max_body_bytes": settings.max_body_bytes,
            "max_upload_bytes": settings.max_upload_bytes,
            "max_choices": settings.max_choices,
        },
        "inline_vectors": settings.allow_inline_vectors,
    }


def _engine(able: Capabilities) -> dict[str, Any]:
    """What the engine can do, with the inspections that follow from it."""
    said = asdict(able)
    limits = said.pop("limits")
    for inner in ("captures", "gradients", "no_unembedding", "projections", "carries", "attention"):
        del said[inner]
    return {**said, "inspection": offered(able), "limits": limits}


@router.get("/metrics", response_class=Response)
@router.head("/metrics", include_in_schema=False)
async def metrics(request: Request, serving: ServingDep) -> Response:
    """Figures for Prometheus; docs/metrics.md lists them."""
    encode, content_type = choose_encoder(request.headers.get("accept", ""))
    text = await to_thread.run_sync(encode, serving.metrics.registry, limiter=serving.probe_threads)
    return Response(text, headers={"content-type": content_type})
