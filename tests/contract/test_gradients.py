"""Differentiating on every architecture: the same numbers as serving, and true derivatives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny_models import ARCHITECTURES, tiny_tokenizer
from torch import Tensor, nn

from steer.engines.base import CaptureRequest
from steer.engines.transformers.engine import TransformersEngine
from steer.model import HookPoint

PROMPTS = [[5, 6, 7, 8, 9, 10], [11, 12, 13]]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_it_computes_what_the_engine_computes(
    tiny_model: Callable[[str], nn.Module], name: str
) -> None:
    with TransformersEngine(tiny_model(name), tiny_tokenizer(), rows=4, slots=8) as engine:
        for site in engine.info.sites:
            point, later = HookPoint(1, site), HookPoint(2)
            shift = torch.linspace(-1, 1, engine.info.width(site))

            def work(
                model: Any, point: HookPoint = point, later: HookPoint = later, s: Tensor = shift
            ) -> tuple[list[Tensor], Tensor, Tensor]:
                leaf = s.clone().requires_grad_(True)
                traced = model.run(PROMPTS, edits={point: lambda x: x + leaf}, capture=[later])
                (slope,) = torch.autograd.grad(traced.states[later][0, -1].pow(2).sum(), leaf)
                with torch.no_grad():
                    plain = model.run(PROMPTS, edits={}, capture=[point, later])
                return [plain.states[point], plain.states[later]], plain.logits, slope

            (here, there), logits, slope = engine.differentiate(work)
            captured = engine.capture(CaptureRequest(PROMPTS, (point, later), logits="all"))
            for row, one in enumerate(captured):
                length = len(PROMPTS[row])
                assert one.logits is not None
                for mine, theirs in (
                    (here[row, :length], one.states[point]),
                    (there[row, :length], one.states[later]),
                    (logits[row, :length], one.logits),
                ):
                    torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-3)
            assert bool(slope.isfinite().all())
            assert bool(slope.any()), f"no gradient reaches {point}"
