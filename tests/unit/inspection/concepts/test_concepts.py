"""The probe on planted states: what two directions say is read back, and nothing without them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from artefacts import random_probe
from planted_concepts import PlantedEngine, planted_example
from pydantic import ValidationError

from steer.artefacts.concepts.network import CodeNetwork, summed_centroids
from steer.artefacts.concepts.probe import ConceptProbe
from steer.artefacts.library import MemoryLibrary
from steer.errors import SteerError
from steer.inspection import CONCEPTS, ConceptsRequest, ConceptsResult, concepts


def read(count: int = 120, **fields: Any) -> ConceptsResult:
    body = {"examples": [planted_example(n) for n in range(count)], "dimensions": 1024, **fields}
    return concepts(PlantedEngine(), ConceptsRequest.model_validate(body))


def test_planted_pairs_are_read_from_texts_that_were_not_taught() -> None:
    prompts = [{"tokens": [200, 20 * 2 + 1]}, {"tokens": [201, 20 * 0 + 2]}]
    result = read(prompts=prompts)
    assert (result.trained, result.held_out, result.fillers) == (96, 24, 7)
    assert result.layers == (3, 4, 5)
    assert result.accuracy is not None
    assert result.shuffled is not None
    assert result.accuracy >= 0.95
    assert result.shuffled < 0.65
    assert sum(one.pairs for one in result.roles) == 48
    told = [{role.role: role for role in one.roles} for one in result.readings]
    first = [{name: one.fillers[0].filler for name, one in roles.items()} for roles in told]
    assert first == [{"colour": "green", "shape": "ball"}, {"colour": "red", "shape": "cone"}]
    for roles in told:
        for one in roles.values():
            assert one.found
            assert one.fillers[0].cosine > 0.3
            assert one.fillers[0].cosine > one.fillers[1].cosine


def test_the_same_request_gives_the_same_probe() -> None:
    prompts = [{"tokens": [200, 21]}]
    state = torch.random.get_rng_state()
    one, other = read(40, prompts=prompts), read(40, prompts=prompts)
    assert one == other
    assert torch.equal(state, torch.random.get_rng_state())
    assert read(40, prompts=prompts, seed=1) != one


def test_a_filler_that_was_not_taught_is_not_counted() -> None:
    examples = [planted_example(n) for n in range(40)]
    examples = [{**one, "pairs": {"own": f"name {n}"}} for n, one in enumerate(examples)]
    body = {"examples": examples, "dimensions": 256}
    result = concepts(PlantedEngine(), ConceptsRequest.model_validate(body))
    (role,) = result.roles
    assert (role.pairs, role.unseen, role.accuracy, result.accuracy) == (0, 8, None, None)
    assert CONCEPTS.draw(result).png().startswith(b"\x89PNG")


def test_a_threshold_that_nothing_passes_finds_nothing() -> None:
    result = read(40, prompts=[{"tokens": [200, 21]}], threshold=1.0)
    assert not any(role.found for one in result.readings for role in one.roles)
    assert "–" in CONCEPTS.draw(result).texts[0]  # type: ignore[attr-defined]


def test_summed_centroids_by_hand() -> None:
    states = torch.tensor([[1.0, 0.0], [1.2, 0.0], [0.0, 5.0]])
    assert summed_centroids(states, 2) == pytest.approx(torch.tensor([1.1, 5.0]), abs=1e-6)
    assert summed_centroids(states, 5) == pytest.approx(states.sum(0), abs=1e-6)
    assert summed_centroids(states[:1].repeat(4, 1), 5) == pytest.approx(states[0], abs=1e-6)


def test_the_network_learns_what_is_no_linear_function() -> None:
    """Which of two channels' signs agree: no hyperplane parts these."""
    inputs = torch.randn(200, 2, generator=torch.Generator().manual_seed(0))
    codes = torch.where(inputs.prod(-1) > 0, 1.0, -1.0)[:, None].repeat(1, 8)
    probe = CodeNetwork.fit(inputs[:150], codes[:150])
    assert (probe.code(inputs[150:]) == codes[150:]).float().mean() > 0.9


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"layers": [99]}, "/layers/0", "layer_out_of_range"),
        ({"position": 9}, "/position", "position_out_of_range"),
        ({"examples": [{"text": "a", "pairs": {"x": "y"}}] * 10}, "/examples", "one_filler"),
    ],
)
def test_what_cannot_be_probed_is_refused(fields: dict[str, Any], param: str, code: str) -> None:
    with pytest.raises(SteerError) as caught:
        read(**fields)
    assert (caught.value.param, caught.value.code) == (param, code)


def registered(**fields: Any) -> ConceptsResult:
    probe = random_probe(1, 3, 5)
    probe = ConceptProbe(probe.network, probe.card.model_copy(update={"name": "p"}))
    body = {"probe": "p", "prompts": [{"tokens": [200, 21]}], **fields}
    library = MemoryLibrary(probes={"p": probe})
    return concepts(PlantedEngine(), ConceptsRequest.model_validate(body), library=library)


def test_a_registered_probe_reads_by_itself() -> None:
    result = registered()
    assert result.layers == (3, 5)
    assert result.probe is not None
    assert result.probe.startswith("p@")
    assert (result.trained, result.accuracy, result.roles) == (None, None, ())
    (reading,) = result.readings
    assert reading.position == 1
    assert [one.role for one in reading.roles] == ["colour", "shape"]
    assert registered(position=-2).readings[0].position == 0
    assert CONCEPTS.draw(result).png().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"probe": "nobody"}, "/probe", "unknown_probe"),
        ({"layers": [1]}, "/layers", "invalid_value"),
        ({"clusters": 5}, "/clusters", "invalid_value"),
        ({"dimensions": 256}, "/dimensions", "invalid_value"),
        ({"held_out": 5}, "/held_out", "invalid_value"),
        ({"seed": 0}, "/seed", "invalid_value"),
        ({"prompts": []}, "/prompts", "invalid_value"),
    ],
)
def test_a_registered_probe_is_not_taught_again(
    fields: dict[str, Any], param: str, code: str
) -> None:
    with pytest.raises(SteerError) as caught:
        registered(**fields)
    assert (caught.value.param, caught.value.code) == (param, code)


@pytest.mark.parametrize("given", [{}, {"probe": "p", "examples": [planted_example(0)] * 10}])
def test_one_of_examples_and_a_probe_is_given(given: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match="either 'examples'"):
        ConceptsRequest.model_validate(given)


@pytest.mark.parametrize(
    ("probe", "code"),
    [(random_probe(1, 3, width=8), "wrong_width"), (random_probe(1, 9), "layer_out_of_range")],
)
def test_a_probe_of_another_model(probe: ConceptProbe, code: str) -> None:
    request = ConceptsRequest.model_validate({"probe": "p"})
    with pytest.raises(SteerError) as caught:
        concepts(PlantedEngine(), request, library=MemoryLibrary(probes={"p": probe}))
    assert (caught.value.param, caught.value.code) == ("/probe", code)
