"""What Python does in a step whose edits run in kernels: `python -m
benchmarks.vllm.steps.around_kernels`.

Inside CUDA graphs no Python runs, so that this is all that a decode step of steered requests costs
the host: the worker's adapter before and after the forward pass, for a model that consists of taps
alone, at which no kernel is launched and each is marked as reached. On a GPU what is written here
goes to pinned memory and then there, which this does not show. Needs Triton, as kernels do.
"""

from __future__ import annotations

from functools import partial
from typing import Annotated

import torch
import typer
from rich.console import Console
from torch import Tensor

from benchmarks.vllm.diets import DIETS, Batch, Diet, add, of_kinds
from benchmarks.vllm.overhead import MAX_LENGTH, StepAlone, planned, step_cost
from benchmarks.vllm.pair import PROMPT
from benchmarks.vllm.report import Table, micro
from benchmarks.vllm.shapes import CAPABILITIES, FEATURES, SHAPES, SLOTS, Shape, library
from steer.engines.vllm.static.form import StaticForm
from steer.engines.vllm.worker.edits import StaticEdits, TapEdits
from steer.plan.cache import PlanCache


def _one_of(kind: str, shape: Shape, batch: int) -> Batch:
    """One request of a kind among others that each ablate their own direction."""
    others = [of_kinds(shape, n)["ablate"] for n in range(batch - 1)]
    return [of_kinds(shape, batch)[kind], *others]


WATCHING = (
    Diet("each its own ablation", lambda s, b: [of_kinds(s, n)["ablate"] for n in range(b)], {}),
    Diet("one of them gated by the prompt", partial(_one_of, "add, gated by prompt"), {}),
    Diet("one of them gated by token", partial(_one_of, "ablate, gated by token"), {}),
    Diet("one of them where a token triggers", partial(_one_of, "add, where a token triggers"), {}),
    Diet("each gated by token", lambda s, b: [_gated(s, n) for n in range(b)], {}),
)


def _gated(shape: Shape, n: int) -> dict[str, object]:
    gate = {"vector": "v1", "above": 0.0, "layer": 0, "scope": "token"}
    return {**add(n, [shape.middle]), "when": gate}


class Kernels:
    """Edits in kernels, with `taps` that launch none."""

    def __init__(self, shape: Shape) -> None:
        model, device = shape.info(MAX_LENGTH), torch.device("cpu")
        taps = range(2 * shape.layers + 1)
        self.form = StaticForm(
            model,
            taps,
            max_requests=SLOTS,
            batch_tokens=SLOTS * PROMPT,
            edit_rows=4096,
            device=device,
            latents=2 * SLOTS * FEATURES,
        )
        self.edits = StaticEdits(self.form, TapEdits(model, SLOTS, device))
        self.taps = [self._reached for _ in taps]

    def _reached(self, hidden: Tensor, residual: Tensor) -> None:  # noqa: ARG002 - a tap's
        buffers = self.form.buffers
        buffers.reached.copy_(buffers.epoch.expand_as(buffers.reached))


def main(
    shape: str = "100m",
    batch: Annotated[list[int] | None, typer.Option(help="Default: 1, 8, 32, 64.")] = None,
    compiled: Annotated[bool, typer.Option(help="Whether graphs add constants themselves.")] = True,
) -> None:
    """Medians of 400 steps of each diet at each batch size."""
    torch.set_num_threads(1)
    one = SHAPES[shape]
    plans = PlanCache(library(one), one.info(), CAPABILITIES)
    rows = []
    for size in batch or (1, 8, 32, 64):
        for diet in (*DIETS, *WATCHING):
            kernels = Kernels(one)
            asked = planned(plans, diet.batch(one, size))
            alone = StepAlone(one, asked, compiled=compiled, edits=kernels.edits, taps=kernels.taps)
            cost = step_cost(alone)
            parts = (cost.begin, cost.end, cost.begin + cost.end)
            rows.append((str(size), diet.name, *map(micro, parts)))
    head = ("batch", "diet", "before, µs", "after, µs", "both, µs")
    Table(f"Python around a decode step in kernels: {shape}", head, rows).show(Console())


if __name__ == "__main__":
    typer.run(main)
