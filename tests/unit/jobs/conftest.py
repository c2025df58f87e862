from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from counting_jobs import QUICK, Gate, Make

from steer.engines.fake.engine import FakeEngine
from steer.jobs import JobKind, JobLimits, JobRunner
from steer.registry.registry import Registry


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[Registry]:
    with Registry.open(tmp_path / "registry") as opened:
        yield opened


@pytest.fixture
def gate() -> Gate:
    return Gate()


@pytest.fixture
def make(registry: Registry) -> Iterator[Make]:
    """Makes runners over the fake engine, and stops them in the end."""
    made: list[JobRunner] = []

    def runner(
        kind: JobKind[Any],
        *,
        over: Registry | None = None,
        limits: JobLimits = QUICK,
        engine: Any = None,
        **options: Any,
    ) -> JobRunner:
        one = JobRunner(
            engine or FakeEngine(), over or registry, {kind.name: kind}, limits, **options
        )
        made.append(one)
        return one

    yield runner
    for one in made:
        one.stop()
