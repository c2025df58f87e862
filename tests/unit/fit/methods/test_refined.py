"""SAE-refined, logistic, one-against-rest and two-prompt vectors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from artefacts import random_transcoder
from torch import Tensor

from steer.artefacts.control_vector import ControlVector
from steer.artefacts.library import MemoryLibrary
from steer.artefacts.sae.base import SAE
from steer.engines.base import CaptureRequest
from steer.engines.plans import plans_of
from steer.engines.transformers.engine import TransformersEngine
from steer.errors import SteerError
from steer.fit import Pair, PairSet, fit, fit_labels, fit_two_prompts
from steer.fit.data.labels import Labelled, LabelledSet
from steer.fit.data.prompt import Marked
from steer.fit.methods.dictionaries.reservoir import Reservoir
from steer.fit.methods.fitting import split_pairs
from steer.fit.methods.logistic import MAX_ROWS, LogisticDirection
from steer.fit.methods.sae_refined import REFINABLE, SAERefined
from steer.fit.states import make_reading, read_rows
from steer.model import HookPoint
from steer.spec import parse_spec

WIDTH, LATENTS = 32, 80
WORDS = [f"{a} {b}" for a in ("red", "old", "new", "shy") for b in "abcdefgh"]
PAIRS = PairSet.of([Pair(f"the {word} sun is good", f"a {word} moon is bad") for word in WORDS])
TEXTS = LabelledSet.of(
    [
        Labelled(f"{word} {thing}", thing)
        for thing in ("sun", "moon", "star")
        for word in WORDS[: 20 if thing == "star" else 32]
    ]
)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def cosine(a: Tensor, b: Tensor) -> float:
    return float(torch.cosine_similarity(a, b, dim=0))


def random_sae(layer: int = 1, width: int = WIDTH, **options: Any) -> SAE:
    return SAE.of(
        "relu",
        W_enc=draw(width, LATENTS, seed=1) / width**0.5,
        b_enc=0.1 * draw(LATENTS, seed=2),
        W_dec=draw(LATENTS, width, seed=3) / LATENTS**0.5,
        b_dec=draw(width, seed=4),
        layer=layer,
        name="s",
        **options,
    )


def planted_sae(width: int = WIDTH) -> tuple[SAE, Tensor]:
    """An SAE with orthonormal features, and the feature that is the attribute."""
    features = torch.linalg.qr(draw(width, width, seed=7)).Q
    sae = SAE.of(
        "relu",
        W_enc=features.T.contiguous(),
        b_enc=torch.full((width,), -0.5),
        W_dec=features,
        b_dec=torch.zeros(width),
        layer=1,
    )
    return sae, features[3]


@pytest.mark.parametrize("method", REFINABLE)
def test_a_refined_vector_is_the_decoded_latent_difference(method: str) -> None:
    sae = random_sae()
    positive, negative = draw(60, WIDTH, seed=5) + 1, draw(60, WIDTH, seed=6)
    one = SAERefined(sae, method)
    for first in range(0, 60, 7):
        one.add(positive[first : first + 7], negative[first : first + 7])
    latents = (sae.encode(positive) - sae.encode(negative)).double()
    if method == "diffmean":
        direct = latents.mean(0)
    else:
        direct = torch.linalg.svd(latents, full_matrices=False).Vh[0]
    decoded = direct @ sae.W_dec.double()  # without the bias
    decoded = decoded / decoded.norm()
    expected = decoded * (decoded @ (positive - negative).double().mean(0))
    torch.testing.assert_close(one.direction().double(), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("method", REFINABLE)
def test_refining_removes_what_the_sae_does_not_call_the_attribute(method: str) -> None:
    """Few pairs with much noise below the features' threshold: the plain vector keeps it."""
    sae, attribute = planted_sae()
    noise = 0.15
    positive = 2 * attribute + noise * draw(12, WIDTH, seed=8)
    negative = noise * draw(12, WIDTH, seed=9)
    refined, plain = SAERefined(sae, method), REFINABLE[method](WIDTH)
    for one in (refined, plain):
        one.add(positive, negative)
    assert cosine(refined.direction(), attribute) > 0.999
    assert cosine(refined.direction(), attribute) > cosine(plain.direction(), attribute)
    swapped = SAERefined(sae, method)
    swapped.add(negative, positive)
    assert cosine(swapped.direction(), -attribute) > 0.999


def test_a_transcoder_refines_nothing() -> None:
    with pytest.raises(SteerError, match="transcoder") as caught:
        SAERefined(random_transcoder("standard"), "diffmean")
    assert caught.value.code == "two_sites"


def test_equal_latents_have_no_direction() -> None:
    sae, _ = planted_sae()
    quiet = SAERefined(sae, "pca")
    quiet.add(0.01 * draw(5, WIDTH), 0.01 * draw(5, WIDTH, seed=1))
    assert not quiet.direction().any()


def test_refined_memory_is_bounded() -> None:
    sae = random_sae()
    mean, pca = SAERefined(sae, "diffmean"), SAERefined(sae, "pca")
    for seed in range(30):
        for one in (mean, pca):
            one.add(draw(40, WIDTH, seed=seed) + 1, draw(40, WIDTH, seed=100 + seed))
        assert mean.held_floats == 2 * LATENTS + 2 * WIDTH
        assert pca.held_floats <= 3 * LATENTS**2 + LATENTS + 2 * WIDTH


def test_fit_refines_on_the_saes_layer(engine: TransformersEngine) -> None:
    sae = random_sae()
    library = MemoryLibrary(saes={"s": sae})
    vector = fit(engine, PAIRS, name="v", refine={"sae": "s"}, library=library)
    assert vector.card.layers == (1,)
    provenance: Any = vector.card.provenance
    assert provenance["refined_by"] == {"sae": "s", "sha256": sae.sha256}
    fitted = split_pairs(PAIRS.items, 0.2, 0).fitted
    reading = make_reading(engine, layers=[1])
    one = SAERefined(sae, "diffmean")
    one.add(
        read_rows(engine, [p.positive for p in fitted], reading)[1],
        read_rows(engine, [p.negative for p in fitted], reading)[1],
    )
    torch.testing.assert_close(vector[1], one.direction(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "code"),
    [
        ({"refine": {"sae": "s"}}, "no_library"),
        ({"refine": {"sae": "t"}, "library": True}, "unknown_sae"),
        ({"refine": {"lens": "s"}, "library": True}, "invalid_option"),
        ({"refine": {"sae": "s"}, "library": True, "layers": [0]}, "not_the_saes_layer"),
        (
            {"refine": {"sae": "s"}, "library": True, "method": "logistic"},
            "unsupported_method",
        ),
        ({"refine": {"sae": "n"}, "library": True}, "per_token_normalisation"),
        ({"where": "nowhere"}, "invalid_option"),
        ({"positions": "nowhere"}, "invalid_option"),
        ({"positions": "response"}, "no_response"),
    ],
)
def test_what_cannot_be_fitted_is_refused(
    engine: TransformersEngine, options: dict[str, Any], code: str
) -> None:
    if options.get("library"):
        saes = {"s": random_sae(), "n": random_sae(normalize="layer_norm")}
        options = {**options, "library": MemoryLibrary(saes=saes)}
    with pytest.raises(SteerError) as caught:
        fit(engine, PAIRS, name="v", **options)
    assert caught.value.code == code


def test_the_card_compares_with_other_vectors(engine: TransformersEngine) -> None:
    vector = fit(engine, PAIRS, name="v", held_out=0.0)
    others = {
        "same": vector,
        "opposite": -vector,
        "narrow": ControlVector.of({1: torch.ones(8)}),
        "elsewhere": ControlVector.of({1: torch.ones(32)}, site="mlp_out"),
        "one": ControlVector.of({1: torch.ones(32)}),
    }
    again = fit(engine, PAIRS, name="v", held_out=0.0, beside=others)
    cosines: Any = again.card.provenance["cosines"]
    assert set(cosines) == {"same", "opposite", "one"}
    assert cosines["same"] == {"0": 1.0, "1": 1.0, "2": 1.0}
    assert cosines["opposite"]["2"] == -1.0
    assert cosines["one"] == {"1": round(cosine(vector[1], torch.ones(32)), 4)}


@pytest.mark.parametrize("positions", ["response", "subject", 2, -3])
def test_states_are_read_where_it_is_said(engine: TransformersEngine, positions: Any) -> None:
    pairs = PairSet.of(
        [
            Pair(
                Marked(f"the {w} sun", response=" shines", subject=w),
                Marked(f"a {w} moon", response=" hides", subject=w),
            )
            for w in WORDS
        ]
    )
    vector = fit(engine, pairs, name="v", positions=positions, held_out=0.0, layers=[1])
    rows = []
    for pair in pairs.items:
        states = []
        for prompt, response in ((pair.positive, " shines"), (pair.negative, " hides")):
            assert isinstance(prompt, Marked)
            text = str(prompt.prompt)
            tokens = engine.tokenizer.encode(text + response)
            found = engine.capture(CaptureRequest([tokens], (HookPoint(1),)))[0]
            state = found.states[HookPoint(1)]
            if positions == "response":
                states.append(state[-len(response) :].mean(0))
            elif positions == "subject":
                states.append(state[text.rindex(prompt.subject) + len(prompt.subject)])
            else:
                states.append(state[positions])
        rows.append(states[0] - states[1])
    torch.testing.assert_close(vector[1], torch.stack(rows).mean(0), rtol=1e-4, atol=1e-5)


def test_a_regression_on_two_classes_finds_the_plane_between_them() -> None:
    direction = draw(WIDTH, seed=1) / draw(WIDTH, seed=1).norm()
    positive = 0.1 * draw(300, WIDTH, seed=2) + direction
    negative = 0.1 * draw(900, WIDTH, seed=3) - direction
    one = LogisticDirection(WIDTH, paired=False)
    for first in range(0, 300, 50):
        one.add(positive[first : first + 50], negative[3 * first : 3 * first + 150])
    assert cosine(one.direction(), direction) > 0.99
    assert float(one.direction().norm()) == pytest.approx(2.0, rel=0.02)


def test_pairs_protect_the_regression_from_what_they_share() -> None:
    """What differs between pairs is ten times the attribute."""
    direction = draw(WIDTH, seed=1) / draw(WIDTH, seed=1).norm()
    shared = 10 * draw(300, WIDTH, seed=2)
    positive, negative = shared + direction + 0.1 * draw(300, WIDTH, seed=3), shared
    paired, plain = LogisticDirection(WIDTH), LogisticDirection(WIDTH, paired=False)
    for one in (paired, plain):
        one.add(positive, negative)
    assert cosine(paired.direction(), direction) > 0.99
    assert cosine(plain.direction(), direction) < 0.98


def test_the_regression_holds_a_sample() -> None:
    for paired, most in ((True, MAX_ROWS * 4 + 8), (False, 2 * MAX_ROWS * 4 + 8)):
        one = LogisticDirection(4, paired=paired)
        for seed in range(6):
            one.add(draw(1000, 4, seed=seed) + 1, draw(1000, 4, seed=50 + seed))
            assert one.held_floats <= most
        assert one.held_floats == most
        assert cosine(one.direction(), torch.ones(4)) > 0.98


def test_a_reservoir_is_uniform_and_does_not_see_batches() -> None:
    stream = torch.arange(2000.0)[:, None]
    kept = Reservoir(1, 400)
    for first in range(0, 2000, 37):
        kept.add(stream[first : first + 37], list(range(first, min(first + 37, 2000))))
    whole = Reservoir(1, 400)
    whole.add(stream)
    assert torch.equal(kept.rows, whole.rows)
    assert kept.notes == [int(row) for row in kept.rows[:, 0]]
    assert (kept.seen, len(set(kept.notes))) == (2000, 400)
    assert float(kept.rows.mean()) == pytest.approx(1000, rel=0.1)


@pytest.mark.parametrize("method", ["diffmean", "logistic"])
def test_every_label_has_a_vector_against_the_rest(engine: TransformersEngine, method: str) -> None:
    done: list[int] = []
    found = fit_labels(
        engine, TEXTS, name="sky", method=method, best=2, batch=7, progress=done.append
    )
    assert list(found) == ["moon", "star", "sun"]
    assert sum(done) == len(TEXTS)  # each text is read once: to fit, or to measure
    for label, vector in found.items():
        assert vector.card.name == f"sky-{label}"
        assert len(vector.card.used_layers) == 2
        best = vector.card.used_layers[0]
        assert (vector.card.measures[best].separation or 0) > 1
        assert vector.card.provenance["label"] == label


def test_a_labels_difference_of_means_is_direct(engine: TransformersEngine) -> None:
    found = fit_labels(engine, TEXTS, name="sky", labels=["sun"], held_out=0.0, layers=[1])
    states = read_rows(
        engine, [one.prompt for one in TEXTS.items], make_reading(engine, layers=[1])
    )[1]
    mine = torch.tensor([one.label == "sun" for one in TEXTS.items])
    expected = states[mine].mean(0) - states[~mine].mean(0)
    torch.testing.assert_close(found["sun"][1], expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("texts", "options", "code"),
    [
        (TEXTS, {"method": "pca"}, "unknown_method"),
        (TEXTS, {"method": "magic"}, "unknown_method"),
        (TEXTS, {"labels": ["comet"]}, "unknown_label"),
        (LabelledSet.of([Labelled("a", "x"), Labelled("b", "x")]), {}, "unknown_label"),
        (LabelledSet.of([Labelled("a", "x!"), Labelled("b", "x?")]), {}, "invalid_labels"),
    ],
)
def test_labels_that_cannot_be_fitted_are_refused(
    engine: TransformersEngine, texts: LabelledSet, options: dict[str, Any], code: str
) -> None:
    with pytest.raises(SteerError) as caught:
        fit_labels(engine, texts, name="v", **options)
    assert caught.value.code == code


def test_between_two_prompts_the_similarity_to_the_goal_only_grows(
    engine: TransformersEngine,
) -> None:
    """At strength 1 the steered state *is* the other prompt's."""
    toward, away = "the warm sun is good", "a cold moon is bad"
    vector = fit_two_prompts(engine, name="v", toward=toward, away=away)
    assert vector.card.provenance["method"] == "two_prompts"
    assert vector.card.measures[1].separation is None
    point, plans = HookPoint(1), plans_of(engine, MemoryLibrary({"v": vector}))
    prompts = [engine.tokenizer.encode(text) for text in (toward, away)]
    goal, start = (
        one.states[point][0]
        for one in engine.capture(CaptureRequest(prompts, (point,), positions=(-1,)))
    )
    torch.testing.assert_close(vector[1], goal - start)
    similar = []
    for strength in (0.0, 0.25, 0.5, 0.75, 1.0):
        spec = {"kind": "add", "vector": "v", "layers": [1], "strength": strength}
        plan = plans.plan(parse_spec({"interventions": [spec]}))
        request = CaptureRequest([prompts[1]], (point,), positions=(-1,), plans=[plan])
        similar.append(cosine(engine.capture(request)[0].states[point][0], goal))
    assert similar == sorted(similar)
    assert similar[-1] == pytest.approx(1.0, abs=1e-5)
    with pytest.raises(SteerError, match="same state"):
        fit_two_prompts(engine, name="v", toward="a", away="a")
