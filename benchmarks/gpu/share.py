"""What steering costs a decoder layer under CUDA graphs: without taps, with taps at which nothing
runs, and with one graph replayed for ever more specs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.cases import Case, Result, Results, lacking
from benchmarks.gpu.device import Device
from benchmarks.gpu.layer import CONTEXT, DecoderLayer, NoTap, Weights
from benchmarks.gpu.steering import Load, Steering
from benchmarks.intervals import of_rounds
from benchmarks.vllm.diets import Batch, add, all_kinds
from benchmarks.vllm.report import Table, percent
from benchmarks.vllm.shapes import Shape

PART = "layer"
PLAIN, IDLE = "no taps", "taps, nothing steered"
_TITLE = "A decoder layer under CUDA graphs (with the copy of its input): what steering adds"


@dataclass(frozen=True)
class Sizes:
    """`tokens` of a pass, `specs` that are different in it; `work` is the time that one figure is
    taken over, in seconds."""

    tokens: Sequence[int] = (1, 8, 32, 64, 128, 256, 512, 2048, 8192)
    specs: Sequence[int] = (1, 16, 64, 256)
    context: int = CONTEXT
    rounds: int = 15
    work: float = 2e-3

    @property
    def requests(self) -> int:
        return max(self.specs)


def diets(shape: Shape, count: int) -> dict[str, tuple[Batch, bool]]:
    """Specs by what they ask for, and whether constants may be added in the graph."""
    ablation = {"kind": "ablate", "layers": [shape.middle]}
    everywhere = {"phases": ["prompt", "generation"]}

    def ablate(n: int) -> dict[str, Any]:
        item = {**ablation, "vector": f"v{n % 8}", "strength": round(0.02 + 0.001 * n, 4)}
        return {"interventions": [item], "where": everywhere}

    adds: Batch = [add(n, [shape.middle]) for n in range(count)]
    return {
        "additions in the graph": (adds, True),
        "additions in the kernel": (adds, False),
        "ablations": ([ablate(n) for n in range(count)], False),
        "all kinds": (all_kinds(shape, count), False),
    }


class Shares:
    """The cases: one for each number of tokens, with everybody in turn in it."""

    def __init__(self, shape: Shape, device: Device, sizes: Sizes) -> None:
        self.shape, self.device, self.sizes = shape, device, sizes

    def cases(self) -> Iterator[Case]:
        for tokens in self.sizes.tokens:
            yield Case(f"{PART}/{tokens}", partial(self._case, tokens))

    def missing(self) -> str | None:
        return lacking("triton", "pydantic", "jaxtyping", "safetensors", "gguf")

    def table(self, found: Results) -> Table:
        """What each costs more than the layer without taps."""
        rows = [row for tokens, result in found for row in _rows(tokens, result)]
        return Table(_TITLE, ("tokens", "with", "µs a layer", "extra"), rows)

    @cached_property
    def _steering(self) -> Steering:
        sizes = self.sizes
        return Steering(self.shape, self.device, requests=sizes.requests, tokens=max(sizes.tokens))

    @cached_property
    def _layers(self) -> tuple[DecoderLayer, DecoderLayer]:
        """Without taps and with them, on the same weights."""
        shape, sizes = self.shape, self.sizes
        weights = Weights(
            shape, self.device, torch.bfloat16, requests=sizes.requests, context=sizes.context
        )
        first = 2 * shape.middle + 2  # where `resid_post` of the middle layer is
        plain = DecoderLayer(weights, self.device, shape.d_model, lambda _: NoTap())
        tapped = DecoderLayer(
            weights, self.device, shape.d_model, lambda n: self._steering.tap(first + n)
        )
        return plain, tapped

    @torch.inference_mode()
    def _case(self, tokens: int) -> Result:
        requests = min(tokens, self.sizes.requests)
        generator = torch.Generator().manual_seed(tokens)
        drawn = torch.randn(2, tokens, self.shape.d_model, generator=generator)
        halves = drawn.to(self.device.torch, torch.bfloat16)
        self._steering.idle()
        plain, tapped = (self._graph(layer, halves, requests) for layer in self._layers)
        contestants: dict[str, tuple[Callable[[], object], Callable[[], None]]] = {
            PLAIN: (lambda: None, plain),
            IDLE: (self._steering.idle, tapped),
        }
        for count in (one for one in self.sizes.specs if one <= requests):
            for name, (specs, inline) in diets(self.shape, count).items():
                plans = self._steering.plans(specs)
                load = Load([plans[n % count] for n in range(requests)], tokens // requests)
                begin = partial(self._steering.begin, load, inline=inline)
                contestants[f"{name}, {count}"] = (begin, tapped)
        return self._rounds(contestants)

    def _graph(self, layer: DecoderLayer, halves: Tensor, requests: int) -> Callable[[], None]:
        """The layer on states that are copied in: a tap must not steer what it steered before."""
        hidden, residual = (torch.empty_like(one) for one in halves)

        def work() -> None:
            hidden.copy_(halves[0])
            residual.copy_(halves[1])
            layer(hidden, residual, requests)

        return self.device.captured(work)

    def _rounds(
        self, contestants: dict[str, tuple[Callable[[], object], Callable[[], None]]]
    ) -> Result:
        """Seconds of a pass of each, round by round, after one that does not count."""
        found: dict[str, list[float]] = {name: [] for name in contestants}
        times = 1
        for number in range(self.sizes.rounds + 1):
            order = list(contestants.items())
            # Every other round runs backwards: nobody always follows the same neighbour.
            for name, (begin, replay) in order if number % 2 else reversed(order):
                begin()
                replay()  # what `begin` copied is there, and caches are as they will be
                seconds = self.device.seconds(replay, times)
                if number:
                    found[name].append(seconds)
                elif name == PLAIN:
                    times = max(1, min(200, round(self.sizes.work / max(seconds, 1e-6))))
        return {"seconds": found, "times": times}


def _rows(tokens: str, result: Result) -> Iterator[tuple[str, ...]]:
    if "tries" in result:
        yield (tokens, "", "", str(result["error"])[:80])
        return
    seconds = result["seconds"]
    for name, mine in seconds.items():
        middle = of_rounds(mine)
        spread = f"[{1e6 * middle.low:,.1f}, {1e6 * middle.high:,.1f}]"
        ratios = [a / b for a, b in zip(mine, seconds[PLAIN], strict=True)]
        extra = "" if name == PLAIN else percent([ratios])
        yield (tokens, name, f"{1e6 * middle.value:,.1f} {spread}", extra)
