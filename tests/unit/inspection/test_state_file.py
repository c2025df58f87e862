"""States as a file: the same numbers as in JSON, however they were read."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from safetensors.torch import load

from steer.artefacts.control_vector import ControlVector
from steer.artefacts.library import MemoryLibrary
from steer.errors import SteerError
from steer.inspection import state_file
from steer.inspection.activations import ActivationsRequest, activations, activations_file
from steer.plan.cache import PlanCache

LIBRARY = MemoryLibrary({"joy": ControlVector.of({1: torch.ones(32)}, name="joy")})
STEERED = {"interventions": [{"kind": "add", "vector": "joy", "strength": 2.0}]}


@pytest.mark.parametrize("held", [1, 100, 32 * 7, 32 * 16, 1 << 24])
@pytest.mark.parametrize("steering", [None, STEERED])
def test_the_file_holds_what_json_holds(
    subject: Any, monkeypatch: pytest.MonkeyPatch, held: int, steering: Any
) -> None:
    monkeypatch.setattr(state_file, "PIECE_NUMBERS", held)
    plans = PlanCache(LIBRARY, subject.engine.info, subject.engine.capabilities)
    request = ActivationsRequest.model_validate(
        {"text": "café", "states": True, "positions": [-1, 0, 2, 3], "steering": steering}
    )
    file = activations_file(subject.engine, request, plans=plans)
    data = b"".join(file.pieces)
    assert len(data) == file.size
    found = load(data)
    expected = activations(subject.engine, request, plans=plans)
    assert found.pop("positions").tolist() == list(expected.positions)
    assert sorted(found) == [f"layers.{entry.layer}" for entry in expected.layers]
    for entry in expected.layers:
        assert torch.equal(found[f"layers.{entry.layer}"], torch.tensor(entry.states))


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"vectors": ["joy"]}, "/vectors"),
        ({"sae": "features"}, "/sae"),
        ({"positions": [99]}, "/positions/0"),
        ({"layers": [99]}, "/layers/0"),
        (
            {"steering": {"interventions": [{"kind": "add", "vector": "no"}]}},
            "/steering/interventions/0/vector",
        ),
    ],
)
def test_what_a_file_cannot_hold_is_refused_before_it_begins(
    subject: Any, fields: dict[str, Any], param: str
) -> None:
    request = ActivationsRequest.model_validate({"text": "hello", **fields})
    with pytest.raises(SteerError) as caught:
        activations_file(subject.engine, request)
    assert caught.value.param == param
