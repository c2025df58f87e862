"""Texts embedded by another server: in batches, checked, and no other place is called."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import pytest
from stub_model import StubModel, stub_model

from steer.errors import CapacityError, SteerError
from steer.fit.features.asked.embedder import LONGEST, Embedder
from steer.fit.features.asked.outside import OutsideModel


@pytest.fixture
def model() -> Iterator[StubModel]:
    with stub_model() as one:
        yield one


def embedder(model: StubModel, **options: bool) -> Embedder:
    outside = OutsideModel(model.url, "stub", "top-secret", **options)
    return Embedder(outside, batch=3, retries=0)


def test_texts_are_embedded_in_batches_and_their_order(model: StubModel) -> None:
    model.embed = lambda text: [float(len(text)), 3.0]
    texts = [f"{'x' * n}" for n in range(1, 8)]
    told: list[int] = []
    found = embedder(model).embed(texts, progress=told.append)
    exact = np.array([[n, 3.0] for n in range(1, 8)])
    exact /= np.linalg.norm(exact, axis=1, keepdims=True)
    assert np.abs(found - exact).max() < 1e-6
    assert told == [3, 3, 1]
    assert model.keys == {"Bearer top-secret"}


def test_a_long_text_is_cut(model: StubModel) -> None:
    embedder(model).embed(["y" * 5000])
    assert model.embedded == ["y" * LONGEST]


def test_no_texts_are_no_question(model: StubModel) -> None:
    assert embedder(model).embed([]).shape == (0, 0)
    assert model.embedded == []


@pytest.mark.parametrize("wrong", [[], [0.0, 0.0], [math.inf, 1.0], [math.nan]])
def test_what_is_no_embedding_is_refused(model: StubModel, wrong: list[float]) -> None:
    model.embed = lambda text: wrong
    with pytest.raises(CapacityError) as raised:
        embedder(model).embed(["a"])
    assert raised.value.code == "embedder_failed"


def test_rows_of_several_widths_are_refused(model: StubModel) -> None:
    model.embed = lambda text: [1.0] * len(text)
    for texts in (["a", "ab"], ["a", "b", "c", "abcd"]):
        with pytest.raises(CapacityError, match="widths"):
            embedder(model).embed(texts)


def test_a_server_that_refuses_is_named_to_who_named_it_and_to_nobody_else(
    model: StubModel, caplog: pytest.LogCaptureFixture
) -> None:
    model.embed = lambda text: 500
    with pytest.raises(CapacityError, match=r"127\.0\.0\.1"):
        embedder(model).embed(["a"])
    with pytest.raises(CapacityError) as raised:
        embedder(model, hidden=True).embed(["a"])
    assert "127.0.0.1" not in str(raised.value)
    assert raised.value.__cause__ is None
    for told in (str(raised.value), caplog.text, repr(embedder(model))):
        assert "top-secret" not in told


def test_a_redirection_is_not_followed(model: StubModel) -> None:
    with stub_model() as elsewhere:
        model.location, model.embed = f"{elsewhere.url}/embeddings", lambda text: 307
        with pytest.raises(CapacityError):
            embedder(model).embed(["a"])
        assert elsewhere.embedded == []


@pytest.mark.parametrize(
    ("place", "why"),
    [
        ("ftp://host/v1#model=m", "is not the URL"),
        ("http:///v1#model=m", "is not the URL"),
        ("file:///etc/passwd#model=m", "is not the URL"),
        ("http://user:pass@host/v1#model=m", "a key does not belong"),
        ("http://host/v1", "#model=NAME"),
        ("http://host/v1#model=m&scale=2", "#model=NAME"),
    ],
)
def test_a_place_that_is_none(place: str, why: str) -> None:
    with pytest.raises(SteerError, match=why) as raised:
        OutsideModel.at(place)
    assert raised.value.code == "invalid_option"
    assert "pass@" not in str(raised.value)
