"""The kinds of job that a server offers: one file each, listed here."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from steer.jobs.fit_job import FIT
from steer.jobs.import_job import Fetch, import_kind
from steer.jobs.kind import JobKinds
from steer.jobs.sweep_job import SWEEP


def builtin_kinds(fetchers: Mapping[str, Fetch] = MappingProxyType({})) -> JobKinds:
    """Every kind by name; `fetchers` are the URL schemes that imports may come from."""
    kinds = (FIT, SWEEP, import_kind(fetchers))
    return MappingProxyType({kind.name: kind for kind in kinds})
