"""Coordinates along vectors, against least squares by hand in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from steer.artefacts.control_vector import ControlVector
from steer.artefacts.library import MemoryLibrary
from steer.engines.base import Engine
from steer.errors import SteerError
from steer.inspection import (
    CoordinatesRequest,
    CoordinatesResult,
    coordinates,
    coordinates_scatter,
)

TEXTS = ("the river runs", "a stone falls", "bread is warm", "the moon")


def library_of(*rows: torch.Tensor) -> MemoryLibrary:
    return MemoryLibrary(
        {f"v{n}": ControlVector.of({1: row}, name=f"v{n}") for n, row in enumerate(rows)}
    )


def drawn(count: int) -> torch.Tensor:
    return torch.randn(count, 32, generator=torch.Generator().manual_seed(5))


def read(engine: Engine, library: MemoryLibrary, **fields: Any) -> CoordinatesResult:
    body = {"prompts": [{"text": text} for text in TEXTS], "layer": 1, **fields}
    return coordinates(engine, CoordinatesRequest.model_validate(body), library=library)


@pytest.mark.parametrize("origin", ["mean", "zero"])
@pytest.mark.parametrize("count", [1, 2, 5])
def test_coordinates_are_least_squares(subject: Any, origin: str, count: int) -> None:
    rows = drawn(count)
    rows[-1] = rows[-1] + 2 * rows[0]  # far from a right angle
    names = [f"v{n}" for n in range(count)]
    result = read(subject.engine, library_of(*rows), vectors=names, origin=origin)
    x = torch.stack(
        [subject.states(tuple(subject.engine.tokenizer.encode(text)))[1][-1] for text in TEXTS]
    )
    y = x.double().numpy()
    y = y - y.mean(0) if origin == "mean" else y
    units = (rows / rows.norm(dim=-1, keepdim=True)).double().numpy()
    wanted, *_ = np.linalg.lstsq(units.T, y.T, rcond=None)
    for n, one in enumerate(result.points):
        assert one.coordinates == pytest.approx(wanted[:, n].tolist(), abs=1e-4)
        rest = y[n] - wanted[:, n] @ units
        assert one.explained == pytest.approx(1 - (rest @ rest) / (y[n] @ y[n]), abs=1e-5)
    assert np.allclose(result.cosines, units @ units.T, atol=1e-6)
    made = wanted.T @ units
    assert result.explained == pytest.approx((made**2).sum() / (y**2).sum(), abs=1e-5)
    assert 0.0 < result.by_chance < 1.0


def test_a_state_made_of_vectors_has_their_multiples(subject: Any) -> None:
    x = subject.states(tuple(subject.engine.tokenizer.encode(TEXTS[0])))[1][-1]
    one = drawn(1)[0]
    rest = x - 3 * one / one.norm()
    library = library_of(one, rest)
    prompts = [{"text": TEXTS[0]}]
    result = read(subject.engine, library, prompts=prompts, vectors=["v0", "v1"], origin="zero")
    (point,) = result.points
    assert point.coordinates == pytest.approx([3.0, float(rest.norm())], abs=1e-3)
    assert point.explained == pytest.approx(1.0, abs=1e-5)
    moved = coordinates_scatter(result)
    assert moved.points == [point.coordinates[:2]]


def test_the_others_matter_to_the_mean_alone(subject: Any) -> None:
    library = library_of(*drawn(2))
    every = read(subject.engine, library, vectors=["v0", "v1"], origin="zero")
    alone = read(
        subject.engine,
        library,
        prompts=[{"text": TEXTS[2]}],
        vectors=["v1", "v0"],
        origin="zero",
    )
    backwards = alone.points[0].coordinates[::-1]
    assert backwards == pytest.approx(every.points[2].coordinates, abs=1e-5)
    centred = read(subject.engine, library, vectors=["v0", "v1"])
    for axis in (0, 1):
        assert sum(one.coordinates[axis] for one in centred.points) == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"vectors": ["v0", "v1", "v0"]}, "/vectors/2", "dependent_vectors"),
        ({"vectors": ["v0", "v1", "both"]}, "/vectors/2", "dependent_vectors"),
        ({"vectors": ["nobody"]}, "/vectors/0", "unknown_vector"),
        ({"vectors": ["v0", "early"]}, "/vectors/1", "layer_not_in_vector"),
        ({"vectors": ["v0"], "layer": 3}, "/layer", "layer_out_of_range"),
        ({"vectors": ["v0"], "site": "attn_out"}, "/vectors/0", "wrong_site"),
        ({"vectors": ["v0"], "position": "moon"}, "/position", "text_not_found"),
        ({"vectors": ["v0"], "prompts": [{"text": "a"}, {"tokens": [9999]}]}, None, None),
    ],
)
def test_what_has_no_coordinates_is_refused(
    subject: Any, fields: dict[str, Any], param: str | None, code: str | None
) -> None:
    rows = drawn(3)
    early = ControlVector.of({0: rows[2], 2: rows[2]}, name="early")
    both = ControlVector.of({1: rows[0] - 2 * rows[1]}, name="both")
    library = MemoryLibrary({**library_of(*rows).vectors, "early": early, "both": both})
    with pytest.raises(SteerError) as caught:
        read(subject.engine, library, **fields)
    if code is None:
        assert (caught.value.param or "").startswith("/prompts/1")
        return
    assert (caught.value.param, caught.value.code) == (param, code)


def test_one_prompt_has_no_mean_of_its_own() -> None:
    with pytest.raises(ValueError, match="one prompt is its own mean"):
        CoordinatesRequest.model_validate(
            {"prompts": [{"text": "a"}], "vectors": ["v0"], "layer": 1}
        )


def test_pictures_are_the_same_bytes_each_time(subject: Any) -> None:
    result = read(subject.engine, library_of(*drawn(2)), vectors=["v0", "v1"])
    scatter = coordinates_scatter(result)
    assert scatter.axes == ("v0", "v1")
    assert scatter.png().startswith(b"\x89PNG")
    assert scatter.png() == scatter.png()
    line = coordinates_scatter(read(subject.engine, library_of(*drawn(1)), vectors=["v0"]))
    assert [up for _, up in line.points] == [0.0, 1.0, 2.0, 3.0]
