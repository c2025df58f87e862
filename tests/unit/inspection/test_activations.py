from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from steer.artefacts.control_vector import ControlVector
from steer.artefacts.library import MemoryLibrary
from steer.artefacts.sae.base import SAE
from steer.artefacts.sae.labels import FeatureLabel
from steer.engines.plans import plans_of
from steer.engines.transformers.engine import TransformersEngine
from steer.errors import SteerError
from steer.inspection.activations import ActivationsRequest, activations

TEXT = "the river runs"
WIDTH = 32


def random(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def sae_at(layer: int, width: int = WIDTH) -> SAE:
    return SAE.of(
        "relu",
        W_enc=random(4, width, 24),
        b_enc=random(5, 24),
        W_dec=random(6, 24, width),
        b_dec=random(7, width),
        layer=layer,
        labels={3: FeatureLabel(text="water")},
    )


LIBRARY = MemoryLibrary(
    vectors={
        "joy": ControlVector.of({0: random(1, WIDTH), 2: random(2, WIDTH)}, name="joy"),
        "one": ControlVector.of({1: random(3, WIDTH)}, name="one"),
        "wide": ControlVector.of({0: random(3, WIDTH + 1)}, name="wide"),
        "inside": ControlVector.of({0: random(3, WIDTH)}, name="inside", site="mlp_out"),
    },
    saes={"features": sae_at(1), "deep": sae_at(9), "broad": sae_at(1, WIDTH + 1)},
)


def read(engine: TransformersEngine, **fields: Any) -> Any:
    plans = plans_of(engine, LIBRARY)
    request = ActivationsRequest.model_validate({"text": TEXT, **fields})
    return activations(engine, request, library=LIBRARY, plans=plans)


def test_states_and_norms_equal_plain_hooks(subject: Any) -> None:
    ids = tuple(subject.engine.tokenizer.encode(TEXT))
    result = read(subject.engine, states=True, positions=[3, -1])
    for entry, expected in zip(result.layers, subject.states(ids), strict=True):
        wanted = expected[[3, -1]].numpy()
        np.testing.assert_allclose(np.array(entry.states), wanted, atol=1e-5)
        np.testing.assert_allclose(entry.norms, np.linalg.norm(wanted, axis=-1), atol=1e-5)


def test_readings_equal_numpy(subject: Any) -> None:
    ids = tuple(subject.engine.tokenizer.encode(TEXT))
    states = [state.double().numpy() for state in subject.states(ids)]
    result = read(subject.engine, vectors=["joy", "one"])
    # A vector is read where it has a direction; a one-row vector serves every layer.
    assert [(r.vector, r.layer) for r in result.vectors] == [
        ("joy", 0),
        ("joy", 2),
        ("one", 0),
        ("one", 1),
        ("one", 2),
    ]
    for reading in result.vectors:
        rows = LIBRARY.vectors[reading.vector].directions
        row = rows.get(reading.layer, next(iter(rows.values()))).double().numpy()
        unit = row / np.linalg.norm(row)
        projections = states[reading.layer] @ unit
        np.testing.assert_allclose(reading.projections, projections, atol=1e-5)
        norms = np.linalg.norm(states[reading.layer], axis=-1)
        np.testing.assert_allclose(reading.cosines, projections / norms, atol=1e-5)
    assert all(entry.states is None for entry in result.layers)


def test_steering_moves_the_reading_by_what_it_adds(engine: TransformersEngine) -> None:
    spec = {"interventions": [{"kind": "add", "vector": "one", "strength": 2.5, "layers": [1]}]}
    plain = read(engine, vectors=["one"], layers=[1]).vectors[0]
    steered = read(engine, vectors=["one"], layers=[1], steering=spec)
    length = float(LIBRARY.vectors["one"].directions[1].norm())
    moved = np.array(steered.vectors[0].projections) - np.array(plain.projections)
    np.testing.assert_allclose(moved, 2.5 * length, rtol=1e-5)
    assert steered.fingerprint


def test_features_equal_the_saes_own_encoding(subject: Any) -> None:
    engine = subject.engine
    ids = tuple(engine.tokenizer.encode(TEXT))
    sae = LIBRARY.saes["features"]
    expected = sae.encode(subject.states(ids)[1])
    found = read(engine, sae="features", layers=[0], top_features=24).features
    assert (found.layer, found.site, found.d_sae) == (1, "resid_post", 24)
    assert found.active == tuple((expected > 0).sum(-1).tolist())
    for row, entries in zip(expected, found.top, strict=True):
        assert len(entries) == int((row > 0).sum())
        values = [entry.activation for entry in entries]
        assert values == sorted(values, reverse=True)
        for entry in entries:
            assert entry.activation == pytest.approx(float(row[entry.feature]), abs=1e-4)
            assert (entry.label is not None) == (entry.feature == 3)


def test_only_the_most_active_features_are_listed(engine: TransformersEngine) -> None:
    everything = read(engine, sae="features", top_features=24).features
    few = read(engine, sae="features", top_features=2).features
    assert few.active == everything.active
    assert [row[:2] for row in everything.top] == list(few.top)


def test_other_sites_have_their_own_width(engine: TransformersEngine) -> None:
    result = read(engine, states=True, site="mlp_act", positions=[-1], layers=[1])
    assert len(result.layers[0].states[0]) == engine.info.d_mlp


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"vectors": ["joy", "gone"]}, "/vectors/1", "unknown_vector"),
        ({"vectors": ["joy"], "layers": [1]}, "/vectors/0", "layer_not_in_vector"),
        ({"vectors": ["wide"]}, "/vectors/0", "wrong_width"),
        ({"vectors": ["inside"]}, "/vectors/0", "wrong_site"),
        ({"sae": "gone"}, "/sae", "unknown_sae"),
        ({"sae": "deep"}, "/sae", "layer_out_of_range"),
        ({"sae": "broad"}, "/sae", "wrong_width"),
        ({"positions": [50]}, "/positions/0", "position_out_of_range"),
        ({"positions": {"after": ["nowhere"]}}, "/positions", "nothing_selected"),
        ({"positions": {"phases": ["generation"]}}, "/positions", "nothing_selected"),
        ({"positions": {"roles": ["user"]}}, "/positions/roles", "no_messages"),
        ({"positions": {"tokens": ["two words"]}}, "/positions/tokens/0", "not_one_token"),
        ({"layers": [3]}, "/layers/0", "layer_out_of_range"),
    ],
)
def test_what_cannot_be_read_is_refused(
    engine: TransformersEngine, fields: dict[str, Any], param: str, code: str
) -> None:
    with pytest.raises(SteerError) as caught:
        read(engine, **fields)
    assert (caught.value.param, caught.value.code) == (param, code)


@pytest.mark.parametrize(
    "where",
    [
        {"roles": ["assistant"]},
        {"outside": [["is", "?"]]},
        {"positions": [[-4, None]], "except": {"after": ["now"]}},
    ],
)
def test_a_selection_reads_the_tokens_that_it_would_steer(
    engine: TransformersEngine, where: dict[str, Any]
) -> None:
    chat = {
        "text": None,
        "messages": [
            {"role": "user", "content": "who is it?"},
            {"role": "assistant", "content": "me"},
            {"role": "user", "content": "and now?"},
        ],
    }
    chosen = read(engine, **chat, states=True, positions=where)
    # Where a state is put in the place of another, it was selected.
    steering = {
        "interventions": [{"kind": "patch", "vector": "one", "layers": [1]}],
        "where": where,
    }
    steered = read(engine, **chat, states=True, layers=[1], steering=steering)
    patched = LIBRARY.vectors["one"][1].tolist()
    (layer,) = steered.layers
    assert layer.states is not None
    steered_at = [n for n, state in enumerate(layer.states) if list(state) == patched]
    assert list(chosen.positions) == steered_at
    every = read(engine, **chat, states=True)
    for one, other in zip(chosen.layers, every.layers, strict=True):
        assert one.states == tuple(other.states[n] for n in chosen.positions)


def test_too_many_numbers_are_refused(
    engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("steer.inspection.selection.check_size.__kwdefaults__", {"limit": 1000})
    assert read(engine, states=True, positions=[-1]).layers
    with pytest.raises(SteerError, match="'vectors' instead of 'states'") as caught:
        read(engine, states=True)
    assert (caught.value.status, caught.value.code) == (413, "answer_too_large")
    assert read(engine).layers


@pytest.mark.parametrize(
    "fields",
    [{}, {"text": "a", "tokens": [1]}, {"text": "a", "colour": 1}, {"text": ""}, {"tokens": [-1]}],
)
def test_a_request_has_one_prompt(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        ActivationsRequest.model_validate(fields)
