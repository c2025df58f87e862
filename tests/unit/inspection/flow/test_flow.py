"""What heads carry from token to token, against the same heads taken apart by hand in float64."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from importlib import import_module
from typing import Any

import pytest
import torch
from tiny_families import build_family
from tiny_models import tiny_tokenizer
from torch import Tensor

from steer.artefacts.control_vector import ControlVector
from steer.artefacts.library import MemoryLibrary
from steer.engines.base import Attention, Captured, CaptureRequest, Engine
from steer.engines.fake.engine import FakeEngine
from steer.engines.transformers.engine import TransformersEngine
from steer.errors import SteerError, TooLarge, Unsupported
from steer.inspection import FLOW, AttributionRequest, FlowRequest, FlowResult, attribution, flow
from steer.inspection.attribution.parts import projected_parts
from steer.inspection.flow.edges import HeadsAt, OutputProjection
from steer.model import HookPoint
from steer.plan.cache import PlanCache

TEXT = "the river runs"
HEADS, GROUPS = 4, 2
EVERY = 512


def read(engine: Engine, **fields: Any) -> FlowResult:
    return flow(engine, FlowRequest.model_validate({"text": TEXT, **fields}))


def turned(x: Tensor, theta: float) -> Tensor:
    """Rotary positions by hand: `[heads, tokens, width]`."""
    width = x.shape[-1]
    angles = torch.arange(x.shape[1]).double()[:, None] * theta ** (
        -torch.arange(0, width, 2).double() / width
    )
    angles = torch.cat([angles, angles], -1)
    half = torch.cat([-x[..., width // 2 :], x[..., : width // 2]], -1)
    return x * angles.cos() + half * angles.sin()


def llama_edges(model: Any, ids: list[int], layer: int) -> tuple[Tensor, Tensor]:
    """The weights `[heads, tokens, tokens]` of one layer and what each head writes of each token
    where it attends with weight 1, `[heads, tokens, d_model]`, from the matrices."""
    block = model.model.layers[layer]
    with torch.no_grad():
        states = model(torch.tensor([ids]), output_hidden_states=True, use_cache=False)
        x = block.input_layernorm(states.hidden_states[layer][0])
        attention = block.self_attn
        parts = [
            getattr(attention, name)(x).unflatten(-1, (-1, 8)).transpose(0, 1)
            for name in ("q_proj", "k_proj", "v_proj")
        ]
    theta = model.config.rope_parameters["rope_theta"]
    q, k = turned(parts[0], theta), turned(parts[1], theta).repeat_interleave(2, 0)
    scores = q @ k.transpose(1, 2) / math.sqrt(8)
    later = torch.ones(len(ids), len(ids)).triu(1).bool()
    weights = scores.masked_fill(later, -torch.inf).softmax(-1)
    out = attention.o_proj.weight.T.reshape(HEADS, 8, -1)
    return weights, parts[2].repeat_interleave(2, 0) @ out


def test_edges_are_what_they_are_by_hand(subject: Any) -> None:
    if not hasattr(subject.model, "model"):
        pytest.skip("by hand for rotary positions and grouped heads; others are sums, below")
    model = copy.deepcopy(subject.model).double().requires_grad_(requires_grad=False)
    ids = subject.engine.tokenizer.encode(TEXT)
    place, token = len(ids) - 1, 17
    result = read(subject.engine, token=token, edges=EVERY)
    states = model(torch.tensor([ids]), output_hidden_states=True, use_cache=False)
    stream: list[Tensor] = []
    handle = model.model.norm.register_forward_hook(lambda _m, a, _o: stream.append(a[0][0]))
    model(torch.tensor([ids]), use_cache=False)
    handle.remove()
    x, norm = stream[0][place], model.model.norm
    scale = (x.pow(2).mean() + norm.variance_epsilon).sqrt()
    direction = model.lm_head.weight[token] * norm.weight / scale
    found = {(one.layer, one.head, one.reads): one for one in result.edges}
    assert len(found) == 3 * HEADS * len(ids)
    for layer in range(3):
        weights, written = llama_edges(model, ids, layer)
        for head in range(HEADS):
            for source in range(len(ids)):
                edge = found[layer, head, source]
                vector = weights[head, place, source] * written[head, source]
                assert edge.weight == pytest.approx(float(weights[head, place, source]), abs=1e-5)
                assert edge.share == pytest.approx(float(vector @ direction), abs=1e-4)
                assert edge.norm == pytest.approx(float(vector.norm()), abs=1e-4)
                raised = (model.lm_head.weight * norm.weight) @ vector
                assert edge.writes[0].id == int(raised.argmax())
                assert edge.writes[0].score == pytest.approx(float(raised.max()), abs=1e-4)
    assert states.logits[0, place, token] == pytest.approx(result.followed[0].logit, abs=1e-4)


FAMILIES = ["llama", "gpt2", "neox-parallel", "gemma2", "gemma3", "olmo2", "glm4", "cohere", "phi",
            "granite", "nemotron", "mixtral"]  # fmt: skip


@pytest.mark.parametrize("name", FAMILIES)
def test_the_parts_of_every_family_sum_to_the_stream(name: str) -> None:
    """The edges into a node, the MLP and the stream before are the stream after, channel by
    channel, and so are their shares of the logit."""
    ids, last = list(range(3, 15)), 11
    with TransformersEngine(build_family(name), tiny_tokenizer(), rows=2, slots=2) as engine:
        layers = range(engine.info.n_layers)
        points = [HookPoint(0, "resid_pre")]
        sites = ("attn_out", "mlp_out", "resid_post", "head_out")
        points += [HookPoint(layer, site) for layer in layers for site in sites]
        (seen,) = engine.capture(CaptureRequest([ids], tuple(points), attention=tuple(layers)))
        before = seen.states[HookPoint(0, "resid_pre")][last].double()
        for part in projected_parts(engine, seen.states, "head_out", instead="do not ask"):
            layer = part.point.layer
            out = OutputProjection.of(engine, layer)
            heads = HeadsAt.of(engine, seen.attention[layer], last, part, out)
            pairs = [(head, token) for head in range(HEADS) for token in range(len(ids))]
            edges = heads.written([head for head, _ in pairs], [token for _, token in pairs])
            whole = heads.whole(list(range(HEADS)))
            assert edges.reshape(HEADS, len(ids), -1).sum(1) == pytest.approx(whole, abs=1e-5)
            assert whole == pytest.approx(part.heads(engine, HEADS), abs=1e-4)
            mlp = seen.states[HookPoint(layer, "mlp_out")][last].double()
            after = seen.states[HookPoint(layer)][last].double()
            assert before + edges.sum(0) + heads.bias + mlp == pytest.approx(after, abs=1e-4)
            before = after
        result = read(engine, text=None, tokens=ids, edges=EVERY)
    (one,) = result.followed
    assert one.unexplained == pytest.approx(0.0, abs=1e-4)
    for layer in one.layers:
        into = sum(edge.share for edge in result.edges if edge.layer == layer.layer)
        assert into + layer.left_out + layer.bias == pytest.approx(layer.attention, abs=1e-4)
        assert layer.left_out == pytest.approx(0.0, abs=1e-4)
        assert layer.rest == pytest.approx(0.0, abs=1e-4)
        if name not in ("phi", "neox-parallel", "gpt2"):
            assert layer.bias == pytest.approx(0.0, abs=1e-4)


def test_heads_are_those_of_an_attribution(subject: Any) -> None:
    parts = attribution(
        subject.engine, AttributionRequest(text=TEXT, token=9, position=5, heads=True)
    )
    result = read(subject.engine, token=9, positions=[5], edges=EVERY)
    assert len(result.heads) == 3 * HEADS
    for one in result.heads:
        shares = parts.layers[one.layer].heads
        assert shares is not None
        assert one.share == pytest.approx(shares[one.head], abs=1e-4)
    assert result.followed[0].logit == pytest.approx(parts.logit, abs=1e-5)


def test_the_strongest_edges_are_kept_and_the_rest_is_counted(subject: Any) -> None:
    every = read(subject.engine, edges=EVERY, positions=[3, -1])
    some = read(subject.engine, edges=5, positions=[3, -1])
    for position in some.positions:
        all_here = [one for one in every.edges if one.position == position]
        here = [one for one in some.edges if one.position == position]
        assert here == all_here[:5]
        sizes = [abs(one.share) for one in all_here]
        assert sizes == sorted(sizes, reverse=True)
    for one in some.followed:
        for layer in one.layers:
            into = sum(
                edge.share
                for edge in some.edges
                if edge.layer == layer.layer and edge.position == one.position
            )
            assert into + layer.left_out + layer.bias == pytest.approx(layer.attention, abs=1e-6)
    ids = {node.id for node in some.nodes}
    assert len(ids) == len(some.nodes)
    assert {one.source for one in some.edges} | {one.target for one in some.edges} <= ids
    assert {one.position for one in some.edges} == {3, len(some.tokens) - 1}
    assert all(one.reads <= one.position for one in some.edges)


def test_positions_do_not_change_each_other(subject: Any) -> None:
    alone = read(subject.engine, positions=[4])
    beside = read(subject.engine, positions=[9, 4])
    here = [one for one in beside.edges if one.position == 4]
    assert len(here) == len(alone.edges)
    for one, other in zip(here, alone.edges, strict=True):
        assert (one.layer, one.head, one.reads) == (other.layer, other.head, other.reads)
        assert one.share == pytest.approx(other.share, abs=1e-5)


def test_without_a_token_each_position_follows_what_is_said_there(subject: Any) -> None:
    ids = tuple(subject.engine.tokenizer.encode(TEXT))
    result = read(subject.engine, positions=[2, -1])
    said = subject.logits(ids).argmax(-1).tolist()
    assert [one.token.id for one in result.followed] == [said[2], said[-1]]
    ends = [node for node in result.nodes if node.id == f"residual.2@{len(ids) - 1}"]
    assert [node.says[0].id for node in ends] == [said[-1]]


def steered_by(engine: Engine, site: str) -> tuple[PlanCache, dict[str, Any]]:
    width = engine.info.width(site)  # type: ignore[arg-type]
    row = torch.randn(width, generator=torch.Generator().manual_seed(2))
    vector = ControlVector.of({1: row}, name="up", site=site)  # type: ignore[arg-type]
    plans = PlanCache(MemoryLibrary({"up": vector}), engine.info, engine.capabilities)
    edit = {"kind": "add", "vector": "up", "site": site, "layers": [1], "strength": 3.0}
    return plans, {"text": TEXT, "token": 9, "steering": {"interventions": [edit]}}


def test_what_steering_adds_to_the_stream_is_the_rest(subject: Any) -> None:
    plans, body = steered_by(subject.engine, "resid_post")
    result = flow(subject.engine, FlowRequest.model_validate(body), plans=plans)
    assert result.fingerprint is not None
    (one,) = result.followed
    assert [abs(layer.rest) > 1e-3 for layer in one.layers] == [False, True, False]
    assert one.unexplained == pytest.approx(0.0, abs=1e-4)


@pytest.mark.parametrize("site", ["attn_out", "head_out"])
def test_steering_of_what_heads_make_is_refused(subject: Any, site: str) -> None:
    plans, body = steered_by(subject.engine, site)
    with pytest.raises(Unsupported, match=f"the steering edits '{site}'") as caught:
        flow(subject.engine, FlowRequest.model_validate(body), plans=plans)
    assert (caught.value.param, caught.value.code) == ("/steering", "unsupported_inspection")


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"token": "river"}, "/token", "not_one_token"),
        ({"positions": [99]}, "/positions/0", "position_out_of_range"),
        ({"positions": "all", "text": "a" * 70}, "/positions", "answer_too_large"),
        ({"positions": list(range(64)), "edges": 512, "text": "a" * 70}, "/positions",
         "answer_too_large"),
    ],
)  # fmt: skip
def test_what_cannot_be_followed_is_refused(
    subject: Any, fields: dict[str, Any], param: str, code: str
) -> None:
    with pytest.raises(SteerError) as caught:
        read(subject.engine, **fields)
    assert (caught.value.param, caught.value.code) == (param, code)


def test_a_prompt_that_is_too_long_is_refused(
    subject: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(import_module("steer.inspection.flow.method"), "MAX_TOKENS", 5)
    with pytest.raises(TooLarge, match="at most 5"):
        read(subject.engine)


@pytest.mark.parametrize("name", ["falcon", "gpt-j"])
def test_a_model_that_attends_in_its_own_way_is_refused(name: str) -> None:
    with (
        TransformersEngine(build_family(name), tiny_tokenizer(), rows=2, slots=2) as engine,
        pytest.raises(Unsupported, match="does not attend through") as caught,
    ):
        read(engine, text=None, tokens=list(range(3, 9)))
    assert caught.value.code == "no_attention"


def test_a_gate_behind_the_heads_is_refused(subject: Any) -> None:
    engine = subject.engine

    class Gated:
        """The engine, with heads that give something else than what they attend to."""

        def __getattr__(self, name: str) -> Any:
            return getattr(engine, name)

        def capture(self, request: CaptureRequest) -> list[Captured]:
            return [
                replace(
                    one,
                    attention={
                        layer: Attention(at.weights, at.values * 0.5)
                        for layer, at in one.attention.items()
                    },
                )
                for one in engine.capture(request)
            ]

    with pytest.raises(Unsupported, match="something in between, such as a gate"):
        read(Gated())  # type: ignore[arg-type]


def test_an_engine_that_does_not_tell_attention_is_refused() -> None:
    engine = FakeEngine()
    assert not FLOW.possible(engine.capabilities)
    with pytest.raises(Unsupported, match="does not tell what the heads"):
        read(engine)
    with pytest.raises(Unsupported, match="does not tell what heads attend to") as caught:
        engine.capture(CaptureRequest([[1, 2]], attention=(0,)))
    assert caught.value.code == "no_attention"


def test_the_picture_is_the_same_each_time_and_has_its_limits(
    subject: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = read(subject.engine)
    one, other = (FLOW.draw(result).png() for _ in range(2))
    assert one == other
    assert one.startswith(b"\x89PNG")
    monkeypatch.setattr(import_module("steer.inspection.flow.drawing"), "MAX_COLUMNS", 1)
    with pytest.raises(TooLarge, match="not readable"):
        FLOW.draw(result).png()
