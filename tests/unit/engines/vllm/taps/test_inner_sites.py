"""The sites inside attention and MLP, on a small model with the ways of vLLM's; vLLM itself is not
needed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from artefacts import shape_of
from torch import Tensor, nn

from steer.batch.ledger import PositionLedger
from steer.batch.requests import Span, SteeredRequest
from steer.batch.step import build_step
from steer.batch.tables import Tables
from steer.edits import Block
from steer.engines.proof import probe_plan
from steer.engines.vllm.options import SteerOptions
from steer.engines.vllm.static.rows import budget_rows
from steer.engines.vllm.taps.decoder import TextDecoder
from steer.engines.vllm.taps.families import FAMILIES, Family
from steer.engines.vllm.taps.forward_pass import ForwardPass
from steer.engines.vllm.taps.inner_sites import InnerSite, Shard
from steer.engines.vllm.taps.inner_trial import Absent, open_inner_sites
from steer.engines.vllm.taps.layer_streams import FusedAdd
from steer.engines.vllm.taps.ops import set_running
from steer.engines.vllm.taps.shifts import only_shifts
from steer.engines.vllm.taps.taps import SITES as STREAM
from steer.engines.vllm.taps.taps import DecoderStack, EagerTap, install, points_of, tap_of
from steer.engines.vllm.worker.edits import TapEdits
from steer.engines.vllm.worker.proof import prove
from steer.engines.vllm.worker.steering import WorkerSteering
from steer.errors import SpecError, Unsupported
from steer.laws import Law
from steer.model import INNER_SITES, HookPoint
from steer.plan.plan import Rule
from steer.plan.selection import EVERYWHERE
from steer.spec import SITES, Site

LAYERS, WIDTH, NEURONS = 3, 8, 12
PATHS: Mapping[Site, str] = {
    "attn_in": "self_attn",
    "head_out": "self_attn.o_proj",
    "mlp_in": "mlp",
    "mlp_act": "mlp.down_proj",
}
MODEL = replace(
    shape_of(WIDTH, LAYERS), d_mlp=NEURONS, n_heads=2, head_dim=WIDTH // 2, sites=tuple(SITES)
)
CPU = torch.device("cpu")


def norm(x: Tensor) -> Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + 1e-3).sqrt()


class Norm(nn.Module):
    def forward(self, x: Tensor, residual: Tensor | None = None) -> Any:
        return norm(x) if residual is None else (norm(x + residual), x + residual)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv_proj, self.o_proj = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, positions: Tensor | None, hidden_states: Tensor) -> Tensor:
        made: Tensor = self.o_proj(self.qkv_proj(hidden_states).tanh())
        return made


class Mlp(nn.Module):
    def __init__(self, neurons: int = NEURONS) -> None:
        super().__init__()
        self.up_proj, self.down_proj = nn.Linear(WIDTH, neurons), nn.Linear(neurons, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.down_proj(self.up_proj(x).relu())
        return made


class Twice(Mlp):
    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.up_proj(x)) + self.down_proj(self.up_proj(x).relu())


class Quantised(Mlp):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.read(x)

    def read(self, x: Tensor) -> Tensor:
        self.int_proj(x.to(torch.int8))
        return torch.zeros_like(x)

    def __init__(self) -> None:
        super().__init__()
        self.int_proj = nn.Identity()


class Layer(nn.Module):
    """Llama's, in vLLM."""

    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.self_attn, self.mlp = Attention(), mlp
        self.input_layernorm, self.post_attention_layernorm = Norm(), Norm()

    def forward(self, positions: Any, hidden_states: Tensor, residual: Tensor | None) -> Any:
        if residual is None:
            residual, x = hidden_states, self.input_layernorm(hidden_states)
        else:
            x, residual = self.input_layernorm(hidden_states, residual)
        x = self.self_attn(positions=positions, hidden_states=x)
        x, residual = self.post_attention_layernorm(x, residual)
        return self.mlp(x), residual


class Model(nn.Module):
    def __init__(self, *mlps: Callable[[], nn.Module]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(
            Layer(mlps[n % len(mlps)]() if mlps else Mlp()) for n in range(LAYERS)
        )
        for weight in self.parameters():
            nn.init.normal_(weight, std=0.5)
        self.embedded = torch.randn(WIDTH)

    @torch.inference_mode()
    def run(self, tokens: int, *, graphless: bool = False) -> Tensor:
        hidden, residual = self.embedded.repeat(tokens, 1), None
        for layer in self.layers:
            hidden, residual = layer(None, hidden, residual)
        assert residual is not None
        return norm(hidden + residual)


FAMILY = Family("here.Model", "here.Layer", FusedAdd("post_attention_layernorm"), PATHS)


def decoder(model: Model, family: Family | None = FAMILY) -> TextDecoder:
    return TextDecoder(model, model, list(enumerate(model.layers)), LAYERS, family)


def opened(
    model: Model, asked: tuple[Site, ...] | None, family: Family | None = FAMILY
) -> tuple[tuple[InnerSite, ...], Absent]:
    return open_inner_sites(decoder(model, family), model.run, asked, width=WIDTH, largest=64)


# Where they are


def test_every_hook_point_has_a_tap_that_serves_it() -> None:
    points = [HookPoint(layer, site) for layer in range(LAYERS) for site in SITES]
    assert all(point in points_of(tap_of(point), LAYERS) for point in points)
    inner = [tap_of(point) for point in points if point.site in INNER_SITES]
    assert len(set(inner)) == len(inner)
    assert max(inner) < 0


def test_whatever_is_inside_leads_to_a_part_of_its_family() -> None:
    """The input of a part, and that of a module in the same part."""
    for family in FAMILIES:
        inside = family.inside
        for outer, projection in (("attn_in", "head_out"), ("mlp_in", "mlp_act")):
            if outer in inside and projection in inside and "." in inside[projection]:
                assert inside[projection].startswith(f"{inside[outer]}."), family


# Which of them are served


def test_nothing_is_tapped_and_no_pass_is_run_where_nobody_asks() -> None:
    def never(tokens: int) -> Tensor:
        raise AssertionError("a pass was run")

    found, absent = open_inner_sites(decoder(Model()), never, (), width=WIDTH, largest=64)
    assert found == ()
    for site in INNER_SITES:
        assert f'{{"steer": {{"sites": ["{site}"]}}}}' in absent[site]
    model = replace(MODEL, sites=STREAM, absent=tuple(absent.items()))
    with pytest.raises(Unsupported, match=r'"sites": \["mlp_act"\].* use one of resid_pre') as told:
        model.check_point(HookPoint(0, "mlp_act"), param="/layers")
    assert told.value.code == "unsupported_site"


def test_modules_whose_inputs_nobody_taps_are_as_they_were() -> None:
    model = tapped(Model(), {})
    for layer in model.layers:
        for path in PATHS.values():
            assert "forward" not in vars(layer.get_submodule(path))


def test_all_sites_are_found_with_their_widths() -> None:
    found, absent = opened(Model(), None)
    assert {one.site: one.width for one in found} == {
        site: MODEL.width(site) for site in INNER_SITES
    }
    assert {one.workers for one in found} == {1}
    assert absent == {}


def test_only_what_is_asked_for_is_tapped() -> None:
    found, absent = opened(Model(), ("mlp_act", "attn_in"))
    assert [one.site for one in found] == ["attn_in", "mlp_act"]
    assert absent.keys() == {"head_out", "mlp_in"}


UNSERVED: dict[str, tuple[tuple[Callable[[], nn.Module], ...], Family | None, str]] = {
    "a layer without": ((Mlp, nn.Identity), FAMILY, "layer 1 has no module 'mlp.down_proj'"),
    "another width": (
        (Mlp, lambda: Mlp(20)),
        FAMILY,
        r"not one width in all layers but \[12, 20\]",
    ),
    "twice": ((Twice,), FAMILY, "'mlp.down_proj' of layer 0 runs 2 times"),
    "quantised": (
        (Quantised,),
        replace(FAMILY, inside={**PATHS, "mlp_act": "mlp.int_proj"}),
        "quantised before 'mlp.int_proj' of layer 0",
    ),
    "a family without": (
        (Mlp,),
        replace(FAMILY, inside={site: PATHS[site] for site in PATHS if site != "mlp_act"}),
        "is not in layers of",
    ),
    "nobody read": ((Mlp,), None, "nobody has read"),
}


@pytest.mark.parametrize("name", UNSERVED)
def test_a_site_that_a_model_does_not_have_is_refused_with_the_reason(name: str) -> None:
    mlps, family, reason = UNSERVED[name]
    found, absent = opened(Model(*mlps), None, family)
    assert "mlp_act" not in {one.site for one in found}
    with pytest.raises(Unsupported, match=reason) as refused:
        opened(Model(*mlps), ("mlp_act",), family)
    assert refused.value.code == "unsupported_site"
    assert absent["mlp_act"] in refused.value.message


def test_an_input_that_is_not_as_wide_as_the_stream_is_no_input_of_a_part() -> None:
    wrong = replace(FAMILY, inside={**PATHS, "mlp_in": "mlp.down_proj"})
    assert "width of the stream" in opened(Model(), None, wrong)[1]["mlp_in"]


@pytest.mark.parametrize("sites", ["all", ("attn_in", "mlp_act"), ()])
def test_options_name_sites(sites: Any) -> None:
    assert SteerOptions.of({"steer": {"sites": sites}}).sites == sites


@pytest.mark.parametrize("sites", ["attn_in", ("attn_out",), ("nowhere",), 3])
def test_options_with_other_sites_are_refused(sites: Any) -> None:
    with pytest.raises(SpecError, match="sites"):
        SteerOptions.of({"steer": {"sites": sites}})


# What an edit there is


class Adds:
    """A visitor that adds to what it sees at one tap."""

    def __init__(self, point: HookPoint, shift: Tensor) -> None:
        self.taps, self.shift = frozenset({tap_of(point)}), shift

    def visit(self, tap: int, hidden: Tensor, residual: Tensor | None) -> None:
        assert residual is None
        hidden.add_(self.shift)


def tapped(model: Model, paths: Mapping[Site, str] = PATHS) -> Model:
    inner = tuple(InnerSite(site, path, MODEL.width(site)) for site, path in paths.items())
    install(DecoderStack(list(enumerate(model.layers)), FAMILY.layout, LAYERS, inner), EagerTap)
    return model


@pytest.mark.parametrize("site", INNER_SITES)
@pytest.mark.parametrize("layer", range(LAYERS))
def test_an_edit_is_one_of_what_the_module_reads(layer: int, site: Site) -> None:
    """The same model with the shift written into its own code is the oracle."""
    shift = torch.linspace(-1, 1, MODEL.width(site))
    model = Model()
    module = model.layers[layer].get_submodule(PATHS[site])

    def shifted(_: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> Any:
        if "hidden_states" in named:
            return args, {**named, "hidden_states": named["hidden_states"] + shift}
        return (args[0] + shift, *args[1:]), named

    handle = module.register_forward_pre_hook(shifted, with_kwargs=True)
    wanted = model.run(4)
    handle.remove()
    plain = model.run(4)
    set_running(Adds(HookPoint(layer, site), shift))
    try:
        found = tapped(model).run(4)
    finally:
        set_running(None)
    assert torch.allclose(found, wanted, atol=1e-6)
    assert not torch.allclose(found, plain, atol=1e-2)
    assert torch.equal(model.run(4), plain)


def steering_of(paths: Mapping[Site, str] = PATHS) -> tuple[WorkerSteering, Model]:
    edits = TapEdits(MODEL, 4, CPU)
    return WorkerSteering(MODEL, {}.__getitem__, edits, max_requests=4), tapped(Model(), paths)


def test_the_proof_finds_every_site_where_it_is() -> None:
    steering, model = steering_of()
    prove(steering, model.run, 64, experts=False)


@pytest.mark.parametrize("site", ["head_out", "mlp_act"])
def test_the_proof_passes_a_part_that_adds_the_same_whatever_it_reads(site: Site) -> None:
    steering, model = steering_of()
    nn.init.zeros_(model.layers[1].get_submodule(PATHS[site]).weight)
    prove(steering, model.run, 64, experts=False)


@pytest.mark.parametrize(
    ("site", "path", "moved"),
    [
        ("attn_in", "mlp", "0.resid_mid"),
        ("attn_in", "input_layernorm", "0.resid_mid"),
        ("mlp_in", "self_attn.qkv_proj", "0.attn_out"),
        ("head_out", "mlp", "0.resid_mid"),
        ("mlp_in", "post_attention_layernorm", "0.resid_post"),
    ],
)
def test_the_proof_refuses_a_site_that_is_something_else(site: Site, path: str, moved: str) -> None:
    steering, model = steering_of({**PATHS, site: path})
    with pytest.raises(Unsupported, match=moved) as refused:
        prove(steering, model.run, 64, experts=False)
    assert refused.value.code == "steering_does_not_act"


def test_constants_inside_a_part_are_no_constants_of_the_graph() -> None:
    inside, outside = (
        probe_plan(MODEL, HookPoint(1, site), constant=True) for site in ("mlp_act", "mlp_out")
    )
    assert only_shifts(outside)
    assert not only_shifts(inside)
    assert budget_rows(inside) == 1


# Rows that lie on several workers


@pytest.mark.parametrize("kind", ["reads", "adds", "keeps the norm"])
def test_every_worker_edits_whole_rows_and_keeps_its_own_part(kind: str) -> None:
    """An ablation on each of two halves would be two ablations."""
    point = HookPoint(1, "mlp_act")
    direction = torch.nn.functional.normalize(torch.randn(NEURONS), dim=0)
    block = {
        "reads": Block.of_edits(direction[None], direction[None], [Law(slope=-1.0)]),
        "adds": Block(shift=3 * direction),
        "keeps the norm": Block(shift=3 * direction, preserve_norm=True),
    }[kind]
    plan = replace(probe_plan(MODEL, point), rules=(Rule(EVERYWHERE, None, {point: block}),))
    tokens, steered = 5, slice(1, 4)
    x = torch.randn(tokens, NEURONS)
    parts = x.clone().chunk(2, dim=-1)

    def visited(part: Tensor, shards: Mapping[Site, Shard]) -> Tensor:
        tables = Tables(MODEL, slots=2)
        ledger = PositionLedger(2, 16, CPU)
        request = SteeredRequest(0, 3, plan, tables.acquire(plan))
        span = Span(request, steered.start, np.arange(3), np.zeros(3, dtype=np.int64))
        step = build_step(tables, ledger, [span], tokens)
        ForwardPass(step, tokens, LAYERS, shards=shards).visit(tap_of(point), part, None)
        return part

    whole = visited(x.clone(), {})
    found = [
        visited(part.clone(), {"mlp_act": Shard(lambda _: torch.cat(parts, dim=-1), rank, 2)})
        for rank, part in enumerate(parts)
    ]
    assert torch.equal(torch.cat(found, dim=-1), whole)
    assert torch.equal(whole[[0, 4]], x[[0, 4]])
    assert not torch.allclose(whole[steered], x[steered], atol=1e-2)
