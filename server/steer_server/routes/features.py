"""GET /v1/steering/saes/{name}/features: what the features of an SAE are about."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Path, Query
from pydantic import BaseModel

from steer.artefacts.sae.base import SAE
from steer.artefacts.sae.labels import FeatureLabel, FeatureMatch
from steer.errors import UnknownArtefact
from steer_server.http.error_route import SteerRoute
from steer_server.state import ServingDep

router = APIRouter(
    prefix="/v1/steering/saes/{name}/features", tags=["saes"], route_class=SteerRoute
)


class FeatureList(BaseModel):
    """Features with their labels, best match first."""

    object: str = "list"
    sae: str
    d_sae: int
    data: list[FeatureMatch]


class FeatureBody(BaseModel):
    """One feature: its label where it has one, and what is read off the weights.

    `decoder_norm` is ‖W_dec[i]‖; `neighbours` are the features whose decoder rows point most
    nearly the same way, with their cosines.
    """

    object: str = "steering.feature"
    sae: str
    feature: int
    layer: int
    site: str
    label: FeatureLabel | None
    decoder_norm: float
    neighbours: list[dict[str, Any]]


@router.get("")
def search_features(
    name: str,
    serving: ServingDep,
    q: Annotated[str | None, Query(max_length=256)] = None,
    limit: Annotated[int, Query(ge=1, le=1000)] = 20,
) -> FeatureList:
    """Features whose labels speak of `q`; without it, labelled features in order."""
    sae = serving.registry.sae(name)
    if q:
        found = list(sae.search(q, limit=limit))
    else:
        listed = list(sae.labels.items())[:limit]
        found = [FeatureMatch(feature=i, label=label, score=1.0) for i, label in listed]
    return FeatureList(sae=sae.card.name, d_sae=sae.d_sae, data=found)


@router.get("/{feature}")
def show_feature(
    name: str, feature: Annotated[int, Path(ge=0, le=2**31)], serving: ServingDep
) -> FeatureBody:
    """One feature's card."""
    sae = serving.registry.sae(name)
    if feature >= sae.d_sae:
        raise UnknownArtefact(
            f"the SAE {name!r} has no feature {feature}: it has features 0 to {sae.d_sae - 1}",
            code="unknown_feature",
        )
    return FeatureBody(
        sae=sae.card.name,
        feature=feature,
        layer=sae.layer,
        site=sae.site,
        label=sae.labels.get(feature),
        decoder_norm=float(sae.W_dec[feature].norm()),
        neighbours=_neighbours(sae, feature),
    )


def _neighbours(sae: SAE, feature: int, count: int = 5) -> list[dict[str, Any]]:
    row = sae.W_dec[feature]
    norms = sae.W_dec.norm(dim=1) * row.norm()
    cosines = sae.W_dec @ row / norms.clamp(min=1e-12)
    cosines[feature] = -2.0
    best = cosines.topk(min(count, sae.d_sae - 1))
    return [
        {"feature": int(index), "cosine": float(value)}
        for value, index in zip(best.values, best.indices, strict=True)
    ]
