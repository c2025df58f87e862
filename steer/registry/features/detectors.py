"""A feature of a registered SAE as a registered detector."""

from __future__ import annotations

from steer.artefacts.detector import Detector
from steer.registry.entry import Entry
from steer.registry.registry import Registry


def add_feature_detector(
    registry: Registry,
    sae: str,
    feature: int,
    *,
    name: str | None = None,
    threshold: float | None = None,
    detects: str | None = None,
) -> tuple[Entry, bool]:
    """Registers the detector that `feature` of the SAE named `sae` is, as `name` or
    `<sae>-<feature>`; whether it is a new version.

    It detects what the feature's label says unless `detects` says it. Raises what
    `Detector.of_feature` raises, and `UnknownArtefact`.
    """
    found = registry.sae(sae)
    detector = Detector.of_feature(found, feature, threshold=threshold, detects=detects or "")
    label = registry.labels(sae).get(feature)
    if not detects and label is not None:
        detector = Detector.of_feature(found, feature, threshold=threshold, detects=label.text)
    return registry.add(name or f"{sae.partition('@')[0]}-{feature}", detector)
