"""States after the last block are read as the model itself reads them, or not at all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny_families import FAMILIES, build_family
from tiny_models import LAYERS, VOCABULARY, WIDTH, tiny_tokenizer
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from steer.engines.base import CaptureRequest
from steer.engines.transformers.engine import TransformersEngine
from steer.engines.transformers.hooks import HookedModel
from steer.engines.transformers.structure.blocks import find_hook_points
from steer.errors import Unsupported
from steer.inspection import offered
from steer.inspection.logit_lens import LogitLensRequest, logit_lens
from steer.model import HookPoint

PROMPT = tuple(range(3, 12))
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


def states_of(*shape: int) -> Tensor:
    return torch.randn(*shape, WIDTH, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", FAMILIES)
def test_the_last_state_gives_the_models_own_logits(name: str, dtype: torch.dtype) -> None:
    model = build_family(name, dtype)
    hooked = HookedModel(model, find_hook_points(model, name))
    last = HookPoint(hooked.info.n_layers - 1)
    with torch.inference_mode():
        outputs, states = hooked.forward(
            None, [last], input_ids=torch.tensor([PROMPT]), use_cache=False
        )
    unembedded = hooked.unembed(states[last])
    assert unembedded.dtype == torch.float32
    scale = float(outputs.logits.float().abs().max())
    worst = float((unembedded - outputs.logits.float()).abs().max())
    assert worst <= TOLERANCE[dtype] * scale


BY_HAND: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "granite": lambda m, x: m.lm_head(m.model.norm(x)) / 8,
    "cohere": lambda m, x: m.lm_head(m.model.norm(x)) * 0.0625,
    "gemma2": lambda m, x: 5 * torch.tanh(m.lm_head(m.model.norm(x)) / 5),
    # Its configuration names a soft cap too, but this class does not apply it.
    "gemma3-images": lambda m, x: m.lm_head(m.model.language_model.norm(x)),
    "opt-post-norm": lambda m, x: m.lm_head(m.model.decoder.project_out(x)),
    "gpt1": lambda m, x: m.lm_head(x),
    "gpt-j": lambda m, x: m.lm_head(m.transformer.ln_f(x)),
    "bert": lambda m, x: m.cls(x),
    "falcon-h1": lambda m, x: m.lm_head(m.model.final_layernorm(x)) * 0.3,
}


@pytest.mark.parametrize("name", BY_HAND)
def test_any_state_is_read_by_what_follows_the_last_block(name: str) -> None:
    model = build_family(name)
    states = states_of(2, 3)
    hooked = HookedModel(model, find_hook_points(model, name))
    with torch.no_grad():
        wanted = BY_HAND[name](model, states)
    assert torch.allclose(hooked.unembed(states), wanted, atol=1e-5, rtol=1e-5)


def test_reading_leaves_the_model_as_it_was() -> None:
    model = build_family("granite").train()
    model.get_submodule("model.layers.1").eval()
    before = {name: (module.training, *vars(module)) for name, module in model.named_modules()}
    find_hook_points(model, "granite").head(model, states_of(2))
    after = {name: (module.training, *vars(module)) for name, module in model.named_modules()}
    assert after == before


class _LooksBack(LlamaForCausalLM):  # type: ignore[no-untyped-call]
    """Its logits depend on the prompt by another way than through the last block."""

    def forward(self, input_ids: Tensor, **kwargs: Any) -> Any:
        outputs = super().forward(input_ids=input_ids, **kwargs)
        seen = self.get_input_embeddings()(input_ids)
        outputs.logits = outputs.logits + self.lm_head(seen)
        return outputs


class _Fails(LlamaForCausalLM):  # type: ignore[no-untyped-call]
    """What follows its blocks runs with the whole prompt only."""

    def forward(self, input_ids: Tensor, **kwargs: Any) -> Any:
        if input_ids.shape[1] == 1 and input_ids.shape[0] > 1:
            raise IndexError("one token is no prompt")
        return super().forward(input_ids=input_ids, **kwargs)


@pytest.mark.parametrize(
    ("kind", "reason"), [(_LooksBack, "depend on more"), (_Fails, "one token is no prompt")]
)
def test_a_head_that_cannot_be_replayed_is_refused_by_name(
    kind: type[LlamaForCausalLM], reason: str
) -> None:
    model: nn.Module = kind(build_family("llama").config)  # type: ignore[arg-type]
    with TransformersEngine(model, tiny_tokenizer(), rows=2, slots=4) as engine:
        assert "logit_lens" not in offered(engine.capabilities)
        assert "activations" in offered(engine.capabilities)
        assert engine.capture(CaptureRequest([PROMPT], (HookPoint(LAYERS - 1),)))
        with pytest.raises(Unsupported, match=reason) as refused:
            engine.unembed(states_of(1))
        assert refused.value.code == "no_unembedding"
        with pytest.raises(Unsupported, match=reason) as refused:
            logit_lens(engine, LogitLensRequest(text="w3 w4"))
        assert refused.value.code == "unsupported_inspection"


def test_a_readable_head_offers_the_lens() -> None:
    model = build_family("granite")
    with TransformersEngine(model, tiny_tokenizer(), rows=2, slots=4) as engine:
        result = logit_lens(engine, LogitLensRequest(text="w3 w4 w5", layers=[LAYERS - 1], top=1))
    with torch.no_grad():
        said = model(input_ids=torch.tensor([[3, 4, 5]])).logits[0].softmax(-1).max(-1)
    for cell, chance, token in zip(result.cells, *said, strict=True):
        assert cell.top[0].id == int(token) < VOCABULARY
        assert cell.top[0].probability == pytest.approx(float(chance), rel=1e-4)
