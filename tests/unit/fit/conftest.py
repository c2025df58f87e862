from __future__ import annotations

from collections.abc import Iterator

import pytest
from tiny_models import byte_model

from steer.engines.fake.engine import ByteTokenizer
from steer.engines.transformers.engine import TransformersEngine


@pytest.fixture(scope="package")
def engine() -> Iterator[TransformersEngine]:
    """A random three-layer model over bytes."""
    model = byte_model()
    with TransformersEngine(model, ByteTokenizer(), name="tiny", rows=8, slots=16) as running:
        yield running


@pytest.fixture(scope="package")
def lively() -> Iterator[TransformersEngine]:
    """The same with larger weights: its blocks move the stream, and its words can be chosen."""
    model = byte_model(initializer_range=0.2)
    with TransformersEngine(model, ByteTokenizer(), name="lively", rows=8, slots=16) as running:
        yield running
