"""The kernel inside CUDA graphs and traces, and compiled for GPUs."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from kernel_forms import (
    BATCH,
    GENERATOR,
    KINDS,
    LAYERS,
    LONGEST,
    MODEL,
    ROWS,
    SLOTS,
    TAPS,
    WIDTH,
    close,
    make_form,
    no_fault,
    plan_of,
    random_plan,
)
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from steer.batch.ledger import PositionLedger
from steer.batch.requests import Span, SteeredRequest
from steer.batch.step import build_step
from steer.batch.tables import Tables
from steer.engines.vllm.static import operators
from steer.engines.vllm.static.kernel import group, launch
from steer.engines.vllm.static.operators import set_form
from steer.engines.vllm.taps.forward_pass import ForwardPass
from steer.engines.vllm.taps.taps import tap_of
from steer.errors import EngineError
from steer.model import HookPoint


class Recorder:
    """Stands in for the kernel: takes down its launches, as a graph that is being captured."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self.launches: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []

    def __getitem__(self, grid: Any) -> Any:
        return lambda *args, **named: self.launches.append((grid, args, named))

    def replay(self) -> None:
        for grid, args, named in self.launches:
            self.kernel[grid](*args, **named)


class NoOperations(TorchDispatchMode):
    """Fails on any operation on tensors: allocations, copies, looks at data."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"{func} was called")


def test_a_replayed_graph_steers_by_what_the_buffers_say_then(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The launches are captured once, with nobody steered, and run again for other batches."""
    ledgers = [PositionLedger(ROWS, LONGEST, torch.device("cpu")) for _ in range(2)]
    form, tables = make_form(ledgers[1]), Tables(MODEL, slots=SLOTS)
    recorder = Recorder(group.edit_tokens)
    monkeypatch.setattr(launch, "edit_tokens", recorder)
    halves = [(torch.zeros(8, WIDTH), torch.zeros(8, WIDTH)) for _ in TAPS]
    set_form(form)
    with NoOperations():
        for tap, (hidden, residual) in zip(TAPS, halves, strict=True):
            operators.edit_pair(hidden, residual, tap)
    set_form(None)
    assert len(recorder.launches) == len(TAPS)

    draw = random.Random(3)
    drawn = (random_plan(draw) for _ in range(100))
    plans = [plan for plan in drawn if not plan.onward][: 3 * SLOTS]  # of each three tokens
    results = []
    for number in range(0, len(plans), 2):
        spans: tuple[list[Span], list[Span]] = ([], [])
        for row, plan in enumerate(plans[number : number + 2]):
            for found, table in zip(spans, (tables, form.tables), strict=True):
                request = SteeredRequest(row, 2, plan, table.acquire(plan))
                found.append(Span(request, 3 * row, np.arange(3), np.array([4, 5, 6])))
                ledgers[0].reset(row)
                ledgers[1].reset(row)
        reference = ForwardPass(build_step(tables, ledgers[0], spans[0], 6), 6, LAYERS)
        running = form.begin(spans[1], 6, no_fault)
        assert running is not None
        shown = torch.randn(2, 8, WIDTH, generator=GENERATOR)
        for hidden, residual in halves:
            hidden.copy_(shown[0])
            residual.copy_(shown[1])
        recorder.replay()
        running.finish()
        for tap, (hidden, residual) in zip(TAPS, halves, strict=True):
            wanted = shown.clone()
            if tap in reference.taps:
                reference.visit(tap, wanted[0], wanted[1])
            close(hidden, wanted[0], 1e-5)
            close(residual, wanted[1], 1e-5)
        results.append(halves[-1][1] - shown[1])
        for plan in plans[number : number + 2]:
            tables.release(plan)
            form.tables.release(plan)
    assert any(result.abs().max() > 0.1 for result in results)

    form.clear()
    shown = torch.randn(8, WIDTH, generator=GENERATOR)
    for half in (half for pair in halves for half in pair):
        half.copy_(shown)
    recorder.replay()
    assert all(torch.equal(half, shown) for pair in halves for half in pair)


def test_the_operators_are_traced_and_change_their_arguments() -> None:
    ledger = PositionLedger(1, LONGEST, torch.device("cpu"))
    form = make_form(ledger)
    plan = plan_of(KINDS["ablate"], KINDS["add"])
    request = SteeredRequest(0, 4, plan, form.tables.acquire(plan))
    form.begin([Span(request, 0, np.arange(4), np.arange(4))], 4, no_fault)
    tap = tap_of(HookPoint(1))

    def layer(hidden: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        hidden, residual = hidden * 2, residual + 1
        torch.ops.steer.edit_pair(hidden, residual, tap)
        alone = residual.clone()
        torch.ops.steer.edit_one(alone, tap)
        return residual - 1, alone

    given = torch.randn(2, 6, WIDTH, generator=GENERATOR)
    set_form(form)
    try:
        wanted = layer(*given.clone())
        traced = torch.compile(layer, backend="aot_eager", fullgraph=True)
        actual = traced(*given.clone())
    finally:
        set_form(None)
    assert all(torch.equal(a, b) for a, b in zip(actual, wanted, strict=True))
    assert not torch.equal(wanted[0][:4], given[1][:4])
    with pytest.raises(EngineError, match="before its tables"):
        torch.ops.steer.edit_one(given[0], tap)


def test_halves_of_another_shape_are_refused() -> None:
    form = make_form(PositionLedger(1, LONGEST, torch.device("cpu")))
    for hidden in (
        torch.zeros(2, WIDTH + 1),
        torch.zeros(BATCH + 1, WIDTH),
        torch.zeros(WIDTH, 2).T,
        torch.zeros(1, 2, WIDTH),
    ):
        with pytest.raises(EngineError) as caught:
            form.edit(0, hidden, None)
        assert caught.value.code == "unexpected_shape"


def test_the_kernel_compiles_for_gpus(tmp_path: Path) -> None:
    """To machine code, by Triton's own compiler, on whatever machine the tests run."""
    script = tmp_path / "compiled.py"
    script.write_text(_COMPILED)
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "TRITON_INTERPRET": "0"}
    done = subprocess.run(
        [sys.executable, str(script)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["80", "90", "90", "100"]


_COMPILED = """
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from steer.engines.vllm.static.kernel.group import edit_tokens
from steer.engines.vllm.static.kernel.launch import launch_shape

FLOATS = {"factors", "values", "sizes", "read", "write", "laws", "constants", "gates", "latents"}
SCALARS = {"hidden_stride", "residual_stride", "group", "first_point", "points", "streams",
           "n_points", "n_groups", "batch_tokens", "width"}
SHAPES = ((80, 4096, "bf16", True, True), (90, 16384, "fp16", False, True),
          (90, 4096, "bf16", True, False), (100, 4096, "bf16", True, True))
for architecture, width, dtype, split, ranking in SHAPES:
    block, warps, tile = launch_shape(width)
    constants = {"SPLIT": split, "RANKING": ranking, "TILE": tile, "BLOCK": block}
    signature = {
        name: "constexpr" if name in constants else "i32" if name in SCALARS
        else "*fp32" if name in FLOATS else "*" + dtype if name in ("hidden", "residual")
        else "*i64" if name == "encoders" else "*i32"
        for name in edit_tokens.arg_names
    }
    source = ASTSource(fn=edit_tokens, signature=signature, constexprs=constants)
    target = GPUTarget("cuda", architecture, 32)
    assert compile(source, target=target, options={"num_warps": warps}).asm["cubin"]
    print(architecture)
"""
