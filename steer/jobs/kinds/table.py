"""The kinds of job that a server offers: one file each, listed here."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from steer.formats.hub import fetch, parse_hub_ref
from steer.jobs.kinds.calibrate import CALIBRATE
from steer.jobs.kinds.evaluate import EVALUATE
from steer.jobs.kinds.fit import FIT
from steer.jobs.kinds.importing import Download, Fetch, import_kind
from steer.jobs.kinds.kind import JobKinds, Report
from steer.jobs.kinds.sweep import SWEEP


def _from_hub(source: str, _folder: Path, _progress: Report) -> Download:
    fetched = fetch(parse_hub_ref(source))
    return Download(fetched.path, fetched.origin)


HUB: Mapping[str, Fetch] = MappingProxyType({"hf": _from_hub})
"""Imports from the Hugging Face hub."""


def builtin_kinds(fetchers: Mapping[str, Fetch] = MappingProxyType({})) -> JobKinds:
    """Every kind by name; `fetchers` are the URL schemes that imports may come from."""
    kinds = (FIT, SWEEP, CALIBRATE, EVALUATE, import_kind(fetchers))
    return MappingProxyType({kind.name: kind for kind in kinds})
