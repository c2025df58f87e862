"""Every hook point of every architecture, against hooks placed by hand on its own modules."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from artefacts import random_vector
from tiny_models import ARCHITECTURES, LAYERS, VOCABULARY, WIDTH
from torch import Tensor, nn

from steer.artefacts.library import MemoryLibrary
from steer.engines.base import CaptureRequest
from steer.engines.transformers.engine import TransformersEngine
from steer.model import HookPoint
from steer.plan.cache import PlanCache
from steer.spec import Site, parse_spec

TinyModel = Callable[[str], nn.Module]
Change = Callable[[Tensor], Tensor]

_NORMS = {"attn_in": "input_layernorm", "mlp_in": "post_attention_layernorm"}
_LLAMA = {
    **_NORMS,
    "blocks": "model.layers",
    "attn_out": "self_attn",
    "mlp_out": "mlp",
    "head_out": "self_attn.o_proj",
    "mlp_act": "mlp.down_proj",
}
_NEOX = {
    **_NORMS,
    "blocks": "gpt_neox.layers",
    "attn_out": "attention",
    "mlp_out": "mlp",
    "head_out": "attention.dense",
    "mlp_act": "mlp.dense_4h_to_h",
}
MODULES: dict[str, dict[str, str]] = {
    "llama": _LLAMA,
    "qwen3": _LLAMA,
    "mixtral": {name: path for name, path in _LLAMA.items() if name != "mlp_act"},
    "gemma3": {
        **_LLAMA,
        "mlp_in": "pre_feedforward_layernorm",
        "attn_out": "post_attention_layernorm",
        "mlp_out": "post_feedforward_layernorm",
    },
    "gpt2": {
        "blocks": "transformer.h",
        "attn_in": "ln_1",
        "mlp_in": "ln_2",
        "attn_out": "attn",
        "mlp_out": "mlp",
        "head_out": "attn.c_proj",
        "mlp_act": "mlp.c_proj",
    },
    "neox-parallel": _NEOX,
    "neox-sequential": _NEOX,
}


def sites_of(name: str) -> set[str]:
    """What the architecture has: no state between the halves of a parallel block."""
    middle = set() if name == "neox-parallel" else {"resid_mid"}
    return {"resid_pre", "resid_post", *middle, *MODULES[name]} - {"blocks"}


CASES = [(name, site) for name in ARCHITECTURES for site in sorted(sites_of(name))]


def _first(value: Any) -> Tensor:
    return value if isinstance(value, Tensor) else value[0]


def _with_first(value: Any, first: Tensor) -> Any:
    return first if isinstance(value, Tensor) else (first, *value[1:])


def by_hand(
    model: nn.Module, name: str, layer: int, site: str, change: Change, ids: Tensor
) -> Tensor:
    """The logits after `change` at one site, with plain hooks on named modules."""
    block = model.get_submodule(f"{MODULES[name]['blocks']}.{layer}")
    stream: dict[str, Tensor] = {}

    def remember(module: nn.Module, args: Any, kwargs: Any) -> None:
        stream["pre"] = (args[0] if args else kwargs["hidden_states"]).clone()

    def change_input(module: nn.Module, args: Any, kwargs: Any) -> Any:
        if args:
            return (change(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": change(kwargs["hidden_states"])}

    def change_output(module: nn.Module, args: Any, output: Any) -> Any:
        return _with_first(output, change(_first(output)))

    def change_sum(module: nn.Module, args: Any, output: Any) -> Any:
        # What attention adds is altered by as much as the stream after it is to change.
        middle = stream["pre"] + _first(output)
        return _with_first(output, _first(output) + change(middle) - middle)

    with ExitStack() as hooks, torch.inference_mode():

        def on_input(module: nn.Module, hook: Any) -> None:
            handle = module.register_forward_pre_hook(hook, with_kwargs=True)
            hooks.callback(handle.remove)

        def on_output(module: nn.Module, hook: Any) -> None:
            hooks.callback(module.register_forward_hook(hook).remove)

        if site == "resid_pre":
            on_input(block, change_input)
        elif site == "resid_post":
            on_output(block, change_output)
        elif site == "resid_mid":
            on_input(block, remember)
            on_output(block.get_submodule(MODULES[name]["attn_out"]), change_sum)
        elif site in ("head_out", "mlp_act"):
            on_input(block.get_submodule(MODULES[name][site]), change_input)
        else:
            on_output(block.get_submodule(MODULES[name][site]), change_output)
        logits: Tensor = model(input_ids=ids, use_cache=False).logits.float()
        return logits


def test_the_map_has_every_site_there_is(tiny_model: TinyModel) -> None:
    for name in ARCHITECTURES:
        assert set(TransformersEngine(tiny_model(name), None).info.sites) == sites_of(name), name


@pytest.mark.parametrize(("name", "site"), CASES)
def test_an_edit_equals_hooks_placed_by_hand(tiny_model: TinyModel, name: str, site: Site) -> None:
    model = tiny_model(name)
    ids = torch.randint(3, VOCABULARY, (1, 9), generator=torch.Generator().manual_seed(1))
    with TransformersEngine(model, None, rows=2, slots=2) as engine:
        width = engine.info.width(site)
        shift, gone = (random_vector(n, 0, width=width, site=site) for n in (1, 2))
        unit = gone[0] / gone[0].norm()

        def change(x: Tensor) -> Tensor:
            return x + shift[0] - 0.7 * ((x + shift[0]) @ unit)[..., None] * unit

        plans = PlanCache(
            MemoryLibrary({"shift": shift, "gone": gone}), engine.info, engine.capabilities
        )
        for layer in range(LAYERS):
            spec = {
                "interventions": [
                    {"kind": "add", "vector": "shift", "layers": [layer]},
                    {"kind": "ablate", "vector": "gone", "strength": 0.7, "layers": [layer]},
                ]
            }
            steered = plans.plan(parse_spec(spec))
            (captured,) = engine.capture(
                CaptureRequest(ids.tolist(), plans=[steered], logits="all")
            )
            wanted = by_hand(model, name, layer, site, change, ids)[0]
            plain = model(input_ids=ids, use_cache=False).logits[0].float()
            assert captured.logits is not None
            assert torch.allclose(captured.logits, wanted, atol=1e-4, rtol=1e-4)
            assert not torch.allclose(captured.logits, plain, atol=1e-2)


@pytest.mark.parametrize("name", [n for n in ARCHITECTURES if "resid_mid" in sites_of(n)])
def test_an_edit_between_the_halves_stays_in_the_stream(tiny_model: TinyModel, name: str) -> None:
    """The output is the edited middle plus what the MLP made of it."""
    vector = random_vector(3, 1, width=WIDTH, site="resid_mid")
    with TransformersEngine(tiny_model(name), None, rows=2, slots=2) as engine:
        plans = PlanCache(MemoryLibrary({"v": vector}), engine.info, engine.capabilities)
        steered = plans.plan(parse_spec({"interventions": [{"kind": "add", "vector": "v"}]}))
        points = tuple(HookPoint(1, site) for site in ("resid_mid", "mlp_out", "resid_post"))
        prompt = tuple(range(3, 12))
        edited, plain = engine.capture(
            CaptureRequest([prompt, prompt], points, plans=[steered, None])
        )
    middle, added, output = (edited.states[point] for point in points)
    assert torch.allclose(output, middle + added, atol=1e-5)
    assert torch.allclose(middle, plain.states[points[0]] + vector[1], atol=1e-5)
    assert not torch.allclose(added, plain.states[points[1]], atol=1e-3)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_last_state_unembeds_to_the_logits(tiny_model: TinyModel, name: str) -> None:
    with TransformersEngine(tiny_model(name), None, rows=2, slots=2) as engine:
        last = HookPoint(LAYERS - 1)
        (captured,) = engine.capture(CaptureRequest([tuple(range(3, 12))], (last,), logits="all"))
        unembedded = engine.unembed(captured.states[last])
    assert captured.logits is not None
    assert torch.allclose(unembedded, captured.logits, atol=1e-5, rtol=1e-5)
