"""Parts of a logit, against the same model taken apart by hand in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny_families import build_family
from tiny_models import tiny_tokenizer
from torch import Tensor, nn

from steer.artefacts.control_vector import ControlVector
from steer.artefacts.library import MemoryLibrary
from steer.engines.base import Engine
from steer.engines.fake.engine import FakeEngine
from steer.engines.transformers.engine import TransformersEngine
from steer.errors import SteerError, Unsupported
from steer.inspection import (
    AttributionRequest,
    AttributionResult,
    attribution,
    attribution_heat_map,
)
from steer.plan.cache import PlanCache

TEXT = "the river runs"
HEADS = 4


def read(engine: Engine, **fields: Any) -> AttributionResult:
    return attribution(engine, AttributionRequest.model_validate({"text": TEXT, **fields}))


def outputs_of(model: nn.Module, modules: dict[str, nn.Module], ids: list[int]) -> dict[str, Any]:
    """The inputs and outputs of named modules in one pass, by plain hooks."""
    found: dict[str, Any] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
            given = args[0] if args else kwargs["hidden_states"]
            found[name] = (given[0].clone(), (out if isinstance(out, Tensor) else out[0])[0])

        return hook

    handles = [m.register_forward_hook(keep(n), with_kwargs=True) for n, m in modules.items()]
    with torch.no_grad():
        found["logits"] = model(torch.tensor([ids]), use_cache=False).logits[0]
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("place", [-1, 3])
def test_every_part_is_what_it_is_by_hand(subject: Any, place: int) -> None:
    model = copy.deepcopy(subject.model).double().requires_grad_(requires_grad=False)
    llama = hasattr(model, "model")
    inner = model.model if llama else model.transformer
    blocks, norm = (inner.layers, inner.norm) if llama else (inner.h, inner.ln_f)
    modules: dict[str, nn.Module] = {"norm": norm}
    for n, block in enumerate(blocks):
        attention = block.self_attn if llama else block.attn
        modules |= {f"block{n}": block, f"attn{n}": attention, f"mlp{n}": block.mlp}
        modules[f"o{n}"] = attention.o_proj if llama else attention.c_proj
        modules[f"down{n}"] = block.mlp.down_proj if llama else block.mlp.c_proj
    ids = subject.engine.tokenizer.encode(TEXT)
    seen = outputs_of(model, modules, ids)
    x = seen["norm"][0][place]
    token, other = 17, 40
    row = model.lm_head.weight[token] - model.lm_head.weight[other]
    if llama:
        direction = row * norm.weight / (x.pow(2).mean() + norm.variance_epsilon).sqrt()
        constant = torch.tensor(0.0)
    else:
        spread = ((x - x.mean()).pow(2).mean() + norm.eps).sqrt()
        weighted = row * norm.weight
        direction, constant = (weighted - weighted.mean()) / spread, row @ norm.bias

    result = read(
        subject.engine, token=token, against=other, position=place, heads=True, neurons=1000
    )
    assert result.position == place % len(ids)
    wanted = seen["logits"][place]
    assert result.token.logit == pytest.approx(float(wanted[token]), abs=1e-4)
    assert result.logit == pytest.approx(float(wanted[token] - wanted[other]), abs=1e-4)
    assert result.constant == pytest.approx(float(constant), abs=1e-4)
    assert result.embedding == pytest.approx(float(seen["block0"][0][place] @ direction), abs=1e-4)
    assert result.neurons is not None
    neurons = {(one.layer, one.neuron): one for one in result.neurons}
    assert len(neurons) == sum(seen[f"down{n}"][0].shape[-1] for n in range(len(blocks)))
    for n, layer in enumerate(result.layers):
        assert layer.attention == pytest.approx(
            float(seen[f"attn{n}"][1][place] @ direction), abs=1e-4
        )
        assert layer.mlp == pytest.approx(float(seen[f"mlp{n}"][1][place] @ direction), abs=1e-4)
        assert layer.rest == pytest.approx(0.0, abs=1e-4)
        out = modules[f"o{n}"].weight if llama else modules[f"o{n}"].weight.T
        before = seen[f"o{n}"][0][place]
        width = before.numel() // HEADS
        for head, share in enumerate(layer.heads or ()):
            part = slice(head * width, (head + 1) * width)
            assert share == pytest.approx(float(out[:, part] @ before[part] @ direction), abs=1e-4)
        assert len(layer.heads or ()) == HEADS
        down = modules[f"down{n}"].weight if llama else modules[f"down{n}"].weight.T
        by_hand = seen[f"down{n}"][0][place] * (direction @ down)
        for neuron, share in enumerate(by_hand.tolist()):
            assert neurons[n, neuron].share == pytest.approx(share, abs=1e-4)
    shares = [abs(one.share) for one in result.neurons]
    assert shares == sorted(shares, reverse=True)
    some = read(subject.engine, token=token, against=other, position=place, neurons=5)
    assert [one.neuron for one in some.neurons or ()] == [one.neuron for one in result.neurons[:5]]


FAMILIES = {
    # parallel residuals; sandwich norms, with and without a soft cap; scaled logits; layer norms
    "neox-parallel": None,
    "gemma2": 5.0,
    "gemma3": 5.0,
    "paligemma": 5.0,
    "olmo2": None,
    "glm4": None,
    "granite": None,
    "cohere": None,
    "phi": None,
    "nemotron": None,
    "gpt-j": None,
}


@pytest.mark.parametrize("name", FAMILIES)
def test_the_parts_of_every_family_sum_to_the_logit(name: str) -> None:
    with TransformersEngine(build_family(name), tiny_tokenizer(), rows=2, slots=2) as engine:
        result = read(engine, text=None, tokens=tuple(range(3, 12)), heads=True, neurons=1000)
    cap = FAMILIES[name]
    assert result.cap == (None if cap is None else pytest.approx(cap, rel=1e-4))
    capped = result.logit if cap is None else cap * torch.tensor(result.logit / cap).tanh().item()
    assert result.token.logit == pytest.approx(capped, abs=1e-4)
    assert result.unexplained == pytest.approx(0.0, abs=1e-4)
    mlps: dict[int, float] = {}
    for one in result.neurons or ():
        mlps[one.layer] = mlps.get(one.layer, 0.0) + one.share
    for layer in result.layers:
        assert layer.rest == pytest.approx(0.0, abs=1e-4)
        assert layer.heads is not None
        biased = name in ("phi", "neox-parallel")
        if not biased:
            assert layer.head_bias == pytest.approx(0.0, abs=1e-4)
            if name != "gpt-j":
                assert mlps[layer.layer] == pytest.approx(layer.mlp, abs=1e-4)


def test_what_steering_adds_to_the_stream_is_the_rest(subject: Any) -> None:
    engine = subject.engine
    row = torch.randn(engine.info.d_model, generator=torch.Generator().manual_seed(1))
    library = MemoryLibrary({"joy": ControlVector.of({1: row}, name="joy")})
    plans = PlanCache(library, engine.info, engine.capabilities)
    spec = {"interventions": [{"kind": "add", "vector": "joy", "strength": 2.0}]}
    request = AttributionRequest.model_validate({"text": TEXT, "token": 9, "steering": spec})
    steered = attribution(engine, request, plans=plans)
    plain = read(engine, token=9)
    assert steered.fingerprint is not None
    assert steered.unexplained == pytest.approx(0.0, abs=1e-4)
    assert [abs(one.rest) > 1e-3 for one in steered.layers] == [False, True, False]
    assert steered.layers[0].mlp != pytest.approx(plain.layers[0].mlp, abs=1e-6)  # another scale
    assert steered.layers[0].mlp / plain.layers[0].mlp == pytest.approx(
        steered.embedding / plain.embedding, rel=1e-3
    )


def test_without_a_token_it_is_what_the_model_says(subject: Any) -> None:
    ids = tuple(subject.engine.tokenizer.encode(TEXT))
    assert read(subject.engine).token.id == int(subject.logits(ids)[-1].argmax())
    named = read(subject.engine, token="a")
    assert (named.token.token, named.token.id) == ("a", subject.engine.tokenizer.encode("a")[-1])


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"token": "river"}, "/token", "not_one_token"),
        ({"token": 5, "against": 10_000}, "/against", "token_out_of_range"),
        ({"token": 5, "against": 5}, "/against", "same_token"),
        ({"position": 99}, "/position", "position_out_of_range"),
        ({"position": "moon"}, "/position", "text_not_found"),
    ],
)
def test_what_cannot_be_taken_apart_is_refused(
    subject: Any, fields: dict[str, Any], param: str, code: str
) -> None:
    with pytest.raises(SteerError) as caught:
        read(subject.engine, **fields)
    assert (caught.value.param, caught.value.code) == (param, code)


@pytest.mark.parametrize(("field", "site"), [("heads", "attn_out"), ("neurons", "mlp_out")])
def test_a_part_that_is_edited_where_it_is_added_is_not_taken_apart(
    subject: Any, field: str, site: str
) -> None:
    engine = subject.engine
    vector = ControlVector.of({1: torch.ones(engine.info.d_model)}, name="up", site=site)
    plans = PlanCache(MemoryLibrary({"up": vector}), engine.info, engine.capabilities)
    edit = {"kind": "add", "vector": "up", "site": site, "layers": [1]}
    body = {"text": TEXT, "token": 9, "steering": {"interventions": [edit]}}
    asked = {field: 1 if field == "neurons" else True}
    with pytest.raises(Unsupported, match=f"the steering edits '{site}'") as caught:
        attribution(engine, AttributionRequest.model_validate({**body, **asked}), plans=plans)
    assert (caught.value.param, caught.value.code) == (f"/{field}", "unsupported_inspection")
    whole = attribution(engine, AttributionRequest.model_validate(body), plans=plans)
    assert whole.unexplained == pytest.approx(0.0, abs=1e-4)


def test_an_engine_without_projections_gives_whole_parts_alone() -> None:
    engine = FakeEngine()
    engine.capabilities = replace(engine.capabilities, projections=())
    assert len(read(engine, token=5).layers) == engine.info.n_layers
    with pytest.raises(Unsupported, match="leave 'heads' out") as caught:
        read(engine, token=5, heads=True)
    assert caught.value.param == "/heads"


class _Squared(FakeEngine):
    def unembed(self, states: Tensor) -> Tensor:
        return super().unembed(states) ** 2


def test_a_head_that_is_not_linear_is_refused() -> None:
    with pytest.raises(Unsupported, match="no linear function") as caught:
        read(_Squared())
    assert caught.value.code == "unsupported_inspection"


def test_the_picture_has_a_row_for_each_layer_and_one_for_the_embedding(subject: Any) -> None:
    result = read(subject.engine, token=5, heads=True)
    heat = attribution_heat_map(result)
    assert list(heat.rows) == ["embed", "0", "1", "2"]
    assert list(heat.columns) == ["attn", "MLP", *(f"head {n}" for n in range(HEADS))]
    assert heat.values[1][2] == (result.layers[0].heads or ())[0]
    assert heat.png().startswith(b"\x89PNG")
