"""What is asked of an SAE whose features compete: in the type of its file, and once for all."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from artefacts import NORMALISATIONS, random_sae, shape_of
from float64_reference import Float64Reference

from steer.artefacts.library import MemoryLibrary
from steer.artefacts.sae import encoders
from steer.artefacts.sae.base import SAE
from steer.artefacts.sae.competing import competing
from steer.artefacts.sae.encoders import TopKEncoder
from steer.artefacts.sae.storage.rows import held_rows
from steer.batch.ledger import Ledger
from steer.batch.requests import Span, SteeredRequest
from steer.batch.step import build_step
from steer.batch.tables import Tables
from steer.model import Capabilities, HookPoint
from steer.plan.cache import PlanCache
from steer.spec import KINDS, SITES, parse_spec


def in_half(suffix: str, dtype: torch.dtype) -> SAE:
    """A TopK SAE whose rows are stored in half precision, each times a factor of its own."""
    sae = random_sae("topk" + suffix, seed=5)
    rows = held_rows(sae.W_enc.T.to(dtype)).scaled_by(torch.linspace(0.5, 2.0, 64))
    fields: dict[str, Any] = {name: getattr(sae, name) for name in ("b_enc", "b_dec", "k")}
    return SAE.of_rows(
        "topk", encoder=rows, decoder=sae.decoder, layer=1, normalize=sae.normalize, **fields
    )


def rows(count: int) -> torch.Tensor:
    return 3 * torch.randn(count, 16, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("suffix", NORMALISATIONS)
@pytest.mark.parametrize("block", [64 << 20, 300])
def test_rows_in_half_precision_are_multiplied_as_float32(
    suffix: str, dtype: torch.dtype, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoders, "BLOCK_BYTES", block)
    sae, x = in_half(suffix, dtype), rows(7)
    asked = competing(sae, (1, 2))
    assert asked is not None
    encoder = asked.encoder
    assert isinstance(encoder, TopKEncoder)
    assert encoder.rows.read.dtype == dtype
    wanted = sae.pre_activations(x)
    torch.testing.assert_close(encoder.rows.of(x), wanted, rtol=1e-5, atol=1e-5)
    plain = encoder.rows.in_float32()
    assert plain.plain
    torch.testing.assert_close(plain.of(x), wanted, rtol=1e-5, atol=1e-5)
    inner = wanted.relu().topk(9).values[:, -2:].mean(-1, keepdim=True)
    torch.testing.assert_close(encoder.least_active(x), inner, rtol=1e-5, atol=1e-5)


def test_requests_share_the_pursuit_of_their_sae(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two requests that clamp other features of one SAE: its features are found once in a pass."""
    sae, calls, pursue = random_sae("matching_pursuit"), [], encoders.pursue

    def counted(*args: Any, **named: Any) -> torch.Tensor:
        calls.append(len(args[0]))
        return pursue(*args, **named)

    monkeypatch.setattr(encoders, "pursue", counted)
    specs = [
        parse_spec({"interventions": [{"kind": "clamp", "sae": "s", "features": f, "value": 2.0}]})
        for f in ([3, 60], [17])
    ]
    able = Capabilities("test", KINDS, SITES)
    plans = PlanCache(MemoryLibrary(saes={"s": sae}), shape_of(), able)
    tables, spans = Tables(shape_of(), slots=4), []
    for row, spec in enumerate(specs):
        plan = plans.plan(spec)
        request = SteeredRequest(row, 3, plan, tables.acquire(plan))
        spans.append(Span(request, 3 * row, np.arange(3), np.zeros(3, dtype=np.int64)))
    step = build_step(tables, Ledger(2), spans, 6)
    assert step is not None
    x = rows(6)
    found = step.edit(HookPoint(1), x)
    assert calls == [6]
    reference = Float64Reference(saes={"s": sae})
    for row, spec in enumerate(specs):
        for token in range(3 * row, 3 * row + 3):
            wanted = reference.clamped(spec.interventions[0], *[x[token].double().numpy()] * 2)
            np.testing.assert_allclose(found[token].double().numpy(), wanted, rtol=1e-5, atol=1e-5)
