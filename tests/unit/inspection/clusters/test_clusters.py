"""Clusters of states: concepts that were planted are found again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from steer.artefacts.control_vector import ControlVector
from steer.artefacts.library import MemoryLibrary
from steer.engines.base import Captured, CaptureRequest, Engine
from steer.engines.fake.engine import FakeEngine
from steer.errors import SteerError, TooLarge
from steer.inspection import (
    CLUSTERS,
    ClustersRequest,
    ClustersResult,
    clusters,
)
from steer.inspection.clusters.tree import cut_tree, directions, purity, purity_by_chance
from steer.model import HookPoint
from steer.plan.cache import PlanCache

CONCEPTS, EACH = 5, 24


class PlantedEngine(FakeEngine):
    """States of the token n are those of concept n mod `CONCEPTS`, some far from others, around a
    mean that is longer than all of them, each with noise and a length of its own."""

    noise = 0.5

    def capture(self, request: CaptureRequest) -> list[Captured]:
        self.asked = [*getattr(self, "asked", []), request]
        return [
            Captured({point: self._planted(list(prompt), request) for point in request.points})
            for prompt in request.prompts
        ]

    def _planted(self, prompt: Sequence[int], request: CaptureRequest) -> Tensor:
        drawn = torch.Generator().manual_seed(0)
        concepts = torch.randn(CONCEPTS, 16, generator=drawn)
        mean = 20.0 * torch.randn(16, generator=drawn)
        rows = []
        for place in request.positions or range(len(prompt)):
            token = prompt[place]
            own = torch.Generator().manual_seed(1000 + token)
            noise = self.noise * torch.randn(16, generator=own)
            length = 0.5 + 2.0 * torch.rand(1, generator=own)
            rows.append(mean + length * (concepts[token % CONCEPTS] + noise))
        return torch.stack(rows)


def planted(*, labels: bool = True, **fields: Any) -> ClustersRequest:
    prompts = [
        {"tokens": [1, n]} | ({"label": f"concept {n % CONCEPTS}"} if labels else {})
        for n in range(CONCEPTS * EACH)
    ]
    return ClustersRequest.model_validate({"prompts": prompts, "layer": 2, **fields})


@pytest.mark.parametrize("linkage", ["ward", "average", "complete"])
def test_planted_concepts_are_found_again(linkage: str) -> None:
    result = clusters(PlantedEngine(), planted(clusters=CONCEPTS, linkage=linkage))
    assert result.purity is not None
    assert result.purity_by_chance is not None
    assert result.purity >= 0.8
    assert result.purity_by_chance < 0.45
    assert sum(one.size for one in result.clusters) == CONCEPTS * EACH == len(result.states)
    for one in result.clusters:
        assert one.labels is not None
        best = next(iter(one.labels))
        assert {exemplar.label for exemplar in one.exemplars} == {best}
        assert one.purity == pytest.approx(one.labels[best] / sum(one.labels.values()))
        assert one.middles[one.number] == pytest.approx(1.0)
        near = [exemplar.similarity for exemplar in one.exemplars]
        assert near == sorted(near, reverse=True)
        assert near[0] >= one.similarity
    sizes = [one.size for one in result.clusters]
    assert sizes == sorted(sizes, reverse=True)


def test_without_a_number_the_best_parted_is_taken() -> None:
    engine = PlantedEngine()
    engine.noise = 0.2
    result = clusters(engine, planted())
    assert len(result.clusters) == CONCEPTS
    assert result.purity == 1.0
    assert result.silhouette is not None
    for other in (3, 8):
        forced = clusters(engine, planted(clusters=other)).silhouette
        assert forced is not None
        assert forced < result.silhouette


def test_what_is_noise_is_no_purer_than_by_chance() -> None:
    engine = PlantedEngine()
    engine.noise = 200.0
    result = clusters(engine, planted(clusters=CONCEPTS))
    assert result.purity == pytest.approx(result.purity_by_chance, abs=0.1)


def same(one: ClustersResult, other: ClustersResult) -> bool:
    return [x.cluster for x in one.states] == [x.cluster for x in other.states]


def test_clusters_do_not_depend_on_the_order_of_prompts() -> None:
    request = planted(clusters=CONCEPTS)
    turned = request.model_copy(update={"prompts": request.prompts[::-1]})
    one, other = clusters(PlantedEngine(), request), clusters(PlantedEngine(), turned)
    assert one.purity == other.purity
    assert [x.size for x in one.clusters] == [x.size for x in other.clusters]


def test_prompts_of_any_length_are_read_together_at_their_last_token() -> None:
    engine = PlantedEngine()
    prompts = [{"tokens": [1] * (n % 7 + 1) + [n]} for n in range(20)]
    read = clusters(engine, ClustersRequest.model_validate({"prompts": prompts, "layer": 0}))
    assert [len(one.prompts) for one in engine.asked] == [20]
    assert [one.position for one in read.states] == [n % 7 + 1 for n in range(20)]


def test_several_tokens_of_a_prompt_are_states_of_their_own() -> None:
    prompts = [{"tokens": list(range(n, n + 10)), "label": "x"} for n in (1, 51)]
    body = {"prompts": prompts, "layer": 0, "positions": "all", "clusters": CONCEPTS}
    result = clusters(PlantedEngine(), ClustersRequest.model_validate(body))
    assert len(result.states) == 20
    found: dict[int, set[int]] = {}
    for one in result.states:
        token = prompts[one.prompt]["tokens"][one.position]  # type: ignore[index]
        found.setdefault(one.cluster, set()).add(int(token) % CONCEPTS)
    assert [len(concepts) for concepts in found.values()] == [1] * CONCEPTS


def test_scale_and_mean_do_not_matter() -> None:
    states = torch.randn(40, 8, generator=torch.Generator().manual_seed(3))
    plain = cut_tree(directions(states), "ward", 4, 16)
    moved = cut_tree(directions(7.0 * states + 30.0), "ward", 4, 16)
    assert moved.numbers == plain.numbers


def test_states_that_are_all_the_same_are_one_cluster() -> None:
    units = directions(torch.full((6, 4), 3.3))
    assert units.abs().max() == 0.0
    assert cut_tree(units, "ward", 3, 16).numbers == (0,) * 6


def test_purity_by_hand() -> None:
    numbers, labels = (0, 0, 0, 1, 1, 2), ("a", "a", "b", "b", None, None)
    assert purity(numbers, labels) == pytest.approx(3 / 4)
    assert purity(numbers, (None,) * 6) is None
    assert purity_by_chance(numbers, (None,) * 6) is None
    # Clusters of one are pure whatever they hold.
    assert purity_by_chance(tuple(range(6)), ("a", "b") * 3) == 1.0


def test_steering_moves_what_is_clustered() -> None:
    engine: Engine = FakeEngine()
    library = MemoryLibrary({"up": ControlVector.of({1: torch.ones(16)}, name="up")})
    plans = PlanCache(library, engine.info, engine.capabilities)
    edit = {"interventions": [{"kind": "add", "vector": "up"}]}
    request = planted(clusters=3)
    plain = clusters(engine, request)
    body = {**request.model_dump(exclude_none=True), "steering": edit}
    steered = clusters(engine, ClustersRequest.model_validate(body), plans=plans)
    assert plain.fingerprint is None
    assert steered.fingerprint is not None
    assert not same(plain, steered)


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"clusters": 121}, "/prompts", "too_few_states"),
        ({"layer": 99}, "/layer", "layer_out_of_range"),
        ({"positions": [5]}, "/positions/0", "position_out_of_range"),
    ],
)
def test_what_cannot_be_clustered_is_refused(fields: dict[str, Any], param: str, code: str) -> None:
    with pytest.raises(SteerError) as caught:
        clusters(PlantedEngine(), planted(**fields))
    assert (caught.value.param, caught.value.code) == (param, code)


def test_too_many_states_are_refused() -> None:
    prompts = [{"tokens": [1] * 500}] * 9
    body = {"prompts": prompts, "layer": 0, "positions": "all"}
    with pytest.raises(TooLarge, match="at most 4,096"):
        clusters(FakeEngine(), ClustersRequest.model_validate(body))


@pytest.mark.parametrize("labels", [True, False])
def test_the_picture(labels: bool) -> None:
    result = clusters(PlantedEngine(), planted(clusters=4, labels=labels))
    heat = CLUSTERS.draw(result)
    assert heat.png().startswith(b"\x89PNG")
    assert len(heat.columns) == (CONCEPTS if labels else 4)  # type: ignore[attr-defined]


def test_states_of_a_real_model(subject: Any) -> None:
    prompts = [{"text": text} for text in ("the river", "a boat", "the river", "rain", "a boat")]
    body = {"prompts": prompts, "layer": 1, "clusters": 3}
    result = clusters(subject.engine, ClustersRequest.model_validate(body))
    numbers = [one.cluster for one in result.states]
    assert (numbers[0], numbers[1]) == (numbers[2], numbers[4])
    assert len(set(numbers)) == 3
    assert HookPoint(1).site == result.site
    exemplar = result.clusters[0].exemplars[0]
    assert (exemplar.text, exemplar.token) == ("<|bos|>the river", "r")
