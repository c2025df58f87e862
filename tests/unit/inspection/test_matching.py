"""Vectors that states match, against cosines by hand and planted concepts, and chance as chance."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from steer.artefacts.control_vector import ControlVector
from steer.artefacts.library import MemoryLibrary
from steer.engines.base import Engine
from steer.engines.fake.engine import FakeEngine
from steer.errors import SteerError
from steer.inspection import MatchRequest, MatchResult, match, match_heat_map
from steer.inspection.matching.background import PLAIN_TEXTS, backgrounds
from steer.model import HookPoint
from steer.plan.cache import PlanCache

TEXT = "the river runs"
POINT = HookPoint(1)


def read(engine: Engine, library: Any = None, **fields: Any) -> MatchResult:
    return match(engine, MatchRequest.model_validate({"text": TEXT, **fields}), library=library)


def states_of(subject: Any, text: str, layer: int) -> torch.Tensor:
    return subject.states(tuple(subject.engine.tokenizer.encode(text)))[layer]


def cosine(one: np.ndarray, other: np.ndarray) -> float:
    return float(one @ other / np.linalg.norm(one) / np.linalg.norm(other))


def test_a_match_is_what_it_is_by_hand(subject: Any) -> None:
    rows = torch.randn(3, 32, generator=torch.Generator().manual_seed(1))
    library = MemoryLibrary(
        {
            "joy": ControlVector.of({1: rows[0], 2: rows[1]}, name="joy"),
            "calm": ControlVector.of({0: rows[2]}, name="calm"),
        }
    )
    result = read(subject.engine, library, layers=[1, 2], positions=[2, -1])
    assert result.vectors == ("calm", "joy")
    last = len(result.tokens) - 1
    assert len(result.matches) == 2 * 2 * 2
    for one in result.matches:
        row = rows[2] if one.vector == "calm" else rows[one.layer - 1]
        v = row.double().numpy()
        x = states_of(subject, TEXT, one.layer)[one.position].double().numpy()
        others = [states_of(subject, text, one.layer)[1:] for text in PLAIN_TEXTS]
        background = torch.cat(others).double().numpy()
        assert result.background == len(background)
        centred = background - background.mean(0)
        assert one.position in (2, last)
        assert one.cosine == pytest.approx(cosine(x, v), abs=1e-5)
        assert one.projection == pytest.approx(float(x @ v / np.linalg.norm(v)), abs=1e-4)
        found = cosine(x - background.mean(0), v)
        assert one.match == pytest.approx(found, abs=1e-5)
        generator = np.random.default_rng(0)
        drawn = generator.standard_normal((4000, len(centred))) @ centred
        chance = drawn @ (x - background.mean(0))
        chance /= np.linalg.norm(drawn, axis=1) * np.linalg.norm(x - background.mean(0))
        assert one.standing == pytest.approx(found / chance.std(), rel=0.06, abs=0.01)
        assert one.p == pytest.approx(float((np.abs(chance) >= abs(found)).mean()), abs=0.04)


def test_a_planted_concept_is_found_first(subject: Any) -> None:
    texts = [f"{word} day" for word in ("cold", "bright", "slow", "green", "loud", "old", "far")]
    (background,) = backgrounds(subject.engine, PLAIN_TEXTS, [POINT]).values()
    rows = {
        text: (states_of(subject, text, 1)[-4].double() - background.mean).float() for text in texts
    }
    generator = torch.Generator().manual_seed(2)
    noise = {f"noise {n}": torch.randn(32, generator=generator) for n in range(20)}
    library = MemoryLibrary(
        {
            name: ControlVector.of({1: row}, name=name.replace(" ", "-"))
            for name, row in {**rows, **noise}.items()
        }
    )
    for text in texts:
        result = read(subject.engine, library, text=text, positions=[-4], layers=[1])
        first = result.matches[0]
        assert (first.vector, first.match) == (text, pytest.approx(1.0, abs=1e-4))
        assert first.p * len(result.vectors) < 0.05
        standings = [abs(one.standing) for one in result.matches]
        assert standings == sorted(standings, reverse=True)


def test_directions_that_vary_as_states_do_are_chance(subject: Any) -> None:
    (background,) = backgrounds(subject.engine, PLAIN_TEXTS, [POINT]).values()
    drawn = background.directions(200, seed=77)
    library = MemoryLibrary(
        {f"r{n}": ControlVector.of({1: row.float()}, name=f"r{n}") for n, row in enumerate(drawn)}
    )
    result = read(subject.engine, library, layers=[1])
    shares = torch.tensor([one.p for one in result.matches])
    assert len(shares) == 200
    for level in (0.1, 0.5, 0.9):
        assert float((shares <= level).double().mean()) == pytest.approx(level, abs=0.09)
    standings = torch.tensor([one.standing for one in result.matches])
    assert float(standings.std()) == pytest.approx(1.0, abs=0.15)


def test_the_length_and_the_others_of_a_vector_do_not_matter(subject: Any) -> None:
    row = torch.randn(32, generator=torch.Generator().manual_seed(3))
    other = ControlVector.of({1: torch.ones(32)}, name="other")
    alone = MemoryLibrary({"v": ControlVector.of({1: row}, name="v")})
    longer = MemoryLibrary({"v": ControlVector.of({1: 50 * row}, name="v"), "other": other})
    one = read(subject.engine, alone, layers=[1]).matches[0]
    many = read(subject.engine, longer, layers=[1], positions="all").matches
    (same,) = [m for m in many if m.vector == "v" and m.position == one.position]
    for field in ("cosine", "projection", "match", "standing", "p"):
        assert getattr(same, field) == pytest.approx(getattr(one, field), abs=1e-6)
    assert read(subject.engine, alone, layers=[1]).matches[0] == one
    drawn = read(subject.engine, alone, layers=[1], seed=9).matches[0]
    assert drawn.cosine == one.cosine
    assert drawn.standing == pytest.approx(one.standing, rel=0.1)


def test_all_leaves_out_what_is_not_read_and_says_so(subject: Any) -> None:
    wide = torch.ones(32)
    library = MemoryLibrary(
        {
            "early": ControlVector.of({0: wide, 1: wide}, name="early"),
            "late": ControlVector.of({1: wide, 2: wide}, name="late"),
            "added": ControlVector.of({2: wide}, name="added", site="attn_out"),
            "narrow": ControlVector.of({2: torch.ones(3)}, name="narrow"),
        }
    )
    result = read(subject.engine, library, layers=[2])
    assert (result.vectors, result.left_out) == (("late",), ("added", "early"))
    every = read(subject.engine, library)
    assert [(one.layer, one.vector) for one in every.matches if one.vector == "early"] == [
        (0, "early"),
        (1, "early"),
    ]


def test_steering_shows(subject: Any) -> None:
    row = torch.randn(32, generator=torch.Generator().manual_seed(4))
    library = MemoryLibrary({"joy": ControlVector.of({1: row}, name="joy")})
    plans = PlanCache(library, subject.engine.info, subject.engine.capabilities)
    spec = {"interventions": [{"kind": "add", "vector": "joy", "strength": 40.0}]}
    request = MatchRequest.model_validate({"text": TEXT, "layers": [1], "steering": spec})
    steered = match(subject.engine, request, library=library, plans=plans)
    plain = read(subject.engine, library, layers=[1])
    assert steered.fingerprint is not None
    assert steered.matches[0].match > 0.9 > plain.matches[0].match
    assert steered.background == plain.background


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"vectors": ["nobody"]}, "/vectors/0", "unknown_vector"),
        ({"vectors": ["two", "narrow"]}, "/vectors/1", "wrong_width"),
        ({"vectors": ["added"]}, "/vectors/0", "wrong_site"),
        ({"vectors": ["two"], "layers": [1]}, "/vectors/0", "layer_not_in_vector"),
        ({"layers": [1]}, "/vectors", "no_vectors"),
        ({"layers": [7]}, "/layers/0", "layer_out_of_range"),
        ({"positions": [99]}, "/positions/0", "position_out_of_range"),
        ({"background": ["too short"]}, "/background", "too_few_texts"),
        ({"background": ["word " * 400]}, "/background", "too_large"),
    ],
)
def test_what_cannot_be_matched_is_refused(
    subject: Any, fields: dict[str, Any], param: str, code: str
) -> None:
    wide = torch.ones(32)
    library = MemoryLibrary(
        {
            "two": ControlVector.of({0: wide, 2: wide}, name="two"),
            "narrow": ControlVector.of({0: torch.ones(3)}, name="narrow"),
            "added": ControlVector.of({0: wide}, name="added", site="attn_out"),
        }
    )
    with pytest.raises(SteerError) as caught:
        read(subject.engine, library, **fields)
    assert (caught.value.param, caught.value.code) == (param, code)


def test_a_library_that_cannot_be_listed_needs_names() -> None:
    class Closed:
        def vector(self, ref: str) -> ControlVector:
            return ControlVector.of({1: torch.ones(16)}, name=ref)

    with pytest.raises(SteerError, match="name the vectors") as caught:
        read(FakeEngine(), Closed(), background=["a" * 40])
    assert caught.value.code == "no_vectors"
    assert read(FakeEngine(), Closed(), vectors=["up"], background=["a" * 40]).vectors == ("up",)


def test_more_vectors_than_can_be_told_apart_must_be_named() -> None:
    one = ControlVector.of({1: torch.ones(16)}, name="v")
    library = MemoryLibrary({f"v{n:03d}": one for n in range(257)})
    with pytest.raises(SteerError, match="more than 256") as caught:
        read(FakeEngine(), library)
    assert caught.value.code == "too_many_vectors"


def test_the_picture_frames_what_is_no_chance(subject: Any) -> None:
    (background,) = backgrounds(subject.engine, PLAIN_TEXTS, [POINT]).values()
    planted = (states_of(subject, TEXT, 1)[-1].double() - background.mean).float()
    noise = torch.randn(32, generator=torch.Generator().manual_seed(6))
    library = MemoryLibrary(
        {
            "planted": ControlVector.of({1: planted}, name="planted"),
            "noise": ControlVector.of({0: noise, 2: noise}, name="noise"),
        }
    )
    heat = match_heat_map(read(subject.engine, library))
    assert (list(heat.rows), list(heat.columns)) == (["noise", "planted"], ["0", "1", "2"])
    assert (1, 1) in heat.marked
    assert heat.texts[0][1] == ""
    assert heat.png().startswith(b"\x89PNG")
    wide = match_heat_map(read(subject.engine, library, positions=[0, 1]))
    assert len(wide.columns) == 6
