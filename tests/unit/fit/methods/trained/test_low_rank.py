"""A trained adapter: what it learns, and that serving it is what was trained."""

from __future__ import annotations

from typing import Any, get_args

import pytest
import torch
from float64_reference import selected

from steer.artefacts.control_vector import LowRankAdapter
from steer.artefacts.library import MemoryLibrary
from steer.cli import steering
from steer.cli.fit.where import WhereChoice
from steer.engines.base import CaptureRequest
from steer.engines.fake.engine import FakeEngine
from steer.engines.gradients import differentiable
from steer.engines.plans import plans_of
from steer.engines.transformers.engine import TransformersEngine
from steer.errors import SteerError, Unsupported
from steer.fit.data.exercises import Exercise, ExerciseSet
from steer.fit.data.where import WHERES, WhereName, where_named
from steer.fit.methods.trained.low_rank import LoReFT, answer_loss, fit_low_rank
from steer.fit.methods.trained.rows import AnswerRow
from steer.model import HookPoint
from steer.spec import parse_spec

WORDS = ("red", "blue", "green", "black", "white", "small")
LESSONS = ExerciseSet.of([Exercise(f"the {word} sun", "!?") for word in WORDS])


def trained(engine: TransformersEngine, **options: Any) -> LowRankAdapter:
    arguments: dict[str, Any] = {"name": "a", "layers": [1], "steps": 60, "rate": 0.05, **options}
    return fit_low_rank(engine, LESSONS, **arguments)


@pytest.fixture(scope="module")
def adapter(lively: TransformersEngine) -> LowRankAdapter:
    return trained(lively, where="all")


def test_the_adapter_learns_and_its_rotation_stays_orthonormal(adapter: LowRankAdapter) -> None:
    provenance: Any = adapter.card.provenance
    assert provenance["loss_after"] < 0.5 * provenance["loss_before"]
    rotation = adapter.parts[1][0]
    torch.testing.assert_close(rotation @ rotation.T, torch.eye(4), rtol=0, atol=1e-5)
    assert (adapter.card.kind, adapter.card.layers, adapter.card.model) == (
        "low_rank",
        (1,),
        "lively",
    )
    assert LowRankAdapter.from_bytes(adapter.to_bytes(), name="a").sha256 == adapter.sha256


@pytest.mark.parametrize("site", ["resid_post", "resid_mid"])
def test_what_is_served_is_what_was_trained(engine: TransformersEngine, site: Any) -> None:
    """The served states equal the training's, and both the formula as pyvene has it, in
    float64."""
    one = trained(engine, site=site, steps=5)
    tokens = engine.tokenizer.encode("the new sun")
    point = HookPoint(1, site)
    plan = plans_of(engine, MemoryLibrary(low_ranks={"a": one})).plan(
        parse_spec({"interventions": [{"kind": "low_rank", "adapter": "a"}]})
    )
    points = (point,)
    before = engine.capture(CaptureRequest([tokens], points))[0].states[point]
    served = engine.capture(CaptureRequest([tokens], points, plans=[plan], logits="all"))[0]
    rotation, weight, bias = (part.double() for part in one.parts[1])
    x = before[-1].double()
    # pyvene: rotated = x @ Rᵀ; x + (W x + b − rotated) @ R
    expected = x + (weight @ x + bias - rotation @ x) @ rotation
    torch.testing.assert_close(served.states[point][-1].double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(served.states[point][:-1], before[:-1], rtol=0, atol=1e-6)

    edit = LoReFT(32, 4, torch.Generator().manual_seed(0))
    with torch.no_grad():
        edit.free.copy_(one.parts[1][0].T)
        edit.weight.copy_(one.parts[1][1])
        edit.bias.copy_(one.parts[1][2])

    def logits(model: Any) -> torch.Tensor:
        with torch.no_grad():

            def last(x: torch.Tensor) -> torch.Tensor:
                return torch.cat([x[:, :-1], edit(x[:, -1:])], 1)

            found: torch.Tensor = model.run([tokens], edits={point: last}).logits[0]
            return found

    assert served.logits is not None
    torch.testing.assert_close(
        differentiable(engine).differentiate(logits), served.logits, rtol=1e-4, atol=1e-4
    )


def test_an_untrained_adapter_is_the_identity() -> None:
    edit = LoReFT(16, 3, torch.Generator().manual_seed(0))
    x = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(edit(x), x, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("where", "steered"),
    [("last", [1]), ("onward", [1, 2, 3]), ("generation", [2, 3]), ("all", [0, 1, 2, 3])],
)
def test_the_adapter_acts_on_the_tokens_it_will_serve(where: Any, steered: list[int]) -> None:
    """Of five tokens, two of them the prompt's, the last is never fed."""
    assert AnswerRow((9, 9, 9, 9, 9), 2).steered(where_named(where)) == steered
    assert [n for n in range(4) if selected(where_named(where), n, 2, 9)] == steered


def test_every_place_has_a_name_to_train_at() -> None:
    assert set(WHERES) == set(get_args(WhereName)) == {place.value for place in WhereChoice}
    assert set(WHERES) == set(steering.WHERES)


def test_the_loss_is_the_answers_own(engine: TransformersEngine) -> None:
    """Rows of different lengths in one batch: the mean over all answer tokens, by themselves."""
    rows = [AnswerRow((3, 4, 5, 6), 2), AnswerRow((7, 8, 9, 10, 11, 12, 13), 6)]
    whole = differentiable(engine).differentiate(
        lambda model: answer_loss(model, rows, {}, None).detach()
    )
    total = 0.0
    for row in rows:
        logits = engine.capture(CaptureRequest([row.tokens[:-1]], logits="all"))[0].logits
        assert logits is not None
        scores = logits.log_softmax(-1)
        total -= sum(
            float(scores[n - 1, row.tokens[n]]) for n in range(row.prompt, len(row.tokens))
        )
    assert float(whole) == pytest.approx(total / 3, rel=1e-4)


def test_training_leaves_the_model_as_it_was(engine: TransformersEngine) -> None:
    tokens = engine.tokenizer.encode("the old sun")
    before = engine.capture(CaptureRequest([tokens], logits="all"))[0].logits
    trained(engine, steps=3)
    after = engine.capture(CaptureRequest([tokens], logits="all"))[0].logits
    assert before is not None
    assert after is not None
    assert torch.equal(before, after)
    assert all(p.requires_grad and p.grad is None for p in engine._hooked.model.parameters())


def test_the_same_seed_gives_the_same_adapter_and_progress_can_stop_it(
    engine: TransformersEngine,
) -> None:
    done: list[int] = []
    first, second = (trained(engine, steps=4, progress=done.append) for _ in range(2))
    assert first.sha256 == second.sha256
    assert done == [1] * 8

    def stop(_: int) -> None:
        raise KeyError("cancelled")

    with pytest.raises(KeyError):
        trained(engine, progress=stop)


@pytest.mark.parametrize(
    ("options", "code"),
    [
        ({"rank": 0}, "invalid_option"),
        ({"rank": 33}, "invalid_option"),
        ({"steps": 0}, "invalid_option"),
        ({"where": "nowhere"}, "invalid_option"),
        ({"layers": [7]}, "layer_out_of_range"),
        ({"layers": []}, "invalid_option"),
    ],
)
def test_what_cannot_be_trained_is_refused(
    engine: TransformersEngine, options: dict[str, Any], code: str
) -> None:
    with pytest.raises(SteerError) as caught:
        trained(engine, **options)
    assert caught.value.code == code


def test_an_engine_without_gradients_is_refused_by_name() -> None:
    fake: Any = FakeEngine()
    with pytest.raises(Unsupported, match="fake engine") as caught:
        fit_low_rank(fake, LESSONS, name="a", layers=[0])
    assert caught.value.code == "no_gradients"
