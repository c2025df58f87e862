"""GET /v1/steering/saes/{name}/features: what the features of an SAE are about."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Path, Query
from pydantic import BaseModel

from steer.artefacts.sae.labels import FeatureMatch
from steer.registry.features.card import FeatureCard, feature_card
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
) -> FeatureCard:
    """One feature: its label, its neighbours, and what it did where the SAE was surveyed."""
    return feature_card(serving.registry, name, feature)
