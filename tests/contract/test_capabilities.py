"""What engines say they can do is what they do, and what is offered follows from it alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from tiny_models import tiny_tokenizer
from torch import nn

from steer.artefacts.control_vector import ControlVector
from steer.artefacts.library import MemoryLibrary
from steer.artefacts.sae.architectures import ARCHITECTURES, SUPPORTED
from steer.engines.base import CaptureRequest, Engine
from steer.engines.fake.engine import FakeEngine, fake_model
from steer.engines.fake.tokenizer import ByteTokenizer
from steer.engines.gradients import differentiable
from steer.engines.transformers.engine import TransformersEngine
from steer.engines.vllm.front.engine import VllmEngine
from steer.errors import Unsupported
from steer.inspection import (
    METHODS,
    ActivationsRequest,
    AskRequest,
    AttributionRequest,
    ClustersRequest,
    ConceptsRequest,
    CoordinatesRequest,
    LogitLensRequest,
    MatchRequest,
    PatchscopeRequest,
    TraceRequest,
    WeightsRequest,
    activations,
    ask,
    attribution,
    clusters,
    concepts,
    coordinates,
    logit_lens,
    match,
    offered,
    patchscope,
    trace,
    weights,
)
from steer.jobs.engine import BackgroundEngine
from steer.jobs.limits import JobLimits
from steer.jobs.pace import Pace
from steer.model import HookPoint

EVERY = (
    "patchscope",
    "logit_lens",
    "activations",
    "ask",
    "attribution",
    "trace",
    "weights",
    "match",
    "coordinates",
    "clusters",
    "concepts",
    "flow",
)
UP = MemoryLibrary({"up": ControlVector.of({1: torch.ones(16)}, name="up")})
PLACED: Any = {"prompts": [{"text": "a"}, {"text": "b"}], "vectors": ["up"], "layer": 1}
SAID: Any = [{"text": "a", "pairs": {"kind": str(n)}} for n in range(10)]
PACE = Pace(lambda: 0, lambda: None, lambda _: None, duty=1.0, quiet_seconds=0.0)


@pytest.fixture(params=["fake", "transformers"])
def engine(request: pytest.FixtureRequest, tiny_model: Callable[[str], nn.Module]) -> Any:
    if request.param == "fake":
        yield FakeEngine()
        return
    with TransformersEngine(tiny_model("llama"), tiny_tokenizer(), rows=1, slots=2) as made:
        yield made


def test_an_engine_reads_the_sites_that_it_says(engine: Engine) -> None:
    assert engine.capabilities.captures == engine.info.sites
    points = tuple(HookPoint(1, site) for site in engine.capabilities.captures)
    (captured,) = engine.capture(CaptureRequest([(5, 6, 7)], points))
    for point in points:
        assert captured.states[point].shape == (3, engine.info.width(point.site))


def test_an_engine_gives_the_projections_that_it_says(engine: Engine) -> None:
    for site in engine.capabilities.projections:
        made = engine.project(HookPoint(1, site), torch.zeros(2, 3, engine.info.width(site)))
        assert (made.shape, made.dtype) == ((2, 3, engine.info.d_model), torch.float32)
    with pytest.raises(Unsupported, match="head_out, mlp_act, not of 'attn_out'") as caught:
        engine.project(HookPoint(1, "attn_out"), torch.zeros(1, engine.info.d_model))
    assert caught.value.code == "no_projection"


def test_an_engine_runs_a_block_by_itself_where_it_says_so(engine: Engine) -> None:
    start, end = HookPoint(1, "resid_pre"), HookPoint(1, "head_out")
    made = engine.carry(start, end, torch.ones(3, engine.info.d_model))
    assert (made.shape, made.dtype) == ((3, engine.info.width("head_out")), torch.float32)
    paced: Any = BackgroundEngine(engine, PACE, JobLimits())
    assert torch.equal(paced.carry(start, end, torch.ones(3, engine.info.d_model)), made)
    some = paced.carry(start, end, torch.ones(3, engine.info.d_model), range(2, 5))
    assert torch.equal(some, made[:, 2:5])
    with pytest.raises(Unsupported, match="the stream passes by that") as caught:
        engine.carry(end, HookPoint(1, "resid_post"), made)
    assert caught.value.code == "cannot_carry"
    engine.capabilities = replace(engine.capabilities, carries=False)
    with pytest.raises(Unsupported, match=r"from 1\.resid_pre to 1\.head_out") as caught:
        engine.carry(start, end, torch.ones(3, engine.info.d_model))
    assert caught.value.code == "cannot_carry"


def test_an_engine_has_gradients_where_it_says_so(engine: Engine) -> None:
    assert engine.capabilities.gradients == hasattr(engine, "differentiate")
    if engine.capabilities.gradients:
        device = differentiable(engine).differentiate(lambda model: model.device)
        assert device.type == "cpu"
        return
    with pytest.raises(Unsupported, match="cannot differentiate") as caught:
        differentiable(engine)
    assert caught.value.code == "no_gradients"


def test_jobs_have_the_gradients_of_their_engine(engine: Engine) -> None:
    paced: Any = BackgroundEngine(engine, PACE, JobLimits())
    if engine.capabilities.gradients:
        assert differentiable(paced).differentiate(lambda model: model.device).type == "cpu"
        return
    with pytest.raises(Unsupported, match="cannot differentiate"):
        differentiable(paced)


def test_saes_are_named_as_their_architectures_are(engine: Engine) -> None:
    assert engine.capabilities.sae_architectures == SUPPORTED
    assert tuple(one.name for one in ARCHITECTURES) == SUPPORTED
    assert "relu" not in SUPPORTED
    assert [one.name for one in ARCHITECTURES if not one.competitive] == [
        "standard",
        "jumprelu",
    ]


def test_inspections_are_offered_by_what_can_be_read(engine: Engine) -> None:
    able = engine.capabilities
    # The fake engine's heads attend to nothing.
    attends = able.engine == "transformers"
    assert offered(able) == (EVERY if attends else EVERY[:-1])
    assert offered(replace(able, attention=False)) == EVERY[:-1]
    assert offered(replace(able, captures=())) == ()
    assert offered(replace(able, captures=("mlp_out",))) == (
        "activations",
        "match",
        "coordinates",
        "clusters",
    )
    assert offered(replace(able, captures=("resid_mid",))) == (
        *EVERY[:4],
        "match",
        "coordinates",
        "clusters",
    )
    assert offered(replace(able, kinds=("add",))) == (
        "logit_lens",
        "activations",
        "attribution",
        "weights",
        "match",
        "coordinates",
        "clusters",
        "concepts",
        *(("flow",) if attends else ()),
    )


@pytest.mark.parametrize(
    ("name", "run"),
    [
        ("patchscope", lambda e: patchscope(e, PatchscopeRequest(source={"text": "a"}))),  # type: ignore[arg-type]
        ("logit_lens", lambda e: logit_lens(e, LogitLensRequest(text="a"))),
        ("activations", lambda e: activations(e, ActivationsRequest(text="a"))),
        ("ask", lambda e: ask(e, AskRequest(source={"text": "a"}, questions=["What?"]))),  # type: ignore[arg-type]
        ("attribution", lambda e: attribution(e, AttributionRequest(text="a"))),
        ("trace", lambda e: trace(e, TraceRequest(text="a", subject="a"))),
        ("weights", lambda e: weights(e, WeightsRequest(layer=1, neuron=3))),
        ("match", lambda e: match(e, MatchRequest(text="a", vectors=("up",)), library=UP)),
        ("concepts", lambda e: concepts(e, ConceptsRequest(examples=SAID))),
        ("clusters", lambda e: clusters(e, ClustersRequest(prompts=PLACED["prompts"], layer=1))),
        ("coordinates", lambda e: coordinates(e, CoordinatesRequest(**PLACED), library=UP)),
    ],
)
def test_what_is_not_offered_is_refused(name: str, run: Callable[[Engine], Any]) -> None:
    engine = FakeEngine()
    assert run(engine).object == f"inspect.{name}"
    engine.capabilities = replace(engine.capabilities, captures=())
    with pytest.raises(
        Unsupported, match=f"no '{name}' inspection: it can capture no states"
    ) as caught:
        run(engine)
    assert caught.value.code == "unsupported_inspection"


def test_the_table_holds_every_method_once() -> None:
    assert tuple(method.name for method in METHODS) == EVERY
    for method in METHODS:
        assert method.result.model_fields["object"].default == f"inspect.{method.name}"


@pytest.mark.parametrize("static", [False, True])
def test_vllm_offers_the_same_in_both_forms(static: bool) -> None:
    """What is not done inside CUDA graphs is done beside them; gradients it never has."""
    model = asdict(fake_model())
    answer = {"model": model, "passes": 4, "static": static, "slots": 8}
    nobody: Any = None
    driver: Any = Mock()
    engine = VllmEngine(driver, ByteTokenizer(), [[answer]], nobody, frozenset())
    able = engine.capabilities
    assert able.captures == engine.info.sites
    # Its kernels keep no weights of attention.
    assert offered(able) == EVERY[:-1]
    assert able.sae_architectures == SUPPORTED
    assert not able.gradients
    assert not hasattr(engine, "differentiate")
