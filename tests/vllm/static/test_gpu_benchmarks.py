"""The scripts for a GPU, tried at tiny sizes on a CPU under Triton's interpreter."""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"

from pathlib import Path

import pytest
import torch

from benchmarks.gpu import kernel, share
from benchmarks.gpu.cases import Progress, results, run_cases
from benchmarks.gpu.device import Host
from benchmarks.gpu.steering import Load, Steering
from benchmarks.kept import Kept
from benchmarks.vllm.diets import add
from benchmarks.vllm.shapes import Shape
from steer import edits
from steer.engines.vllm.taps.taps import tap_of
from steer.model import HookPoint
from steer.spec import KINDS

TINY = Shape("tiny", d_model=32, layers=4, heads=4, ffn=64, vocabulary=64, kv_heads=2)
SIZES = share.Sizes(tokens=(1, 4), specs=(1, 4), context=8, rounds=2, work=0.0)


@pytest.fixture
def kept(tmp_path: Path) -> Kept:
    return Kept(tmp_path / "gpu.json", {}, {})


def test_every_kind_is_held_against_its_reference_in_every_dtype(kept: Kept) -> None:
    part = kernel.Kernels(TINY, Host(), requests=18, rows=2)
    found = run_cases(kept, part.cases(), Host(), limit_seconds=1e9)
    failed = {name: one for name, one in kept.results.items() if not one.get("holds")}
    assert failed == {}
    assert found == Progress(len(kept.results), 0, 0)
    table = part.table(results(kept, kernel.PART))
    kinds = " ".join(row[0] for row in table.rows)
    assert all(kind in kinds for kind in KINDS if kind != "concept")
    assert "clamp, competing" in kinds
    assert all(row[-1] == "yes" for row in table.rows)
    changes: dict[str, float] = {}
    for name, one in kept.results.items():
        if "largest_change" in one:
            kind = name.split("/")[1]
            changes[kind] = max(changes.get(kind, 0.0), one["largest_change"])
    assert min(changes.values()) > 1e-3, "what changes nothing proves nothing"


def test_a_kernel_that_is_wrong_is_told(kept: Kept, monkeypatch: pytest.MonkeyPatch) -> None:
    part = kernel.Kernels(TINY, Host(), requests=4, rows=2)
    monkeypatch.setattr(part._steering.form, "edit", lambda *_: None)
    run_cases(kept, part.cases(), Host(), limit_seconds=1e9)
    rows = part.table(results(kept, kernel.PART)).rows
    assert all(row[-1] == "NO" for row in rows)


def test_a_layer_is_measured_with_everybody_in_turn(kept: Kept) -> None:
    part = share.Shares(TINY, Host(), SIZES)
    assert run_cases(kept, part.cases(), Host(), limit_seconds=1e9) == Progress(2, 0, 0), (
        kept.results
    )
    seconds = kept["layer/4"]["seconds"]
    assert list(seconds)[:2] == [share.PLAIN, share.IDLE]
    assert {name.rpartition(", ")[2] for name in list(seconds)[2:]} == {"1", "4"}
    assert all(len(one) == SIZES.rounds for one in seconds.values())
    assert len(part.table(results(kept, share.PART)).rows) == (2 + 4) + (2 + 8)


@pytest.mark.parametrize("inline", [True, False])
def test_one_graph_steers_by_what_was_begun_last(inline: bool) -> None:
    """Constants in the graph or in the kernel: a tap that nobody is steered at changes no bit, and
    each request gets its own row."""
    steering = Steering(TINY, Host(), requests=4, tokens=8)
    tap = steering.tap(tap_of(HookPoint(TINY.middle)))
    plans = steering.plans([add(0, [TINY.middle]), None, add(1, [TINY.middle])])
    given = torch.randn(2, 6, TINY.d_model, generator=torch.Generator().manual_seed(0))

    def stream() -> torch.Tensor:
        hidden, residual = tap(given[0].clone(), given[1].clone())
        return hidden + residual

    before = given[0] + given[1]
    assert torch.equal(stream(), before)
    steering.begin(Load(plans, 2), inline=inline)
    after = stream()
    for n, plan in enumerate(plans):
        rows = slice(2 * n, 2 * n + 2)
        wanted = before[rows]
        if plan is not None:
            wanted = edits.apply(plan.rules[0].blocks[HookPoint(TINY.middle)], wanted)
        torch.testing.assert_close(after[rows], wanted, atol=1e-5, rtol=1e-5)
    assert torch.equal(after[2:4], before[2:4])
    steering.idle()
    assert torch.equal(stream(), before)
