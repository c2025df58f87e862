"""The kernel of the static form against float64, against the torch form, and in a graph."""

from __future__ import annotations

import importlib.util
import random
import sys
from collections.abc import Iterator, Sequence
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.child import ROOT
from benchmarks.gpu.cases import Case, Result, Results, lacking
from benchmarks.gpu.device import Device
from benchmarks.gpu.steering import Load, Steering
from benchmarks.vllm.diets import Batch, Spec, all_kinds, of_kinds
from benchmarks.vllm.report import Table
from benchmarks.vllm.shapes import Shape, library
from steer.batch.ledger import PositionLedger
from steer.batch.requests import Span, SteeredRequest
from steer.batch.step import build_step
from steer.batch.tables import Tables
from steer.engines.vllm.taps.forward_pass import ForwardPass
from steer.engines.vllm.taps.taps import tap_of
from steer.model import HookPoint
from steer.plan.plan import SteeringPlan
from steer.spec import parse_spec

PART = "kernel"
BOUNDS = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
"""What one rounding of each half may make, and in float32 what sums in another order may."""
_REFERENCE = ROOT / "tests" / "support" / "float64_reference.py"


class Kernels:
    """The cases, and what they share: made when the first of them runs."""

    def __init__(self, shape: Shape, device: Device, *, requests: int, rows: int = 16) -> None:
        self.shape, self.device, self.requests, self._rows = shape, device, requests, rows

    def cases(self) -> Iterator[Case]:
        for dtype, bound in BOUNDS.items():
            name = str(dtype).removeprefix("torch.")
            for kind, spec in of_kinds(self.shape, 3).items():
                if "gate" in kind or "trigger" in kind:
                    continue  # a batch of all kinds has them
                for halves in (1, 2):
                    yield Case(
                        f"{PART}/{kind}/{name}/{halves}",
                        partial(self._of_kind, spec, dtype, halves, bound),
                    )
            yield Case(
                f"{PART}/all kinds in a batch/{name}/2",
                partial(self._batch, dtype, bound),
            )
            yield Case(f"{PART}/replayed by a graph/{name}/2", partial(self._replayed, dtype))

    def missing(self) -> str | None:
        return lacking("triton", "pydantic", "jaxtyping", "safetensors", "gguf")

    def table(self, found: Results) -> Table:
        """The worst error of each kind, and whether all of it holds."""
        by_kind: dict[str, dict[str, list[Result]]] = {}
        for name, result in found:
            kind, dtype, _ = name.split("/")
            by_kind.setdefault(kind, {}).setdefault(dtype, []).append(result)
        dtypes = [str(dtype).removeprefix("torch.") for dtype in BOUNDS]
        rows = [
            (kind, *(_cell(cells.get(dtype, [])) for dtype in dtypes), _whole(cells))
            for kind, cells in by_kind.items()
        ]
        title = "The kernel against its reference: the largest error of a token, as a share of it"
        return Table(title, ("edit", *dtypes, "holds"), rows)

    # What they share

    @cached_property
    def _steering(self) -> Steering:
        tokens = max(self._rows, self.requests)
        return Steering(self.shape, self.device, requests=self.requests, tokens=tokens)

    @cached_property
    def _reference(self) -> Any:
        """The tests' float64 form, which was written from the papers and not from `steer.edits`."""
        found = importlib.util.spec_from_file_location("float64_reference", _REFERENCE)
        if found is None or found.loader is None or not _REFERENCE.exists():
            raise RuntimeError(f"{_REFERENCE} is missing: bring tests/ along")
        module = importlib.util.module_from_spec(found)
        sys.modules[module.__name__] = module  # where dataclasses look
        found.loader.exec_module(module)
        made = library(self.shape)
        return module.Float64Reference(
            vectors=made.vectors, saes=made.saes, low_ranks=made.low_ranks, maps=made.maps
        )

    def _halves(self, rows: int, dtype: torch.dtype, halves: int) -> list[Tensor]:
        """A stream whose numbers are some ones large, as one tensor or two."""
        generator = torch.Generator().manual_seed(rows)
        drawn = torch.randn(halves, rows, self.shape.d_model, generator=generator)
        return [one.to(self.device.torch, dtype) for one in drawn]

    # Cases

    def _of_kind(self, raw: Spec, dtype: torch.dtype, halves: int, bound: float) -> Result:
        """One spec on every token, against float64."""
        steering, point = self._steering, HookPoint(self.shape.middle)
        # On every token: a window says which are selected, and nothing of the arithmetic.
        where = {"phases": ["prompt", "generation"]}
        spec = {**raw, "where": where}
        (plan,) = steering.plans([spec])
        load = Load([plan], self._rows)
        given = self._halves(self._rows, dtype, halves)
        before = _stream(given)
        running = steering.begin(load, inline=False)
        assert running is not None
        steering.form.edit(tap_of(point), given[0], given[1] if halves == 2 else None)
        self.device.wait()
        after = _stream(given)
        parsed = parse_spec(spec)
        wanted = np.stack([self._reference.steer(parsed, point, row, 9, 1, 0) for row in before])
        changed = float(np.linalg.norm(wanted - before, axis=1).max())
        return _judged(_error(after, wanted, before), bound) | {"largest_change": changed}

    def _batch(self, dtype: torch.dtype, bound: float) -> Result:
        """Many plans with gates of both scopes and requests without any, against the torch form."""
        steering, shape = self._steering, self.shape
        specs: Batch = all_kinds(shape, self.requests)
        random.Random(1).shuffle(specs)
        specs[:: max(2, self.requests // 8)] = [None] * len(specs[:: max(2, self.requests // 8)])
        plans = steering.plans(specs)
        point, tokens = HookPoint(shape.middle), self.requests
        taps = range(tap_of(point) + 1)
        steering.begin(Load(plans, 1), inline=False)
        visitor = self._torch_pass(plans)
        unsteered = [n for n, plan in enumerate(plans) if plan is None]
        worst, kept = 0.0, True
        for tap in taps:
            given = self._halves(tokens, dtype, 2)
            mine, before = ([one.clone() for one in given] for _ in range(2))
            steering.form.edit(tap, mine[0], mine[1])
            if tap in visitor.taps:
                visitor.visit(tap, given[0], given[1])
            self.device.wait()
            kept &= all(
                torch.equal(a[unsteered], b[unsteered]) for a, b in zip(before, mine, strict=True)
            )
            worst = max(worst, _error(*map(_stream, (mine, given, before))))
        return _judged(worst, bound, holds=kept) | {"unsteered_bits_kept": kept}

    def _torch_pass(self, plans: Sequence[SteeringPlan | None]) -> ForwardPass:
        """The same pass in the torch form, on the same device."""
        steering = self._steering
        tables = Tables(steering.model, slots=self.requests, device=self.device.torch)
        ledger = PositionLedger(self.requests, 8, self.device.torch)
        spans = []
        for n, plan in enumerate(plans):
            if plan is not None:
                request = SteeredRequest(n, 4, plan, tables.acquire(plan))
                positions = np.array([4])
                spans.append(Span(request, n, positions, positions))
        step = build_step(tables, ledger, spans, len(plans))
        return ForwardPass(step, len(plans), self.shape.layers)

    def _replayed(self, dtype: torch.dtype) -> Result:
        """A graph captured while nobody was steered does what a launch does, to the bit."""
        steering, tokens = self._steering, self.requests
        tap = tap_of(HookPoint(self.shape.middle))
        plans = steering.plans(all_kinds(self.shape, tokens))
        given = self._halves(tokens, dtype, 2)
        static = [one.clone() for one in given]
        steering.idle()
        replay = self.device.captured(lambda: steering.form.edit(tap, static[0], static[1]))
        steering.begin(Load(plans, 1), inline=False)
        for one, source in zip(static, given, strict=True):
            one.copy_(source)
        replay()
        mine = [one.clone() for one in given]
        steering.form.edit(tap, mine[0], mine[1])
        self.device.wait()
        same = all(torch.equal(a, b) for a, b in zip(static, mine, strict=True))
        edited = not torch.equal(static[1], given[1])
        return _judged(0.0, 0.0, holds=same and edited)


def _cell(results: list[Result]) -> str:
    errors = [one["error"] for one in results if "tries" in one]
    if errors:
        return str(errors[0])[:60]
    return f"{max(one['relative_error'] for one in results):.1e}" if results else ""


def _whole(cells: dict[str, list[Result]]) -> str:
    every = [one for results in cells.values() for one in results]
    return "yes" if all(one.get("holds") for one in every) else "NO"


def _error(actual: Any, wanted: Any, before: Any) -> float:
    """The largest of a token, as a share of the longer of its rows before and after: two halves are
    rounded by their own size. NaN where anything is not a number, so that it never passes."""
    sizes = np.maximum(*(np.linalg.norm(one, axis=1) for one in (wanted, before)))
    return float((np.linalg.norm(actual - wanted, axis=1) / sizes).max())


def _stream(halves: Sequence[Tensor]) -> Any:
    """Their sum `[T, d]` in float64."""
    return torch.stack([one.double() for one in halves]).sum(0).cpu().numpy()


def _judged(error: float, bound: float, *, holds: bool = True) -> Result:
    return {"relative_error": error, "bound": bound, "holds": bool(error <= bound and holds)}
