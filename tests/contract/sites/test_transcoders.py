"""Clamps of transcoders on the engine, against the whole transcoder in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from artefacts import MODES, random_transcoder
from float64_reference import Float64Reference
from tiny_models import ARCHITECTURES, WIDTH

from steer.artefacts.library import MemoryLibrary
from steer.engines.base import CaptureRequest, GenerationRequest, SamplingParams
from steer.engines.transformers.attach import attach
from steer.engines.transformers.engine import TransformersEngine
from steer.model import HookPoint
from steer.plan.cache import PlanCache
from steer.spec import parse_spec

READ, WRITTEN = HookPoint(1, "mlp_in"), HookPoint(1, "mlp_out")
SAES = {
    name: random_transcoder(name, seed=n, width=WIDTH)
    for n, name in enumerate(("jumprelu", "topk", "abstopk", "groupmax"))
}
PROMPTS = [(5, 9, 30, 31), tuple(range(40, 61)), (7,)]


def clamp(sae: str, mode: str) -> dict[str, Any]:
    item = {"kind": "clamp", "sae": sae, "features": [3, 60, 17, 8, 21], **MODES[mode]}
    return {"interventions": [item]}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_what_is_written_is_the_difference_of_two_transcoders(
    name: str, tiny_model: Callable[[str], torch.nn.Module]
) -> None:
    with TransformersEngine(tiny_model(name), None, rows=4, slots=3, chunk=8) as engine:
        if not {READ.site, WRITTEN.site} <= set(engine.info.sites):
            pytest.skip(f"{name} shows no {READ.site}")
        plans = PlanCache(MemoryLibrary(saes=SAES), engine.info, engine.capabilities)
        for sae, mode in zip(SAES, ("set", "at_least", "scale", "set where active"), strict=True):
            spec = parse_spec(clamp(sae, mode))
            asked = CaptureRequest(PROMPTS, (READ, WRITTEN), plans=[plans.plan(spec)] * 3)
            plain = engine.capture(CaptureRequest(PROMPTS, (READ, WRITTEN)))
            for one, other in zip(engine.capture(asked), plain, strict=True):
                x, y = (other.states[p].double().numpy() for p in (READ, WRITTEN))
                (item,), reference = spec.interventions, Float64Reference(saes=SAES)
                wanted = [reference.clamped(item, b, a) for a, b in zip(x, y, strict=True)]
                np.testing.assert_allclose(
                    one.states[WRITTEN].double().numpy(), np.stack(wanted), rtol=1e-4, atol=1e-5
                )


def test_an_attached_model_clamps_as_the_engine_does(
    tiny_model: Callable[[str], torch.nn.Module],
) -> None:
    model, spec = tiny_model("llama"), clamp("topk", "set")
    with TransformersEngine(model, None, rows=4, slots=3, chunk=64) as engine:
        plan = PlanCache(MemoryLibrary(saes=SAES), engine.info, engine.capabilities).plan(
            parse_spec(spec)
        )
        greedy = SamplingParams(max_tokens=6, temperature=0, ignore_eos=True)
        steered, plain = (
            engine.complete([GenerationRequest("r", PROMPTS[1], greedy, chosen)])[0]
            for chosen in (plan, None)
        )
    ids = torch.tensor([PROMPTS[1]])
    with attach(model, spec, saes=SAES):
        found = model.generate(ids, max_new_tokens=6, min_new_tokens=6, do_sample=False)
    assert tuple(found[0, ids.shape[1] :].tolist()) == steered.tokens != plain.tokens
    assert steered.receipt is not None
    assert [one.point for one in steered.receipt.hook_points] == [WRITTEN]
