"""Relational concepts: the inverse, the Jacobian, and the whole on a random model."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from steer.engines.base import CaptureRequest
from steer.engines.fake.engine import FakeEngine
from steer.engines.gradients import differentiable
from steer.engines.transformers.engine import TransformersEngine
from steer.errors import SteerError, Unsupported
from steer.fit.data.relations import Fact, RelationTable, Template
from steer.fit.methods.lrc import (
    Ask,
    ask,
    classify,
    fit_lrc,
    low_rank_inverse,
    object_states,
    replacing,
    spread,
    subject_jacobian,
)
from steer.model import HookPoint

SUBJECTS = ["red", "blue", "green", "black", "white", "small", "large", "old"]
TEMPLATE = Template("the {subject} sun:")
SUBJECT, ANSWER = HookPoint(0), HookPoint(1)


def test_a_low_rank_inverse_is_ten_times_more_accurate_on_a_noisy_map() -> None:
    """A planted map of rank 20 plus noise: subjects from objects, by both inverses."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    d, rank = 128, 20
    left, right = torch.linalg.qr(draw(d, rank)).Q, torch.linalg.qr(draw(d, rank)).Q
    weight = left @ torch.diag(torch.linspace(1, 3, rank, dtype=torch.float64)) @ right.T
    weight = weight + 0.01 / d**0.5 * draw(d, d)
    subjects = draw(200, rank) @ right.T
    objects = subjects @ weight.T + 0.01 * draw(200, d)
    errors = [
        float((objects @ low_rank_inverse(weight, r).T - subjects).norm() / subjects.norm())
        for r in (rank, d)
    ]
    assert errors[0] * 10 <= errors[1]
    assert errors[0] < 0.1


def test_at_full_rank_it_is_the_pseudo_inverse() -> None:
    weight = torch.randn(6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(low_rank_inverse(weight, 6), torch.linalg.pinv(weight))
    singular = weight.clone()
    singular[0] = singular[1]
    torch.testing.assert_close(low_rank_inverse(singular, 6), torch.linalg.pinv(singular))


@pytest.mark.parametrize("rows", [32, 7])
def test_the_jacobian_equals_finite_differences(lively: TransformersEngine, rows: int) -> None:
    one = ask(lively, TEMPLATE, Fact("red", "r", "xyz"), (), 0)
    jacobian, s, o = subject_jacobian(lively, one, SUBJECT, ANSWER, rows=rows)

    def output(state: torch.Tensor) -> torch.Tensor:
        def work(model: Any) -> torch.Tensor:
            with torch.no_grad():
                traced = model.run(
                    [one.tokens],
                    edits={SUBJECT: replacing(one.subject, state[None])},
                    capture=[ANSWER],
                )
            read: torch.Tensor = traced.states[ANSWER][0, one.predicting.start :].mean(0)
            return read.double()

        return differentiable(lively).differentiate(work)

    torch.testing.assert_close(output(s), o, rtol=1e-5, atol=1e-6)
    step = 1e-2
    for column in range(0, 32, 5):
        change = torch.zeros(32, dtype=torch.float64)
        change[column] = step
        slope = (output(s + change) - output(s - change)) / (2 * step)
        torch.testing.assert_close(jacobian[:, column], slope, rtol=2e-2, atol=2e-3)


def test_the_object_is_read_where_it_is_predicted(engine: TransformersEngine) -> None:
    one = ask(engine, TEMPLATE, Fact("red", "r", "xyz"), (), 0)
    decode = engine.tokenizer.decode
    assert decode(one.tokens) == "<|bos|>the red sun: xy"
    assert decode([one.tokens[one.subject]]) == "d"
    assert [decode([one.tokens[n]]) for n in one.predicting] == [":", " ", "x", "y"]
    (_, state), *_ = object_states(engine, [one], ANSWER)
    whole = engine.capture(CaptureRequest([one.tokens], (ANSWER,)))[0].states[ANSWER]
    torch.testing.assert_close(state, whole[-4:].mean(0).double())


def test_concepts_of_what_the_demo_model_knows() -> None:
    """Countries by continent; one fact is false, so the model does not answer with it."""
    from steer_vectors import LIBRARY
    from steer_vectors.demo.recipe.relations.facts import QUESTIONS, relation_facts

    facts = [*relation_facts()["continent"][::3], Fact("Japan", "continent", "Europe")]
    done: list[int] = []
    with TransformersEngine.load(LIBRARY / "demo" / "model", name="steer-demo") as engine:
        concepts = fit_lrc(
            engine,
            RelationTable.of(facts),
            name="in",
            relation="continent",
            template=QUESTIONS["continent"],
            subject_layer=0,
            object_layer=3,
            site="resid_pre",
            rank=32,
            jacobians=10,
            rows=96,
            progress=done.append,
        )
        asks = [ask(engine, QUESTIONS["continent"], fact, (), 0) for fact in facts[:-1]]
        point = HookPoint(0, "resid_pre")
        states = torch.cat(
            [
                engine.capture(CaptureRequest([a.tokens], (point,), positions=(a.subject,)))[
                    0
                ].states[point]
                for a in asks
            ]
        )
    assert set(concepts) == {fact.object for fact in facts}
    for answer, vector in concepts.items():
        assert float(vector[0].norm()) == pytest.approx(1.0, abs=1e-5)
        assert vector.card.name == f"in-{answer.replace(' ', '-')}"
        assert vector.card.provenance["object"] == answer
        assert vector.card.provenance["answered"] == len(facts) - 1
        assert (vector.card.layers, vector.card.site) == ((0,), "resid_pre")
    assert done == [len(facts), *[1] * 10]
    said = classify(concepts, states, 0)
    right = sum(one == fact.object for one, fact in zip(said, facts[:-1], strict=True))
    assert right >= 0.7 * len(asks)


def test_what_the_model_does_not_know_is_refused(engine: TransformersEngine) -> None:
    table = RelationTable.of([Fact(s, "r", "never") for s in SUBJECTS])
    with pytest.raises(SteerError) as caught:
        fit_lrc(engine, table, name="r", relation="r", template=TEMPLATE)
    assert caught.value.code == "not_known"
    with pytest.raises(SteerError) as caught:
        fit_lrc(
            engine,
            table,
            name="r",
            relation="r",
            template=TEMPLATE,
            subject_layer=2,
            object_layer=1,
        )
    assert caught.value.code == "invalid_option"


def test_an_engine_without_gradients_is_refused_by_name() -> None:
    table = RelationTable.of([Fact("a", "r", "b")])
    fake: Any = FakeEngine()
    with pytest.raises(Unsupported, match="fake engine") as caught:
        fit_lrc(fake, table, name="r", relation="r", template=TEMPLATE)
    assert caught.value.code == "no_gradients"


def test_jacobians_are_spread_over_the_objects() -> None:
    asks = [
        Ask(Fact(str(n), "r", answer), (), (), 0, range(0)) for n, answer in enumerate("aaaabbc")
    ]
    assert [one.fact.object for one in spread(asks, 5)] == ["a", "b", "c", "a", "b"]
    assert len(spread(asks, 100)) == 7


def test_the_comparison_tests_on_subjects_it_was_not_fitted_on() -> None:
    from steer_vectors.demo.recipe.relations.facts import draw_split, relation_facts

    for facts in relation_facts().values():
        split = draw_split(facts, 3)
        assert not set(split.fitted) & set(split.tested)
        fitted = {facts[n].object for n in split.fitted}
        assert {facts[n].object for n in split.tested} == fitted
        for n, target in zip(split.tested, split.targets, strict=True):
            assert target in fitted
            assert target != facts[n].object
        assert draw_split(facts, 3) == split
        assert draw_split(facts, 4) != split
