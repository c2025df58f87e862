"""Every kind of edit in the kernel, against the float64 reference and the torch form."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from artefacts import MODES, shape_of
from kernel_forms import (
    GENERATOR,
    KINDS,
    LONGEST,
    PLANS,
    READ_MODES,
    REFERENCE,
    TAPS,
    TRANSCODERS,
    WIDTH,
    close,
    make_form,
    no_fault,
    plan_of,
)

from steer.artefacts.sae.encoders import LatentRows, TopKEncoder
from steer.batch.ledger import PositionLedger
from steer.batch.requests import Span, SteeredRequest
from steer.edits import LOWER, UPPER, Block, apply
from steer.engines.vllm.static.form import StaticForm
from steer.engines.vllm.taps.taps import tap_of
from steer.laws import TO_NORM, TO_PLANE, Law
from steer.model import HookPoint
from steer.plan.plan import Rule
from steer.plan.selection import EVERYWHERE
from steer.spec import parse_spec


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize(
    ("norm", "ramp"),
    [(None, None), ("preserve", None), ("preserve", [[0, 0.3]])],
)
def test_every_kind_is_what_its_paper_says(
    name: str, norm: str | None, ramp: list[list[float]] | None
) -> None:
    spec = parse_spec({"interventions": [KINDS[name]], "norm": norm, "ramp": ramp})
    plan = PLANS.plan(spec)
    ledger = PositionLedger(1, LONGEST, torch.device("cpu"))
    form = make_form(ledger)
    request = SteeredRequest(0, 5, plan, form.tables.acquire(plan))
    x = torch.randn(5, WIDTH, generator=GENERATOR)
    running = form.begin([Span(request, 0, np.arange(5), np.arange(5))], 5, no_fault)
    assert running is not None
    half = 0.4 * x
    other = x - half
    form.edit(tap_of(HookPoint(1)), half, other)
    for position, row in enumerate(x.double().numpy()):
        wanted = REFERENCE.steer(spec, HookPoint(1), row, position, 5, position)
        actual = (half + other)[position].double().numpy()
        assert np.abs(actual - wanted).max() <= 1e-5 * (1 + np.abs(wanted).max())


@pytest.mark.parametrize("mode", READ_MODES)
@pytest.mark.parametrize("name", TRANSCODERS)
def test_a_clamp_of_a_transcoder_is_that_of_the_whole_one(name: str, mode: str) -> None:
    """Read in one launch and written in another, or in the same."""
    item = {"kind": "clamp", "sae": name, "features": [3, 60, 17, 8, 21], **MODES[mode]}
    spec, sae = parse_spec({"interventions": [item]}), TRANSCODERS[name]
    if "share" in mode and sae.measure != "product":
        return  # there is no such clamp: it would have two lengths
    plan, read, written = PLANS.plan(spec), HookPoint(1, sae.site), sae.write_point
    form = make_form(PositionLedger(1, LONGEST, torch.device("cpu")))
    request = SteeredRequest(0, 5, plan, form.tables.acquire(plan))
    assert form.begin([Span(request, 0, np.arange(5), np.arange(5))], 5, no_fault) is not None
    # The state where it is read in an earlier launch; the part and the stream of the last one.
    x, part, stream = torch.randn(3, 5, WIDTH, generator=GENERATOR)
    if read.site == "mlp_out":
        x = part.clone()
    else:
        form.edit(tap_of(read), x / 3, x - x / 3)
    before = part.clone() if written.site == "mlp_out" else part + stream
    form.edit(tap_of(written), part, stream)
    actual = part if written.site == "mlp_out" else part + stream
    for found, old, row in zip(actual, before, x, strict=True):
        wanted = REFERENCE.clamped(
            spec.interventions[0], old.double().numpy(), row.double().numpy()
        )
        assert np.abs(found.double().numpy() - wanted).max() <= 1e-5 * (1 + np.abs(wanted).max())


@pytest.mark.parametrize("programs", [1, 18])
@pytest.mark.parametrize("latents", ["apart", "tied", "closed"])
@pytest.mark.parametrize("k", [1, 6, 39, 40])
def test_a_feature_is_active_where_the_reference_has_it(
    programs: int, latents: str, k: int
) -> None:
    """Small whole numbers, whose products are exact whatever the order of their sum."""
    size, clamped = 40, [0, 1, 7, 20, 39]
    read = torch.randint(-3, 4, (size, WIDTH), generator=GENERATOR).float()
    if latents == "tied":
        read[1::2] = read[::2]
    bias = torch.full((size,), -1000.0) if latents == "closed" else read[:, 0].clone()
    laws = [Law.scaled(3.0, bias=bias[n].item(), threshold=0.0) for n in clamped]
    write = torch.randint(-1, 2, (len(clamped), WIDTH), generator=GENERATOR).float()
    before = Block(shift=torch.ones(WIDTH))
    ranking = Block.of_edits(
        read[clamped], write, laws, encoder=TopKEncoder("whole numbers", LatentRows(read, bias), k)
    )
    rules = tuple(Rule(EVERYWHERE, None, {HookPoint(1): one}) for one in (before, ranking, ranking))
    plan = replace(plan_of(KINDS["clamp-topk"]), fingerprint="k", rules=rules)
    form = make_form(PositionLedger(1, LONGEST, torch.device("cpu")), programs=programs)
    request = SteeredRequest(0, 2, plan, form.tables.acquire(plan))
    assert form.begin([Span(request, 1, np.arange(4), np.arange(4))], 5, no_fault) is not None
    x = torch.randint(-3, 4, (6, WIDTH), generator=GENERATOR).float()
    wanted = x.clone()
    for block in (before, ranking, ranking):
        wanted[1:5] = apply(block, wanted[1:5])
    form.edit(tap_of(HookPoint(1)), x, None)
    assert torch.equal(x, wanted)
    assert not form.buffers.arrived.any()


@pytest.mark.parametrize("width", [1, 7, 96, 1000, 16384])
def test_rows_of_any_width(width: int) -> None:
    model = replace(shape_of(width, 1), sites=("resid_post",))
    point = HookPoint(0)
    rows = torch.randn(10, width, generator=GENERATOR) / width**0.5
    read, write, channels = rows[:2], rows[2:4], rows[4:8]
    channels[LOWER], channels[UPPER] = -channels[UPPER].abs() - 0.5, torch.inf
    laws = torch.tensor([Law(0.1, -0.2, 0.3, 0.4, -1.0, 1.0, TO_NORM, 1.0), Law(relative=TO_PLANE)])
    block = Block(rows[8], read, write, laws, channels, side=rows[9], preserve_norm=True)
    plan = replace(
        plan_of(KINDS["ablate"]), rules=(Rule(EVERYWHERE, None, {point: block}),), fingerprint="w"
    )
    ledger = PositionLedger(1, 4, torch.device("cpu"))
    form = StaticForm(
        model, [2], max_requests=1, batch_tokens=4, edit_rows=4, device=torch.device("cpu")
    )
    form.bind(lambda: ledger)
    request = SteeredRequest(0, 2, plan, form.tables.acquire(plan))
    x = torch.randn(3, width, generator=GENERATOR)
    wanted = torch.cat([apply(block, x[:2]), x[2:]])
    form.begin([Span(request, 0, np.arange(2), np.arange(2))], 2, no_fault)
    form.edit(2, x, None)
    close(x, wanted, 1e-5)
    assert torch.equal(x[2], wanted[2])


def test_a_row_without_a_direction_has_no_norm_to_keep() -> None:
    """What is rescaled is zero: it stays zero, and is not 0 · ∞."""
    block = Block(shift=torch.zeros(WIDTH), replace=True, preserve_norm=True)
    plan = replace(plan_of(KINDS["patch"]), rules=(Rule(EVERYWHERE, None, {HookPoint(1): block}),))
    form = make_form(PositionLedger(1, LONGEST, torch.device("cpu")))
    request = SteeredRequest(0, 2, plan, form.tables.acquire(plan))
    x = torch.full((2, WIDTH), 10.0)
    form.begin([Span(request, 0, np.arange(2), np.arange(2))], 2, no_fault)
    form.edit(tap_of(HookPoint(1)), x, None)
    assert torch.equal(x, torch.zeros_like(x))


@pytest.mark.parametrize("split", [True, False])
def test_a_row_that_an_edit_drives_beyond_all_numbers_is_left_and_its_request_known(
    split: bool,
) -> None:
    """Once, in a pass that is carried on; a row that was beyond them before is nobody's fault."""
    ledger = PositionLedger(3, LONGEST, torch.device("cpu"))
    form = make_form(ledger)
    edit = Block.of_edits(torch.zeros(1, WIDTH), torch.ones(1, WIDTH), [Law.constant(3e38)])
    made = plan_of(KINDS["ablate"])
    plan = replace(made, fingerprint="over", rules=(Rule(EVERYWHERE, None, {HookPoint(1): edit}),))
    harmless = plan_of(KINDS["add"])
    spans = [
        Span(SteeredRequest(row, 2, one, form.tables.acquire(one)), row, np.array([2]), np.ones(1))
        for row, one in ((0, harmless), (1, plan), (2, plan))
    ]
    running = form.begin(spans, 3, no_fault)
    assert running is not None
    for _ in range(2):
        x = torch.randn(3, WIDTH, generator=GENERATOR)
        x[2] = float("inf")
        before, halves = x.clone(), (x, torch.zeros_like(x)) if split else (x, None)
        for tap in TAPS:
            form.edit(tap, *halves)
        running.finish()
        stream = x if halves[1] is None else x + halves[1]
        assert torch.equal(stream[1], before[1])
        assert not torch.equal(stream[0], before[0])
    assert not any(ledger.runs_over(row, 3) for row in range(3))  # nobody has waited
    form.collect(wait=True)
    assert [ledger.runs_over(row, 3) for row in range(3)] == [False, True, False]
    assert not ledger.runs_over(1, 2)
