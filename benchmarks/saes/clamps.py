"""Clamped SAE features against the usual hook: encode all, edit, decode, add the error back.

What is timed is a whole step of Steer's at one hook point, tables, slots and counting included, and
the hook's arithmetic alone. Both change the same tokens alike, which is checked first.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from benchmarks.timing import interleaved, paired_ratio
from steer.artefacts.library import MemoryLibrary
from steer.artefacts.sae.base import SAE
from steer.batch.ledger import Ledger
from steer.batch.requests import Span, SteeredRequest
from steer.batch.step import build_step
from steer.batch.tables import Tables
from steer.model import Capabilities, HookPoint, ModelInfo
from steer.plan.compiler import compile_plan
from steer.plan.sources import Sources
from steer.spec import parse_spec

FEATURES, VALUE = 8, 4.0
POINT = HookPoint(1)
Edit = Callable[[Tensor], Tensor]


def run(
    rounds: int,
    *,
    width: int = 2048,
    latents: int = 65_536,
    narrow: int = 128,
    sizes: tuple[int, ...] = (4_096, 65_536, 1_048_576),
    batches: tuple[int, ...] = (1, 64),
) -> list[tuple[str, str, str, str]]:
    """Against the hook at `width` and `latents`; and, at the width `narrow`, where the largest fits
    into memory, against itself with SAEs of other `sizes`."""
    return [
        *_beside_the_hook(random_sae(latents, width), batches, rounds),
        *_by_size([random_sae(size, narrow) for size in sizes], batches[-1], rounds),
    ]


def _beside_the_hook(
    sae: SAE, batches: tuple[int, ...], rounds: int
) -> list[tuple[str, str, str, str]]:
    rows = []
    for batch in batches:
        x = tokens(batch, sae.d_in)
        ours, hook = steered(sae, batch), usual_hook(sae)
        difference = float((ours(x) - hook(x)).abs().max())
        found = interleaved(
            {"hook": _timed(hook, x), "steer": _timed(ours, x)},
            rounds=rounds,
            title=f"{sae.d_sae} latents, {batch} tokens",
        )
        of = f"{sae.d_sae:,} × {sae.d_in:,}, {batch} tokens"
        times = f"{paired_ratio(found['steer'], found['hook'])} × as many"
        rows.append((f"usual hook, {of}", str(found["hook"]), "", ""))
        rows.append((f"{FEATURES} features clamped, {of}", str(found["steer"]), times, "≥ 20 ×"))
        rows.append(("largest difference between the two", "", f"{difference:.1e}", "≤ 1e-4"))
    return rows


def _by_size(saes: list[SAE], batch: int, rounds: int) -> list[tuple[str, str, str, str]]:
    x = tokens(batch, saes[0].d_in)
    found = interleaved(
        {str(sae.d_sae): _timed(steered(sae, batch), x) for sae in saes},
        rounds=rounds,
        title="by size",
    )
    first = found[str(saes[0].d_sae)]
    return [
        (
            f"{FEATURES} features of {sae.d_sae:,} × {sae.d_in}, {batch} tokens",
            str(found[str(sae.d_sae)]),
            f"{paired_ratio(first, found[str(sae.d_sae)])} × the time of {saes[0].d_sae:,}",
            "1 ×",
        )
        for sae in saes
    ]


def random_sae(latents: int, width: int) -> SAE:
    """A JumpReLU SAE of random rows, few of whose features are active for a random token."""
    generator = torch.Generator().manual_seed(latents)
    return SAE.of(
        "jumprelu",
        W_enc=torch.randn(width, latents, generator=generator) / width**0.5,
        b_enc=torch.zeros(latents),
        W_dec=torch.randn(latents, width, generator=generator) / width**0.5,
        b_dec=torch.zeros(width),
        threshold=torch.full((latents,), 2.0),
        layer=POINT.layer,
    )


def tokens(count: int, width: int) -> Tensor:
    """Rows `[count, width]` of a residual stream."""
    return torch.randn(count, width, generator=torch.Generator().manual_seed(count))


def clamped(sae: SAE) -> list[int]:
    """The features that are clamped, spread over the SAE."""
    return [n * sae.d_sae // FEATURES for n in range(FEATURES)]


def steered(sae: SAE, batch: int) -> Edit:
    """A step of Steer's over `batch` tokens of as many requests, all with the same spec."""
    model = ModelInfo(
        name="rows",
        architecture="Rows",
        n_layers=POINT.layer + 1,
        d_model=sae.d_in,
        vocab_size=2,
        max_length=8,
        sites=(POINT.site,),
    )
    item = {"kind": "clamp", "sae": "s", "features": clamped(sae), "value": VALUE}
    spec = parse_spec({"interventions": [item]})
    sources = Sources(MemoryLibrary(saes={"s": sae}), model)
    plan = compile_plan(spec, sources, Capabilities("rows", ("clamp",), model.sites))
    tables, ledger = Tables(model, slots=2), Ledger(batch)
    slot, place = tables.acquire(plan), np.ones(1, dtype=np.int64)
    requests = [SteeredRequest(row, 1, plan, slot) for row in range(batch)]
    spans = [Span(request, row, place, place) for row, request in enumerate(requests)]

    def edit(x: Tensor) -> Tensor:
        step = build_step(tables, ledger, spans, len(x))
        assert step is not None
        after = step.edit(POINT, x)
        step.finish()
        return after

    return edit


def usual_hook(sae: SAE) -> Edit:
    """What a forward hook with the whole SAE does."""
    features = clamped(sae)

    def edit(x: Tensor) -> Tensor:
        f = sae.encode(x)
        error = x - sae.decode(f)
        f[:, features] = VALUE
        return sae.decode(f) + error

    return edit


def _timed(edit: Edit, x: Tensor) -> Callable[[], float]:
    def work() -> float:
        edit(x)
        return float(len(x))

    return work
