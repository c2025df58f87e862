"""Every site lies on its own module, whatever the size of the stream, the dtype and the weights."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tiny_families import build_family
from torch import nn

from steer.engines.transformers.hooks import HookedModel
from steer.engines.transformers.proof import prove_steering
from steer.engines.transformers.structure.blocks import find_hook_points
from steer.engines.transformers.structure.sites import HookTarget
from steer.errors import Unsupported
from steer.model import HookPoint
from steer.spec import Site

_NORMS = {"attn_in": "input_layernorm", "mlp_in": "post_attention_layernorm"}
_LLAMA = {
    **_NORMS,
    "attn_out": "self_attn",
    "resid_mid": "post_attention_layernorm",
    "mlp_out": "mlp",
    "head_out": "self_attn.o_proj",
    "mlp_act": "mlp.down_proj",
}
_SANDWICH = {
    **_LLAMA,
    "mlp_in": "pre_feedforward_layernorm",
    "attn_out": "post_attention_layernorm",
    "resid_mid": "pre_feedforward_layernorm",
    "mlp_out": "post_feedforward_layernorm",
}
_NEOX = {
    **_NORMS,
    "attn_out": "attention",
    "resid_mid": "post_attention_layernorm",
    "mlp_out": "mlp",
    "head_out": "attention.dense",
    "mlp_act": "mlp.dense_4h_to_h",
}
_BART = {
    "attn_in": "self_attn_layer_norm",
    "mlp_in": "final_layer_norm",
    "attn_out": "self_attn",
    "resid_mid": "final_layer_norm",
    "mlp_out": "fc2",
    "head_out": "self_attn.out_proj",
    "mlp_act": "fc2",
}


def _without(modules: dict[str, str], *sites: str) -> dict[str, str]:
    return {site: path for site, path in modules.items() if site not in sites}


MODULES: dict[str, tuple[str, dict[str, str]]] = {
    "llama": ("model.layers", _LLAMA),
    "granite": ("model.layers", _LLAMA),
    "mixtral": ("model.layers", _without(_LLAMA, "mlp_act")),
    # One norm for both parts: what it gives is neither's alone.
    "cohere": ("model.layers", _without(_LLAMA, "resid_mid", *_NORMS)),
    "phi": (
        "model.layers",
        _without(_LLAMA, "resid_mid", *_NORMS)
        | {"head_out": "self_attn.dense", "mlp_act": "mlp.fc2"},
    ),
    "gemma2": ("model.layers", _SANDWICH),
    "gemma3-images": ("model.language_model.layers", _SANDWICH),
    # Its heads are wider where they see everything.
    "gemma4": ("model.layers", _without(_SANDWICH, "head_out")),
    # Its parts read the stream as it is.
    "olmo2": ("model.layers", {**_without(_SANDWICH, *_NORMS), "resid_mid": "mlp"}),
    "glm4": (
        "model.layers",
        {**_LLAMA, "attn_out": "post_self_attn_layernorm", "mlp_out": "post_mlp_layernorm"},
    ),
    "neox": ("gpt_neox.layers", _NEOX),
    "neox-parallel": ("gpt_neox.layers", _without(_NEOX, "resid_mid")),
    "falcon": (
        "transformer.h",
        _without(_NEOX, "resid_mid")
        | {"attn_in": "ln_attn", "mlp_in": "ln_mlp", "attn_out": "self_attention"}
        | {"head_out": "self_attention.dense"},
    ),
    "gpt2": (
        "transformer.h",
        {
            "attn_in": "ln_1",
            "attn_out": "attn",
            "resid_mid": "ln_2",
            "mlp_in": "ln_2",
            "mlp_out": "mlp",
            "head_out": "attn.c_proj",
            "mlp_act": "mlp.c_proj",
        },
    ),
    "xglm": ("model.layers", _BART),
    "biogpt": ("biogpt.layers", _BART),
    # Nothing but the ends: normed after each sum, or two mixers side by side.
    "gpt1": ("transformer.h", {}),
    "bert": ("bert.encoder.layer", {}),
    "falcon-h1": ("model.layers", {}),
}

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def enlarge(model: nn.Module, times: float) -> nn.Module:
    """Embeddings that are larger, beside matrices of the usual small size."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(0.1)
        model.get_input_embeddings().weight.mul_(10 * times)  # type: ignore[operator]
    return model


def silence(model: nn.Module, name: str, *endings: str) -> nn.Module:
    """The middle block adds nothing: weights of zero in its last matrices, or in all of it."""
    block = model.get_submodule(f"{MODULES[name][0]}.1")
    with torch.no_grad():
        for path, parameter in block.named_parameters():
            if not endings or path.rsplit(".", 1)[0].endswith(endings):
                parameter.zero_()
    return model


def assert_sites(model: nn.Module, name: str) -> None:
    blocks, modules = MODULES[name]
    found = find_hook_points(model, name)
    assert set(found.info.sites) == {"resid_pre", "resid_post", *modules}
    for point, target in found.targets.items():
        path = f"{blocks}.{point.layer}"
        if point.site in modules:
            path += f".{modules[point.site]}"
        assert target.module is model.get_submodule(path), point


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", MODULES)
def test_each_site_is_its_own_module(name: str, dtype: torch.dtype) -> None:
    assert_sites(build_family(name, dtype), name)


@pytest.mark.parametrize("times", [60, 300, 3000])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["llama", "gemma2", "neox", "neox-parallel", "xglm"])
def test_a_large_stream_hides_no_module(name: str, dtype: torch.dtype, times: float) -> None:
    assert_sites(enlarge(build_family(name, dtype), times), name)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("endings", [("o_proj", "down_proj"), ("down_proj",), ()])
@pytest.mark.parametrize("name", ["llama", "gemma2", "olmo2", "mixtral"])
def test_a_block_that_adds_nothing_has_its_sites(
    name: str, dtype: torch.dtype, endings: tuple[str, ...]
) -> None:
    assert_sites(silence(build_family(name, dtype), name, *endings), name)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["llama", "gemma2", "neox-parallel", "mixtral"])
def test_the_proof_passes_large_streams_and_silent_blocks(name: str, dtype: torch.dtype) -> None:
    for model in (
        enlarge(build_family(name, dtype), 300),
        silence(build_family(name, dtype), name),
    ):
        prove_steering(HookedModel(model, find_hook_points(model, name)))


@pytest.mark.parametrize("times", [1, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("site", "path", "side"),
    [
        ("mlp_out", "input_layernorm", "output"),
        ("mlp_out", "self_attn", "output"),
        ("attn_out", "mlp", "output"),
        ("attn_out", "post_attention_layernorm", "output"),
        ("resid_mid", "mlp", "input"),
        ("resid_mid", "input_layernorm", "input"),
    ],
)
def test_the_proof_refuses_a_site_on_another_module(
    site: Site, path: str, side: str, dtype: torch.dtype, times: float
) -> None:
    model = enlarge(build_family("llama", dtype), times)
    found = find_hook_points(model, "llama")
    module = model.get_submodule(f"model.layers.1.{path}")
    wrong = HookTarget(module, side, in_place=site == "resid_mid")  # type: ignore[arg-type]
    found = replace(found, targets={**found.targets, HookPoint(1, site): wrong})
    with pytest.raises(Unsupported, match="does not move at 1") as refused:
        prove_steering(HookedModel(model, found))
    assert refused.value.code == "steering_does_not_act"


def test_a_module_that_several_blocks_share_has_no_site() -> None:
    model = build_family("llama")
    shared = model.get_submodule("model.layers.0.mlp")
    model.get_submodule("model.layers.2").mlp = shared
    sites = find_hook_points(model, "shared").info.sites
    assert set(sites) == {"resid_pre", "resid_post"}
