"""/v1/steering/saes/{name}/features and /labels: what the features of an SAE are about, and what
they are called."""

from __future__ import annotations

import itertools
from dataclasses import replace
from functools import partial
from typing import Annotated, Literal

from anyio import to_thread
from fastapi import APIRouter, Depends, Path, Query, Response
from pydantic import BaseModel, ConfigDict, Field

from steer.artefacts.sae.labels import FeatureLabel, FeatureMatch, search_labels
from steer.errors import FileFormatError, SteerError
from steer.fit.requests.features.embed import search_by_meaning
from steer.formats.labels.reading import ReadLabels, read_label_text
from steer.jobs.kinds.asked import named_embedder
from steer.registry.features.card import FeatureCard, feature_card
from steer.registry.features.detectors import add_feature_detector
from steer.registry.features.families import FamilyCard, family_card
from steer.registry.features.labels import LabelSource
from steer.spec import Number, StoredName
from steer_server.http.content_type import require_json
from steer_server.http.error_route import SteerRoute
from steer_server.routes.artefacts import ArtefactBody, stored_answer
from steer_server.state import Serving, ServingDep

router = APIRouter(prefix="/v1/steering/saes/{name}", tags=["saes"], route_class=SteerRoute)


QUERY_SECONDS = 10.0
"""The time that an embedder has for what is searched for."""


class FeatureList(BaseModel):
    """Features with their labels, best match first."""

    object: str = "list"
    sae: str
    d_sae: int
    mode: Literal["text", "meaning"] = "text"
    unread: int = 0
    """Features whose labels have no embedding, which a search by meaning does not see."""
    data: list[FeatureMatch]


class LabelsRequest(BaseModel):
    """Labels to keep: an object of texts or labels by feature, or in `data` the text of a file of
    them, such as one of Neuronpedia's export."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    labels: Annotated[dict[int, str | FeatureLabel] | None, Field(min_length=1)] = None
    data: Annotated[str | None, Field(min_length=1)] = None

    def read(self) -> ReadLabels:
        """The labels; raises `SteerError`."""
        if (self.labels is None) == (self.data is None):
            raise SteerError(
                "give 'labels', or 'data' with the text of a file of them", code="invalid_labels"
            )
        if self.data is not None:
            try:
                return read_label_text(self.data)
            except SteerError as error:
                raise error.at("/data") from None
        given = {
            feature: FeatureLabel(text=one) if isinstance(one, str) else one
            for feature, one in (self.labels or {}).items()
        }
        return ReadLabels(given, "plain")


class FeatureDetectorRequest(BaseModel):
    """How a feature becomes a detector: registered as `name` (`<sae>-<feature>`), firing above
    `threshold` (its own), detecting what `detects` says (its label)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: StoredName | None = None
    threshold: Number | None = None
    detects: Annotated[str | None, Field(min_length=1, max_length=4096)] = None


class LabelSources(BaseModel):
    """The sources of labels beside an SAE; `own` counts the labels in the SAE itself."""

    object: str = "list"
    sae: str
    own: int
    data: list[LabelSource]


class LabelsDeleted(BaseModel):
    """What was removed."""

    source: str
    deleted: bool = True


@router.get("/features")
async def search_features(
    name: str,
    serving: ServingDep,
    q: Annotated[str | None, Query(max_length=256)] = None,
    limit: Annotated[int, Query(ge=1, le=1000)] = 20,
    mode: Literal["text", "meaning"] = "text",
) -> FeatureList:
    """Features whose labels speak of `q`, by their words or (`mode`) by what they mean; without
    `q`, labelled features in order."""
    if mode == "meaning":
        search = partial(_by_meaning, serving, name, q, limit)
        return await to_thread.run_sync(search, limiter=serving.search_threads)
    return await to_thread.run_sync(_by_text, serving, name, q, limit)


def _by_text(serving: Serving, name: str, q: str | None, limit: int) -> FeatureList:
    sae, labels = serving.registry.sae(name), serving.registry.labels(name)
    if q:
        found = list(search_labels(labels, q, limit=limit))
    else:
        listed = itertools.islice(labels, limit)
        found = [FeatureMatch(feature=i, label=labels[i], score=1.0) for i in listed]
    return FeatureList(sae=sae.card.name, d_sae=sae.d_sae, data=found)


def _by_meaning(serving: Serving, name: str, q: str | None, limit: int) -> FeatureList:
    if not (q and q.strip()):
        raise SteerError(
            "'q' goes with mode=meaning: say what the features are to be about",
            param="q",
            code="invalid_value",
        )
    embedder = named_embedder(serving.settings.asked_embedder)
    sae = serving.registry.sae(name)
    # Somebody waits for it: one more try, and not for long.
    quick = replace(embedder, retries=1, timeout=QUERY_SECONDS)
    found = search_by_meaning(serving.registry, name, q, quick, limit=limit)
    return FeatureList(
        sae=sae.card.name,
        d_sae=sae.d_sae,
        mode="meaning",
        unread=found.labels - found.known,
        data=list(found.matches),
    )


@router.get("/features/{feature}")
def show_feature(
    name: str, feature: Annotated[int, Path(ge=0, le=2**31)], serving: ServingDep
) -> FeatureCard:
    """One feature: its label, its neighbours, and what it did where the SAE was surveyed."""
    return feature_card(serving.registry, name, feature)


@router.post(
    "/features/{feature}/detector",
    responses={200: {"model": ArtefactBody}, 201: {"model": ArtefactBody}},
    dependencies=[Depends(require_json)],
)
def register_detector(
    name: str,
    feature: Annotated[int, Path(ge=0, le=2**31)],
    body: FeatureDetectorRequest,
    serving: ServingDep,
) -> Response:
    """Registers a feature as a detector, which serves without the SAE."""
    try:
        entry, created = add_feature_detector(serving.registry, name, feature, **body.model_dump())
    except FileFormatError as error:
        raise error.at("/threshold") from None
    return stored_answer(serving, entry, created)


@router.get("/features/{feature}/family")
def show_family(
    name: str, feature: Annotated[int, Path(ge=0, le=2**31)], serving: ServingDep
) -> FamilyCard:
    """The features that fire where one does in the survey, and the spec that clamps all of them."""
    return family_card(serving.registry, name, feature)


@router.get("/labels")
def list_label_sources(name: str, serving: ServingDep) -> LabelSources:
    """The sources that the labels of an SAE's features come from."""
    registry = serving.registry
    sae, entry = registry.sae(name), registry.entry("sae", name)
    found = registry.side_labels.sources(entry.sha256)
    return LabelSources(sae=sae.card.name, own=len(sae.labels), data=found)


@router.put("/labels/{source}", dependencies=[Depends(require_json)])
def save_labels(name: str, source: str, body: LabelsRequest, serving: ServingDep) -> LabelSource:
    """Keeps labels under a source's name, in the place of its older ones of the same features."""
    registry = serving.registry
    sae, read = registry.sae(name), body.read()
    try:
        read.check(sae.d_sae, sae.layer)
    except SteerError as error:
        raise error.at("/labels" if body.labels is not None else "/data") from None
    sha256 = registry.entry("sae", name).sha256
    return registry.side_labels.keep(sha256, source, "imported", read.labels)


@router.delete("/labels/{source}")
def delete_labels(name: str, source: str, serving: ServingDep) -> LabelsDeleted:
    """Removes the labels of one source."""
    serving.registry.side_labels.remove(serving.registry.entry("sae", name).sha256, source)
    return LabelsDeleted(source=source)
