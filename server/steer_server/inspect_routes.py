"""Inspection over HTTP: one route for each method in `steer.inspection`."""

from __future__ import annotations

from fastapi import APIRouter, Depends

from steer.inspection.activations import ActivationsRequest, ActivationsResult, activations
from steer.inspection.logit_lens import LogitLensRequest, LogitLensResult, logit_lens
from steer.inspection.patchscope import PatchscopeRequest, PatchscopeResult, patchscope
from steer.spec import SteeringSpec
from steer_server.content_type import require_json
from steer_server.state import Serving, ServingDep
from steer_server.steering import check_inline

router = APIRouter(prefix="/v1/inspect", tags=["inspection"], dependencies=[Depends(require_json)])


@router.post("/patchscope")
def run_patchscope(body: PatchscopeRequest, serving: ServingDep) -> PatchscopeResult:
    """Reads hidden states by patching them into another prompt (2401.06102)."""
    _allowed(serving, body.source.steering, at="/source/steering")
    return patchscope(serving.engine, body, plans=serving.plans)


@router.post("/logit-lens")
def run_logit_lens(body: LogitLensRequest, serving: ServingDep) -> LogitLensResult:
    """Reads every layer's residual stream as next-token probabilities."""
    _allowed(serving, body.steering, at="/steering")
    return logit_lens(serving.engine, body, plans=serving.plans)


@router.post("/activations")
def run_activations(body: ActivationsRequest, serving: ServingDep) -> ActivationsResult:
    """Reads activations: states, projections on vectors, or SAE features."""
    _allowed(serving, body.steering, at="/steering")
    return activations(serving.engine, body, library=serving.registry, plans=serving.plans)


def _allowed(serving: Serving, spec: SteeringSpec | None, *, at: str) -> None:
    if spec is not None:
        check_inline(serving, spec, at=at)
