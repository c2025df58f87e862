"""Vectors trained on preferences: the losses, what is learned, and that serving is what was
trained."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from float64_reference import selected
from tiny_models import byte_model

from steer.artefacts.control_vector import ControlVector
from steer.artefacts.library import MemoryLibrary
from steer.engines.base import CaptureRequest, GenerationRequest, SamplingParams
from steer.engines.fake.engine import ByteTokenizer, FakeEngine
from steer.engines.gradients import differentiable
from steer.engines.plans import plans_of
from steer.engines.transformers.engine import TransformersEngine
from steer.errors import SteerError, Unsupported
from steer.fit.data.preferences import Preference, PreferenceSet
from steer.fit.methods.trained.preference import preference_rows, reps, simpo
from steer.fit.methods.trained.prosv import ScaledVector, fit_prosv, prompt_ends
from steer.fit.methods.trained.reps import added, fit_reps, suppressed
from steer.fit.methods.trained.rows import log_probabilities
from steer.model import HookPoint
from steer.spec import parse_spec

WORDS = ("red", "blue", "green", "black", "white", "small")
LIKED = PreferenceSet.of([Preference(f"the {word} sun", "!?", "no") for word in WORDS])


def trained(engine: TransformersEngine, method: Any, **options: Any) -> ControlVector:
    arguments: dict[str, Any] = {"name": "v", "layers": [1], "steps": 40, "batch": 3, **options}
    found: ControlVector = method(engine, LIKED, **arguments)
    return found


def preferred(engine: TransformersEngine, spec: dict[str, Any] | None, vector: Any) -> float:
    """The mean log p of the chosen answers, less that of the rejected ones, as served."""
    library = MemoryLibrary(vectors={"v": vector})
    total = 0.0
    rows = preference_rows(engine, LIKED, both=True, batch=8)
    for one in rows:
        for sign, row in ((1, one.chosen), (-1, one.rejected)):
            assert row is not None
            plan = None
            if spec is not None:
                plan = plans_of(engine, library).plan(parse_spec({"interventions": [spec]}))
            found = engine.capture(CaptureRequest([row.fed], plans=[plan], logits="all"))[0]
            assert found.logits is not None
            scores = found.logits.log_softmax(-1)
            places = range(row.prompt - 1, len(row.fed))
            total += sign * sum(float(scores[n, row.tokens[n + 1]]) for n in places)
    return total / len(rows)


def test_the_losses_are_the_papers() -> None:
    """−log σ(β·log p(w) − log p(l)/|l|), β = max(log p₀(l) − log p₀(w), 1)/|w|."""
    w, length = torch.tensor([-1.0, -2.0, -3.0]), torch.tensor([-4.0, -1.0])
    for before, beta in (((-9.0, -2.0), 7 / 3), ((-2.0, -9.0), 1 / 3)):
        wanted = -math.log(1 / (1 + math.exp(-(beta * -6.0 + 2.5))))
        assert float(reps(w, length, *before)) == pytest.approx(wanted, rel=1e-5)
    margin = 2.0 * (-2.0 + 2.5) - 1.0
    assert float(simpo(w, length)) == pytest.approx(math.log(1 + math.exp(-margin)), rel=1e-5)


def test_suppression_is_what_project_serves() -> None:
    """x − ReLU(⟨v, x⟩)v/‖v‖²: nothing is left along v, and what points away stays."""
    generator = torch.Generator().manual_seed(0)
    x, v = torch.randn(50, 16, generator=generator), torch.randn(16, generator=generator)
    after = suppressed(v)(x)
    assert float((after @ v).max()) < 1e-5
    away = x @ v <= 0
    assert torch.equal(after[away], x[away])
    torch.testing.assert_close(added(v)(x), x + v)


def test_reps_is_trained_in_the_states_own_lengths() -> None:
    """A model whose states are 8 times as long and that says the same gets the same vector, 8 times
    as long."""
    rows = []
    for scale in (1.0, 8.0):
        model = byte_model(initializer_range=0.2, tie_word_embeddings=False, rms_norm_eps=1e-12)
        with torch.no_grad():
            model.get_input_embeddings().weight *= scale
            for layer in model.model.layers:
                layer.self_attn.o_proj.weight *= scale
                layer.mlp.down_proj.weight *= scale
        with TransformersEngine(model, ByteTokenizer(), name="long", rows=8, slots=16) as engine:
            rows.append(trained(engine, fit_reps, layers=[0, 1], steps=5).directions)
    for layer in (0, 1):
        torch.testing.assert_close(rows[1][layer], 8 * rows[0][layer], rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("loss", ["reps", "simpo", "lm"])
def test_a_vector_learns_what_is_preferred(lively: TransformersEngine, loss: str) -> None:
    vector = trained(lively, fit_reps, loss=loss, factors=(0.5, 1.0, 1.5), rate=0.1)
    made: Any = vector.card.provenance
    assert made["loss_after"] < made["loss_before"]
    assert made["trained_strengths"] == [0.5, 1.5]
    add = {"kind": "add", "vector": "v"}
    before = preferred(lively, None, vector)
    assert preferred(lively, add, vector) > before + 1.0
    if loss == "reps":
        removed = {"kind": "project", "vector": "v", "mode": "at_most", "value": 0.0}
        assert preferred(lively, removed, vector) < before


def test_what_is_served_is_what_was_trained(lively: TransformersEngine) -> None:
    """log p of an answer under the served vector equals the training's, on its own tokens."""
    vector = trained(lively, fit_prosv, steps=3, first=2, last=3)
    (row, *_) = [one.chosen for one in preference_rows(lively, LIKED, both=True, batch=8)]
    edit = {HookPoint(1): added(vector[1])}

    def logs(model: Any) -> torch.Tensor:
        with torch.no_grad():
            return log_probabilities(model, [row], edit, prompt_ends(2, 3))[0]

    wanted = differentiable(lively).differentiate(logs)
    plan = plans_of(lively, MemoryLibrary(vectors={"v": vector})).plan(
        parse_spec({"interventions": [{"kind": "add", "vector": "v"}]})
    )
    asked = GenerationRequest(
        "a",
        row.tokens[: row.prompt],
        SamplingParams(
            max_tokens=len(row.answer),
            temperature=0,
            logprobs=0,
            ignore_eos=True,
            logit_bias=((row.answer[0], 100.0),),
        ),
        plan,
    )
    (served,) = lively.complete([asked])
    assert served.tokens[0] == row.answer[0]
    assert served.logprobs[0].logprob == pytest.approx(float(wanted[0]), abs=1e-4)
    assert served.receipt is not None
    assert served.receipt.tokens_steered == 5


@pytest.mark.parametrize("prompt", [1, 3, 5, 12])
def test_the_first_and_last_prompt_tokens_are_steered_and_none_that_follows(prompt: int) -> None:
    chosen = [n for n in range(prompt + 6) if selected(prompt_ends(2, 3), n, prompt, 9)]
    assert chosen == sorted({*range(min(2, prompt)), *range(max(0, prompt - 3), prompt)})


def test_decoding_reads_the_steered_cache_with_the_models_own_weights(
    lively: TransformersEngine,
) -> None:
    """Given the same cache, the logits of generated tokens are the unsteered model's own."""
    vector = trained(lively, fit_prosv, steps=3, first=2, last=2)
    plan = plans_of(lively, MemoryLibrary(vectors={"v": vector})).plan(
        parse_spec({"interventions": [{"kind": "add", "vector": "v"}]})
    )
    prompt = tuple(lively.tokenizer.encode("the green sun"))
    sampling = SamplingParams(max_tokens=6, temperature=0, logprobs=0, ignore_eos=True)
    (served,) = lively.complete([GenerationRequest("a", prompt, sampling, plan)])
    model = lively._hooked.model
    places = [0, 1, len(prompt) - 2, len(prompt) - 1]

    def steered(module: Any, args: Any, output: Any) -> Any:
        output = output.clone()
        output[:, places] += vector[1]
        return output

    with torch.inference_mode():
        handle = model.model.layers[1].register_forward_hook(steered)
        found = model(torch.tensor([prompt]), use_cache=True)
        handle.remove()
        scores = [found.logits[0, -1].log_softmax(-1)]
        for token in served.tokens[:-1]:
            found = model(
                torch.tensor([[token]]), past_key_values=found.past_key_values, use_cache=True
            )
            scores.append(found.logits[0, -1].log_softmax(-1))
    for token, score, said in zip(served.tokens, scores, served.logprobs, strict=True):
        assert said.logprob == pytest.approx(float(score[token]), abs=1e-4)


def test_factor_and_vector_start_at_the_papers_scale_and_are_trained_together(
    lively: TransformersEngine,
) -> None:
    """v₀ ~ N(0, λ/n), α₀ = β√n: the product starts with a length near β√(λn)."""
    scaled = ScaledVector(400, 2.0, 8.0, torch.Generator().manual_seed(0))
    assert scaled.factor.item() == pytest.approx(2.0 * 20.0)
    assert float(scaled.product().norm()) == pytest.approx(2.0 * (8.0 * 400) ** 0.5, rel=0.1)
    vector = trained(lively, fit_prosv, loss="lm", rate=0.1)
    made: Any = vector.card.provenance
    assert made["loss_after"] < made["loss_before"]
    assert made["factors"]["1"] != pytest.approx(32**0.5, abs=0.01)
    assert vector.card.default_where == prompt_ends(4, 4)


@pytest.mark.parametrize("method", [fit_reps, fit_prosv])
def test_the_same_seed_gives_the_same_vector_and_progress_counts_steps(
    engine: TransformersEngine, method: Any
) -> None:
    done: list[int] = []
    first, second = (trained(engine, method, steps=3, progress=done.append) for _ in range(2))
    assert first.sha256 == second.sha256
    assert sum(done) == 6


@pytest.mark.parametrize(
    ("method", "options", "code"),
    [
        (fit_reps, {"steps": 0}, "invalid_option"),
        (fit_reps, {"factors": ()}, "invalid_option"),
        (fit_reps, {"factors": (1.0, -1.0)}, "invalid_option"),
        (fit_reps, {"layers": [7]}, "layer_out_of_range"),
        (fit_prosv, {"first": 0, "last": 0}, "invalid_option"),
        (fit_prosv, {"beta": 0.0}, "invalid_option"),
        (fit_prosv, {"batch": 0}, "invalid_option"),
    ],
)
def test_what_cannot_be_trained_is_refused(
    engine: TransformersEngine, method: Any, options: dict[str, Any], code: str
) -> None:
    with pytest.raises(SteerError) as caught:
        trained(engine, method, **options)
    assert caught.value.code == code


@pytest.mark.parametrize("method", [fit_reps, fit_prosv])
def test_an_engine_without_gradients_is_refused_by_name(method: Any) -> None:
    fake: Any = FakeEngine()
    with pytest.raises(Unsupported, match="fake engine") as caught:
        method(fake, LIKED, name="v", layers=[0])
    assert caught.value.code == "no_gradients"
