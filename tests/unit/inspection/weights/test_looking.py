"""What heads look for, against products of the models' own matrices."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny_families import build_family
from tiny_models import tiny_tokenizer
from torch import Tensor

from steer.engines.fake.engine import FakeEngine
from steer.engines.transformers.engine import TransformersEngine
from steer.errors import IncompatibleArtefact, SpecError, Unsupported
from steer.inspection import WeightsRequest, WeightsResult, weights, weights_heat_map
from steer.inspection.weights.looking import (
    Looks,
    looks_of_heads,
    strongest_by_chance,
    strongest_of,
)

HEADS, GROUPS = 4, 2
LAYER = 1
Parts = Callable[[Any, Tensor], tuple[Tensor, Tensor]]


def read(engine: Any, **fields: Any) -> WeightsResult:
    return weights(engine, WeightsRequest.model_validate({"circuit": "qk", **fields}))


def by_head(x: Tensor, heads: int) -> Tensor:
    return x.unflatten(-1, (heads, -1)).repeat_interleave(HEADS // heads, 1)


def llama(block: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    x, one = block.input_layernorm(x), block.self_attn
    return by_head(one.q_proj(x), HEADS), by_head(one.k_proj(x), GROUPS)


def gpt2(block: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    query, key, _ = block.attn.c_attn(block.ln_1(x)).chunk(3, -1)
    return by_head(query, HEADS), by_head(key, HEADS)


def neox(block: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """Queries, keys and values lie beside one another head by head."""
    parts = block.attention.query_key_value(block.input_layernorm(x))
    query, key, _ = parts.unflatten(-1, (HEADS, -1)).chunk(3, -1)
    return query, key


def gemma3(block: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """Queries and keys are normed, each by itself."""
    x, one = block.input_layernorm(x), block.self_attn
    query = one.q_norm(one.q_proj(x).unflatten(-1, (HEADS, -1)))
    key = one.k_norm(one.k_proj(x).unflatten(-1, (GROUPS, -1)))
    return query, key.repeat_interleave(HEADS // GROUPS, 1)


FAMILIES: dict[str, tuple[str, Parts]] = {
    "llama": ("model.layers", llama),
    "gpt2": ("transformer.h", gpt2),
    "neox-parallel": ("gpt_neox.layers", neox),
    "gemma3": ("model.layers", gemma3),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_queries_and_keys_are_those_of_the_models_own_matrices(name: str) -> None:
    path, parts = FAMILIES[name]
    model = build_family(name).eval()
    states = torch.randn(7, 32, generator=torch.Generator().manual_seed(4))
    with TransformersEngine(model, tiny_tokenizer(), rows=2, slots=2) as engine:
        width = engine.info.d_model
        states = torch.randn(7, width, generator=torch.Generator().manual_seed(4))
        found = engine.queries_and_keys(LAYER, states)
        with pytest.raises(IncompatibleArtefact, match="layer 3 is out of range"):
            engine.queries_and_keys(3, states)
    block = model.get_submodule(path)[LAYER]
    with torch.no_grad():
        query, key = parts(block, states)
    scaling = next(
        (one.scaling for one in block.modules() if hasattr(one, "scaling")), query.shape[-1] ** -0.5
    )
    scores = torch.einsum("ihd,jhd->hij", found.queries, found.keys)
    wanted = scaling * torch.einsum("ihd,jhd->hij", query, key)
    assert scores == pytest.approx(wanted, abs=1e-4)
    assert float(wanted.abs().max()) > 1e-2


def test_a_model_that_attends_in_its_own_way_is_refused() -> None:
    with (
        TransformersEngine(build_family("gpt-j"), tiny_tokenizer(), rows=2, slots=2) as engine,
        pytest.raises(Unsupported, match="transformers' attention interface in layer 1") as caught,
    ):
        engine.queries_and_keys(1, torch.ones(2, engine.info.d_model))
    assert caught.value.code == "no_attention"


def scores_of(subject: Any, layer: int, head: int) -> Tensor:
    """By hand, float64 `[queries, keys]`."""
    model = copy.deepcopy(subject.model).double().requires_grad_(requires_grad=False)
    if hasattr(model, "model"):
        query, key = llama(model.model.layers[layer], model.model.embed_tokens.weight)
    else:
        inner = model.transformer
        query, key = gpt2(inner.h[layer], inner.wte.weight + inner.wpe.weight[0])
    return query[:, head] @ key[:, head].T / query.shape[-1] ** 0.5


def test_a_heads_strongest_pairs_are_those_of_the_product(subject: Any) -> None:
    wanted = scores_of(subject, 2, 3)
    result = read(subject.engine, layer=2, head=3, inputs=[65], top=5)
    for pairs, ends in ((result.most, wanted), (result.least, -wanted)):
        best = ends.flatten().topk(5).indices
        assert [(one.output.id, one.input.id) for one in pairs or ()] == [
            divmod(int(place), len(wanted)) for place in best
        ]
    (head,) = result.heads
    assert head.mean == pytest.approx(float(wanted.mean()), abs=1e-5)
    assert head.own == pytest.approx(float(wanted.diag().mean()), abs=1e-5)
    spread = float(wanted.std(unbiased=False))
    assert head.deviation == pytest.approx(spread, rel=1e-4)
    furthest = float((wanted - wanted.mean()).abs().max()) / spread
    assert head.strongest == pytest.approx(furthest, rel=1e-4)
    (seeks,) = result.readings
    assert (seeks.what, seeks.site, seeks.input and seeks.input.id) == ("seeks", "resid_pre", 65)
    assert [one.id for one in seeks.most] == wanted[65].topk(5).indices.tolist()
    assert [one.score for one in seeks.most] == pytest.approx(
        wanted[65].topk(5).values.tolist(), abs=1e-4
    )
    assert result.by_chance is not None


def test_a_table_has_every_head(subject: Any) -> None:
    result = read(subject.engine)
    assert [(one.layer, one.head) for one in result.heads] == [
        (layer, head) for layer in range(3) for head in range(HEADS)
    ]
    wanted = scores_of(subject, 1, 2)
    found = read(subject.engine, layer=1).heads[2]
    spread = float(wanted.std(unbiased=False))
    own = float(wanted.diag().mean() - wanted.mean()) / spread
    assert found.copying == pytest.approx(own, abs=1e-4)
    assert found.strongest is None
    assert weights_heat_map(result).png().startswith(b"\x89PNG")


def test_a_head_that_looks_for_one_token_stands_above_keys_turned_at_random() -> None:
    """Where queries mean what keys mean, and only then."""
    generator = torch.Generator().manual_seed(1)
    keys = torch.randn(400, 16, generator=generator)
    meant = Looks(keys, keys + 0.1 * torch.randn(400, 16, generator=generator))
    other = Looks(keys, torch.randn(400, 16, generator=generator))
    assert strongest_of(*meant) > 1.3 * strongest_by_chance(*meant)
    assert strongest_of(*other) == pytest.approx(strongest_by_chance(*other), rel=0.25)


def test_a_layers_heads_come_some_at_a_time(subject: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from steer.inspection.weights import looking
    from steer.inspection.weights.embeddings import Embeddings

    whole = list(looks_of_heads(subject.engine, Embeddings(subject.engine), 1))
    monkeypatch.setattr(looking, "_NUMBERS_AT_ONCE", 1)
    one_by_one = list(looks_of_heads(subject.engine, Embeddings(subject.engine), 1))
    assert len(whole) == len(one_by_one) == HEADS
    for mine, other in zip(whole, one_by_one, strict=True):
        assert torch.equal(mine.keys, other.keys)
        assert torch.equal(mine.queries, other.queries)


def test_what_is_not_a_heads_is_refused(subject: Any) -> None:
    for part in ({"neuron": 1}, {"vector": "up"}):
        with pytest.raises(ValueError, match="attends to nothing: 'circuit' is one of heads'"):
            WeightsRequest.model_validate({"circuit": "qk", "layer": 0, **part})
    with pytest.raises(SpecError, match="heads 0 to 3") as out_of_range:
        read(subject.engine, layer=0, head=4)
    assert out_of_range.value.param == "/head"
    with pytest.raises(IncompatibleArtefact) as no_layer:
        read(subject.engine, layer=9, head=0)
    assert no_layer.value.param == "/layer"


def test_an_engine_that_does_not_tell_is_refused_and_one_that_does_is_named() -> None:
    engine = FakeEngine()
    engine.capabilities = replace(engine.capabilities, attention=False)
    with pytest.raises(Unsupported, match="what heads attend by") as caught:
        read(engine, layer=0, head=0)
    assert (caught.value.param, caught.value.code) == ("/circuit", "unsupported_inspection")
    able = replace(engine.capabilities, attention=True, projections=(), carries=False)
    engine.capabilities = able
    assert read(engine, layer=0, head=0).heads
    with pytest.raises(Unsupported, match="or the circuit 'qk' of a head here"):
        weights(engine, WeightsRequest(layer=0, head=0))
