"""The kinds of job that a server offers: one file each, listed here."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from steer.fit.features.asked.embedder import Embedder
from steer.fit.features.labeller import Labeller
from steer.fit.requests.table import FIT_REQUESTS
from steer.formats.hub import MAX_BYTES, fetch, parse_hub_ref
from steer.jobs.kinds.asked import embed_kind, labels_kind, score_kind
from steer.jobs.kinds.calibrate import CALIBRATE
from steer.jobs.kinds.capture import capture_kind
from steer.jobs.kinds.evaluate import evaluate_kind
from steer.jobs.kinds.features import CONTRAST, EFFECT, SUGGEST, SURVEY, TRUST
from steer.jobs.kinds.fit import fit_kind
from steer.jobs.kinds.importing import Download, Fetch, import_kind
from steer.jobs.kinds.kind import JobKind, JobKinds, Report
from steer.jobs.kinds.make import MAKE
from steer.jobs.kinds.sae_training import TRAIN
from steer.jobs.kinds.suite import suite_kind
from steer.jobs.kinds.sweep import sweep_kind
from steer.jobs.limits import CaptureRoom
from steer.plan.resolve import Policy


def hub(max_bytes: int = MAX_BYTES) -> Mapping[str, Fetch]:
    """Imports from the Hugging Face hub, of up to `max_bytes` each."""

    def from_hub(source: str, _folder: Path, _progress: Report) -> Download:
        fetched = fetch(parse_hub_ref(source), max_bytes=max_bytes)
        return Download(fetched.path, fetched.origin)

    return MappingProxyType({"hf": from_hub})


def builtin_kinds(
    fetchers: Mapping[str, Fetch] = MappingProxyType({}),
    policy: Policy = Policy(),  # noqa: B008 - frozen
    *,
    captures: CaptureRoom = CaptureRoom(),  # noqa: B008 - frozen
    embedder: Embedder | None = None,
    labeller: Labeller | None = None,
) -> JobKinds:
    """Every kind by name; `fetchers` are the URL schemes that imports may come from, `policy` what
    clients' specs may do, `captures` what states may take, `embedder` and `labeller` the models
    that jobs may ask."""
    kinds: tuple[JobKind[Any], ...] = (
        *(fit_kind(request) for request in FIT_REQUESTS),
        sweep_kind(policy),
        CALIBRATE,
        MAKE,
        evaluate_kind(policy),
        suite_kind(policy),
        capture_kind(policy, captures),
        SURVEY,
        CONTRAST,
        TRAIN,
        EFFECT,
        embed_kind(embedder),
        labels_kind(labeller),
        score_kind(labeller),
        SUGGEST,
        TRUST,
        import_kind(fetchers),
    )
    return MappingProxyType({kind.name: kind for kind in kinds})
