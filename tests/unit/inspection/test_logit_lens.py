from __future__ import annotations

from importlib import import_module
from typing import Any

import pytest
import torch

from steer.artefacts.control_vector import ControlVector
from steer.artefacts.library import MemoryLibrary
from steer.engines.base import CaptureRequest
from steer.engines.transformers.engine import TransformersEngine
from steer.errors import SteerError
from steer.inspection.logit_lens import LogitLensRequest, logit_lens
from steer.inspection.selection import check_size
from steer.plan.cache import PlanCache

TEXT = "the river runs"
USER = {"role": "user", "content": "a"}


def read(engine: TransformersEngine, **fields: Any) -> Any:
    return logit_lens(engine, LogitLensRequest.model_validate({"text": TEXT, **fields}))


def test_the_last_layer_is_the_models_own_distribution(subject: Any) -> None:
    result = read(subject.engine, top=10)
    ids = tuple(subject.engine.tokenizer.encode(TEXT))
    expected = subject.logits(ids).softmax(-1)
    for cell in result.row(2):
        own = expected[cell.position]
        assert cell.top[0].id == int(own.argmax())
        for entry in cell.top:
            assert entry.probability == pytest.approx(float(own[entry.id]), abs=1e-5)


def test_every_layer_equals_a_direct_computation(subject: Any) -> None:
    engine = subject.engine
    ids = tuple(engine.tokenizer.encode(TEXT))
    result = read(engine, top=20)
    for layer, states in enumerate(subject.states(ids)):
        expected = subject.read(states).double().softmax(-1)
        for cell in result.row(layer):
            own = expected[cell.position]
            assert cell.entropy == pytest.approx(float(-(own * own.log()).sum()), abs=1e-4)
            for entry in cell.top:
                assert entry.probability == pytest.approx(float(own[entry.id]), abs=1e-5)


def test_resid_pre_is_the_layer_before(engine: TransformersEngine) -> None:
    after = read(engine, layers=[0, 1])
    before = read(engine, layers=[1, 2], site="resid_pre")
    for one, other in zip(after.cells, before.cells, strict=True):
        assert [entry.id for entry in one.top] == [entry.id for entry in other.top]
        assert one.entropy == pytest.approx(other.entropy, abs=1e-5)


def test_cells_come_in_the_order_asked_for(engine: TransformersEngine) -> None:
    result = read(engine, layers=[2, 0, 2], positions=[-1, 1, "river"])
    ids = engine.tokenizer.encode(TEXT)
    river = len(ids) - len(" runs") - 1
    assert result.layers == (2, 0)
    assert result.positions == (len(ids) - 1, 1, river)
    places = [(cell.layer, cell.position) for cell in result.cells]
    assert places == [(layer, place) for layer in (2, 0) for place in result.positions]
    assert result.tokens[river] == "r"
    whole = read(engine)
    assert result.row(0)[2] == whole.row(0)[river]


def test_few_logits_at_a_time_give_the_same(
    engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = read(engine)
    module = import_module("steer.inspection.logit_lens")
    monkeypatch.setattr(module, "_LOGITS_AT_ONCE", 1000)
    for one, other in zip(whole.cells, read(engine).cells, strict=True):
        assert [entry.id for entry in one.top] == [entry.id for entry in other.top]
        assert one.entropy == pytest.approx(other.entropy, abs=1e-5)


def test_it_reads_the_steered_model(engine: TransformersEngine) -> None:
    row = torch.randn(engine.info.d_model, generator=torch.Generator().manual_seed(1))
    library = MemoryLibrary({"joy": ControlVector.of({1: row}, name="joy")})
    plans = PlanCache(library, engine.info, engine.capabilities)
    spec = {"interventions": [{"kind": "add", "vector": "joy", "strength": 4.0}]}
    request = LogitLensRequest.model_validate({"text": TEXT, "steering": spec, "top": 3})
    steered = logit_lens(engine, request, plans=plans)
    plain = read(engine, top=3)
    assert steered.row(0) == plain.row(0)
    assert steered.row(1) != plain.row(1)
    plan = plans.plan(request.steering) if request.steering else None
    assert plan is not None
    assert steered.fingerprint == plan.fingerprint
    captured = engine.capture(
        CaptureRequest([tuple(engine.tokenizer.encode(TEXT))], plans=[plan], logits="last")
    )[0]
    assert captured.logits is not None
    best = captured.logits[-1].softmax(-1).topk(3)
    assert [entry.id for entry in steered.row(2)[-1].top] == best.indices.tolist()


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"positions": [0, 99]}, "/positions/1", "position_out_of_range"),
        ({"positions": [-15, -16]}, "/positions/1", "position_out_of_range"),
        ({"positions": ["moon"]}, "/positions/0", "text_not_found"),
        ({"layers": [0, 1, 3]}, "/layers/2", "layer_out_of_range"),
        ({"text": "w" * 128}, "/text", "context_length_exceeded"),
        ({"text": None, "tokens": [5, 261]}, "/tokens/1", "token_out_of_range"),
        ({"text": None, "tokens": [5], "positions": ["a"]}, "/positions/0", "text_not_found"),
        (
            {"text": None, "messages": [USER, {"role": "system", "content": "b"}]},
            "/messages",
            "invalid_messages",
        ),
        (
            {"steering": {"interventions": [{"kind": "add", "vector": "gone"}]}},
            "/steering/interventions/0/vector",
            "unknown_vector",
        ),
    ],
)
def test_what_cannot_be_read_is_refused(
    engine: TransformersEngine, fields: dict[str, Any], param: str, code: str
) -> None:
    with pytest.raises(SteerError) as caught:
        read(engine, **fields)
    assert (caught.value.param, caught.value.code) == (param, code)


def test_an_answer_has_a_limit(engine: TransformersEngine) -> None:
    # 3 layers × 120 positions × 100 tokens pass; a limit of 65,536 numbers needs more layers.
    assert len(read(engine, text="w" * 119, top=100).cells) == 360
    with pytest.raises(SteerError, match="fewer positions") as caught:
        check_size([("layers", 80), ("positions", 900)], advice="read fewer positions")
    assert (caught.value.status, caught.value.code) == (413, "answer_too_large")
