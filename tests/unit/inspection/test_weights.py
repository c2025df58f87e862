"""Weights read as tokens, against explicit products of the same matrices in float64."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from tiny_families import build_family
from tiny_models import tiny_tokenizer
from torch import Tensor, nn

from steer.artefacts.control_vector import ControlVector
from steer.artefacts.library import MemoryLibrary
from steer.engines.base import CaptureRequest, Engine, QueriesKeys
from steer.engines.fake.engine import FakeEngine
from steer.engines.transformers.engine import TransformersEngine
from steer.errors import SteerError, Unsupported
from steer.inspection import WeightsRequest, WeightsResult, weights, weights_heat_map
from steer.inspection.weights.embeddings import Embeddings
from steer.inspection.weights.pairs import spread_of, strongest_pairs
from steer.inspection.weights.parts import values_read, written
from steer.inspection.weights.vocabulary import Vocabulary
from steer.model import HookPoint, ModelInfo

HEADS = 4


def read(engine: Engine, library: MemoryLibrary | None = None, **fields: Any) -> WeightsResult:
    return weights(engine, WeightsRequest.model_validate(fields), library=library)


@dataclass(frozen=True)
class Explicit:
    """The matrices of a tiny model, multiplied out in float64."""

    embedding: Tensor
    """`[vocab, d_model]`, with the first position's where the model adds one."""
    directions: Tensor
    """`[vocab, d_model]`: output matrix, final norm's weight and centring, at a state of size 1."""
    blocks: nn.ModuleList
    llama: bool

    def head(self, layer: int, head: int) -> Tensor:
        """Scores `[inputs, outputs]`."""
        block = self.blocks[layer]
        if self.llama:
            attention = block.self_attn
            x = block.input_layernorm(self.embedding)
            shared = HEADS // (attention.v_proj.out_features // attention.head_dim)
            width = attention.head_dim
            of_head = slice(head // shared * width, (head // shared + 1) * width)
            value = x @ attention.v_proj.weight[of_head].T
            out = attention.o_proj.weight[:, head * width : (head + 1) * width]
        else:
            attention, width = block.attn, block.attn.head_dim
            x = block.ln_1(self.embedding)
            of_head = slice(
                2 * HEADS * width + head * width, 2 * HEADS * width + (head + 1) * width
            )
            value = x @ attention.c_attn.weight[:, of_head] + attention.c_attn.bias[of_head]
            out = attention.c_proj.weight.T[:, head * width : (head + 1) * width]
        return value @ out.T @ self.directions.T

    def neuron(self, layer: int, neuron: int) -> tuple[Tensor, Tensor]:
        """Activations by each token, and the scores of what it writes, `[vocab]`."""
        block = self.blocks[layer]
        if self.llama:
            x = block.post_attention_layernorm(self.embedding)
            gate, up = block.mlp.gate_proj.weight[neuron], block.mlp.up_proj.weight[neuron]
            return block.mlp.act_fn(x @ gate) * (x @ up), self.directions @ (
                block.mlp.down_proj.weight[:, neuron]
            )
        x = block.ln_2(self.embedding)
        made = x @ block.mlp.c_fc.weight[:, neuron] + block.mlp.c_fc.bias[neuron]
        return block.mlp.act(made), self.directions @ block.mlp.c_proj.weight[neuron]


@pytest.fixture
def explicit(subject: Any) -> Explicit:
    model = copy.deepcopy(subject.model).double().requires_grad_(requires_grad=False)
    if hasattr(model, "model"):
        inner, norm = model.model, model.model.norm
        embedding = inner.embed_tokens.weight
        # At a state of size 1 the norm divides by what its epsilon makes of 1.
        directions = model.lm_head.weight * norm.weight / (1 + norm.variance_epsilon) ** 0.5
        return Explicit(embedding, directions, inner.layers, llama=True)
    inner, norm = model.transformer, model.transformer.ln_f
    embedding = inner.wte.weight + inner.wpe.weight[0]
    weighed = model.lm_head.weight * norm.weight / (1 + norm.eps) ** 0.5
    return Explicit(embedding, weighed - weighed.mean(-1, keepdim=True), inner.h, llama=False)


def agrees(found: tuple[Any, ...], wanted: Tensor, *, least: bool = False) -> None:
    """`found` are the strongest of `wanted`, within 1e-5 of the largest."""
    best = wanted.topk(len(found), largest=not least)
    near = 1e-5 * float(wanted.abs().max())
    assert [one.id for one in found] == best.indices.tolist()
    assert [one.score for one in found] == pytest.approx(best.values.tolist(), abs=near)


@pytest.mark.parametrize("layer", [0, 2])
def test_a_neuron_is_its_columns(subject: Any, explicit: Explicit, layer: int) -> None:
    result = read(subject.engine, layer=layer, neuron=7, top=6)
    reads, writes = result.readings
    activations, scores = explicit.neuron(layer, 7)
    assert (reads.what, reads.site, writes.what, writes.site) == (
        "reads",
        "resid_mid",
        "writes",
        "mlp_out",
    )
    for found, wanted in ((reads, activations), (writes, scores)):
        agrees(found.most, wanted)
        agrees(found.least, wanted, least=True)
    deviation = float(scores.std(unbiased=False))
    furthest = float((scores - scores.mean()).abs().max()) / deviation
    assert writes.standing == pytest.approx(furthest, rel=1e-4)
    assert result.by_chance is not None
    assert 2.0 < result.by_chance < 6.0


@pytest.mark.parametrize(("layer", "head"), [(0, 0), (1, 3), (2, 1)])
def test_a_head_is_the_product_of_its_matrices(
    subject: Any, explicit: Explicit, layer: int, head: int
) -> None:
    wanted = explicit.head(layer, head)
    result = read(subject.engine, layer=layer, head=head, top=8, inputs=[65, "b"])
    near = 1e-5 * float(wanted.abs().max())
    for found, sign in ((result.most, 1), (result.least, -1)):
        assert found is not None
        best = (sign * wanted).flatten().topk(8)
        places = [(place // wanted.shape[1], place % wanted.shape[1]) for place in best.indices]
        assert [(one.input.id, one.output.id) for one in found] == [
            (int(i), int(o)) for i, o in places
        ]
        scores = (sign * best.values).tolist()
        assert [one.score for one in found] == pytest.approx(scores, abs=near)
    tokens = (65, subject.engine.tokenizer.encode("b")[-1])
    for reading, token in zip(result.readings, tokens, strict=True):
        assert reading.input is not None
        assert reading.input.id == token
        agrees(reading.most, wanted[token])
        agrees(reading.least, wanted[token], least=True)
    (one,) = result.heads
    assert one.mean == pytest.approx(float(wanted.mean()), abs=near)
    assert one.deviation == pytest.approx(float(wanted.std(unbiased=False)), abs=near)
    assert one.own == pytest.approx(float(wanted.diagonal().mean()), abs=near)
    assert one.copying == pytest.approx((one.own - one.mean) / one.deviation)


def test_a_table_has_every_head_as_it_is_alone(subject: Any) -> None:
    table = read(subject.engine)
    assert [(one.layer, one.head) for one in table.heads] == [
        (layer, head) for layer in range(3) for head in range(HEADS)
    ]
    alone = read(subject.engine, layer=1, head=2).heads[0]
    assert table.heads[HEADS + 2].copying == pytest.approx(alone.copying, rel=1e-5)
    assert read(subject.engine, layer=1).heads == table.heads[HEADS : 2 * HEADS]
    assert (table.most, table.readings) == (None, ())


def test_a_vector_is_read_at_its_layers(subject: Any, explicit: Explicit) -> None:
    rows = torch.randn(2, subject.engine.info.d_model, generator=torch.Generator().manual_seed(3))
    library = MemoryLibrary({"joy": ControlVector.of({0: rows[0], 2: rows[1]}, name="joy")})
    result = read(subject.engine, library, vector="joy", top=4)
    assert [one.layer for one in result.readings] == [0, 2]
    for one, vector in zip(result.readings, rows.double(), strict=True):
        agrees(one.most, explicit.directions @ vector)
        assert one.norm == pytest.approx(float(vector.norm()), rel=1e-6)
    (single,) = read(subject.engine, library, vector="joy", layer=2, top=4).readings
    assert single == result.readings[1]
    token = int((explicit.directions @ rows[0].double()).argmax())
    planted = ControlVector.of({1: explicit.directions[token].float()}, name="token")
    found = read(subject.engine, MemoryLibrary({"token": planted}), vector="token")
    assert found.readings[0].most[0].id == token


def test_scores_of_a_sum_are_the_sum_of_the_scores(subject: Any) -> None:
    vocabulary = Vocabulary.of(subject.engine)
    one, other = torch.randn(2, 32, generator=torch.Generator().manual_seed(4)).double()
    rows = torch.stack([one, other, one - 3 * other, 1e-3 * one, torch.zeros(32)])
    scores = vocabulary.scores(rows)
    near = 1e-5 * float(scores.abs().max())
    assert torch.allclose(scores[2], scores[0] - 3 * scores[1], atol=near)
    assert torch.allclose(1e3 * scores[3], scores[0], atol=near)
    assert not scores[4].any()


def test_pairs_are_exact_whatever_the_order() -> None:
    generator = torch.Generator().manual_seed(5)
    reads = torch.randn(900, 6, generator=generator) * torch.rand(900, 1, generator=generator)
    writes = torch.randn(20_000, 6, generator=generator)
    product = reads.double() @ writes.double().T
    most, least = strongest_pairs(reads, writes, 12)
    for found, best in ((most, product.flatten().topk(12)), (least, (-product).flatten().topk(12))):
        places = [(place // 20_000, place % 20_000) for place in best.indices.tolist()]
        assert [(pair.input, pair.output) for pair in found] == places
    shuffle = torch.randperm(900, generator=generator)
    again, _ = strongest_pairs(reads[shuffle], writes, 12)
    assert [(int(shuffle[pair.input]), pair.output) for pair in again] == [
        (pair.input, pair.output) for pair in most
    ]
    square = spread_of(reads, writes[:900])
    part = product[:, :900]
    assert square.mean == pytest.approx(float(part.mean()), abs=1e-6)
    assert square.deviation == pytest.approx(float(part.std(unbiased=False)), rel=1e-6)
    assert square.own == pytest.approx(float(part.diagonal().mean()), abs=1e-6)


def test_as_many_pairs_as_there_are() -> None:
    most, least = strongest_pairs(torch.zeros(3, 2), torch.ones(4, 2), 5)
    assert [len({pair[:2] for pair in found}) for found in (most, least)] == [5, 5]
    assert [pair.score for pair in least] == [0.0] * 5
    everything, _ = strongest_pairs(torch.eye(2), torch.eye(2), 100)
    assert len(everything) == 4


FAMILIES = (
    "neox-parallel",
    "gemma2",
    "gemma3",
    "olmo2",
    "glm4",
    "granite",
    "cohere",
    "phi",
    "nemotron",
    "gpt-j",
    "opt",
    "mixtral",
    "starcoder2",
)


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> Iterator[TransformersEngine]:
    model = build_family(request.param)
    with TransformersEngine(model, tiny_tokenizer(), rows=4, slots=2) as engine:
        yield engine


def test_a_block_alone_does_what_it_does_in_the_model(family: TransformersEngine) -> None:
    info = family.info
    pairs = [("resid_pre", "head_out"), ("resid_mid", "mlp_act"), ("head_out", "attn_out")]
    there = [pair for pair in pairs if set(pair) <= set(info.sites)] + [("resid_pre", "resid_post")]
    points = tuple(HookPoint(n, site) for n in range(info.n_layers) for site in info.sites)
    captured = family.capture(CaptureRequest([(5,), (9,), (11,)], points))
    before = family.capture(CaptureRequest([(5, 6, 7)], points))[0]
    for layer in range(info.n_layers):
        for start, end in there:
            source, target = HookPoint(layer, start), HookPoint(layer, end)
            states = torch.cat([one.states[source] for one in captured])
            wanted = torch.cat([one.states[target] for one in captured])
            made = family.carry(source, target, states)
            assert torch.allclose(made, wanted, atol=1e-5, rtol=1e-4), (source, target)
            # Rows do not see each other.
            assert torch.allclose(family.carry(source, target, states[1:2]), wanted[1:2], atol=1e-5)
    after = family.capture(CaptureRequest([(5, 6, 7)], points))[0]
    for point in points:
        assert torch.equal(before.states[point], after.states[point])


def test_what_heads_write_is_what_attention_adds(family: TransformersEngine) -> None:
    info = family.info
    if "attn_out" not in info.sites:
        with pytest.raises(SteerError) as caught:
            read(family, layer=1, head=1)
        assert caught.value.code == "unsupported_site"
        return
    channels = range(info.width("head_out"))
    tokens = [5, 9, 11]
    embeddings = Embeddings(family)
    for layer in range(info.n_layers):
        columns = written(family, HookPoint(layer, "head_out"), channels, param="/head")
        values = values_read(family, embeddings, layer, range(info.n_heads or 0))[tokens]
        made = values.flatten(1).double() @ columns
        states = embeddings.of(tokens)
        ends = HookPoint(layer, "resid_pre"), HookPoint(layer, "attn_out")
        added = family.carry(*ends, states).double()
        bias = family.carry(
            HookPoint(layer, "head_out"), ends[1], torch.zeros(1, info.width("head_out"))
        ).double()
        # With a norm behind the projection the lengths differ, and nothing else.
        cosine = nn.functional.cosine_similarity(made, added - bias)
        assert cosine.min() > 1 - 1e-6


def test_every_family_reads_its_heads_and_neurons_or_says_why_not(
    family: TransformersEngine,
) -> None:
    for part in ("head", "neuron"):
        site = "head_out" if part == "head" else "mlp_act"
        if site in family.info.sites and {"attn_out", "mlp_out"} <= set(family.info.sites):
            result = read(family, layer=1, **{part: 1})
            assert result.part == f"layer 1, {part} 1"
            continue
        with pytest.raises(SteerError) as caught:
            read(family, layer=1, **{part: 1})
        assert caught.value.code == "unsupported_site"


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"layer": 3, "neuron": 0}, "/layer", "layer_out_of_range"),
        ({"layer": 0, "neuron": 10_000}, "/neuron", "neuron_out_of_range"),
        ({"layer": 0, "head": 4}, "/head", "head_out_of_range"),
        ({"layer": 0, "head": 0, "inputs": [5, "river"]}, "/inputs/1", "not_one_token"),
        ({"layer": 0, "head": 0, "inputs": [10_000]}, "/inputs/0", "token_out_of_range"),
        ({"vector": "nobody"}, "/vector", "unknown_vector"),
        ({"vector": "narrow"}, "/vector", "wrong_width"),
        ({"vector": "inner"}, "/vector", "wrong_site"),
        ({"vector": "two", "layer": 1}, "/layer", "layer_not_in_vector"),
        ({"vector": "two", "layer": 9}, "/layer", "layer_out_of_range"),
    ],
)
def test_what_cannot_be_read_is_refused(
    subject: Any, fields: dict[str, Any], param: str, code: str
) -> None:
    wide = torch.ones(subject.engine.info.d_model)
    inner = torch.ones(subject.engine.info.width("mlp_act"))
    library = MemoryLibrary(
        {
            "narrow": ControlVector.of({0: torch.ones(3)}, name="narrow"),
            "inner": ControlVector.of({0: inner}, name="inner", site="mlp_act"),
            "two": ControlVector.of({0: wide, 2: wide}, name="two"),
        }
    )
    with pytest.raises(SteerError) as caught:
        read(subject.engine, library, **fields)
    assert (caught.value.param, caught.value.code) == (param, code)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"neuron": 1}, "give 'layer' too"),
        ({"layer": 0, "neuron": 1, "head": 1}, "read one at a time"),
        ({"layer": 0, "neuron": 1, "inputs": [3]}, "a head attends to"),
        ({"layer": -1}, "counted from the model's end"),
    ],
)
def test_a_request_names_one_part(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        WeightsRequest.model_validate(fields)


def test_an_engine_without_its_weights_reads_vectors_alone() -> None:
    engine = FakeEngine()
    engine.capabilities = replace(engine.capabilities, projections=(), carries=False)
    library = MemoryLibrary({"up": ControlVector.of({1: torch.ones(16)}, name="up")})
    assert read(engine, library, vector="up").readings[0].layer == 1
    for part in ("neuron", "head"):
        with pytest.raises(Unsupported, match="read a 'vector'") as caught:
            read(engine, library, layer=0, **{part: 0})
        assert caught.value.param == f"/{part}"


class _Normed(FakeEngine):
    """Behind its projections is something that is no norm."""

    def carry(
        self,
        source: HookPoint,
        target: HookPoint,
        states: Tensor,
        channels: range | None = None,
    ) -> Tensor:
        return super().carry(source, target, states, channels).exp()


class _Unproved(FakeEngine):
    """A layer of it shows nothing of what is asked."""

    def carry(self, *_: Any) -> Tensor:
        raise Unsupported("it does something else by itself", code="cannot_carry")

    def queries_and_keys(self, *_: Any) -> QueriesKeys:
        raise Unsupported("it is handed no key", code="no_attention")


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"layer": 1, "neuron": 0}, "/neuron", "cannot_carry"),
        ({"layer": 1, "head": 0}, "/head", "cannot_carry"),
        ({"layer": 1, "head": 0, "circuit": "qk"}, "/circuit", "no_attention"),
    ],
)
def test_what_a_layer_does_not_show_is_refused_at_the_field(
    fields: dict[str, Any], param: str, code: str
) -> None:
    engine = _Unproved()
    engine.capabilities = replace(engine.capabilities, attention=True)
    with pytest.raises(Unsupported) as caught:
        read(engine, **fields)
    assert (caught.value.param, caught.value.code) == (param, code)


def test_a_projection_behind_something_else_is_refused() -> None:
    info: ModelInfo = FakeEngine().info
    with pytest.raises(Unsupported, match="is no norm of what its output projection") as caught:
        read(_Normed(info), layer=0, neuron=1)
    assert (caught.value.param, caught.value.code) == ("/neuron", "unsupported_inspection")


def test_pictures_of_each_form(subject: Any) -> None:
    table = weights_heat_map(read(subject.engine))
    assert (list(table.rows), list(table.columns)) == (["0", "1", "2"], ["0", "1", "2", "3"])
    neuron = weights_heat_map(read(subject.engine, layer=1, neuron=4, top=3))
    assert list(neuron.rows) == [
        "1 writes, least",
        "1 writes, most",
        "1 reads, least",
        "1 reads, most",
    ]
    assert max(abs(value) for row in neuron.values for value in row) == pytest.approx(1.0)
    head = weights_heat_map(read(subject.engine, layer=1, head=0, inputs=["a"], top=3))
    assert list(head.rows) == ["least pairs", "most pairs", "'a', least", "'a', most"]
    for heat in (table, neuron, head):
        assert heat.png().startswith(b"\x89PNG")
