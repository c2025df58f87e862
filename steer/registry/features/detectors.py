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
    label = None if detects else registry.labels(sae).get(feature)
    said = detects or ("" if label is None else label.text)
    detector = Detector.of_feature(found, feature, threshold=threshold, detects=said)
    return registry.add(name or f"{sae.partition('@')[0]}-{feature}", detector)
