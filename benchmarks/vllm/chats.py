"""64 chats of the demo model over 16 specs: against peers, and against the size of a registry."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.intervals import verdict
from benchmarks.peers import _peer_rate
from benchmarks.timing import interleaved
from benchmarks.vllm import front_end
from benchmarks.vllm.diets import Batch, add
from benchmarks.vllm.pair import Pair
from benchmarks.vllm.report import Table, micro, rate, times
from benchmarks.vllm.serving import messages
from benchmarks.vllm.shapes import Shape
from benchmarks.workload import CHATS, TOKENS
from steer.prompts import chat_tokens
from steer.registry.registry import Registry

SPECS = 16
_SPEEDUP = 25.0
NNSIGHT = (
    "nnsight's vLLM backend (0.8.1) is not in the table: its worker is a subclass of vLLM's GPU "
    "worker, which refuses a CPU ('Unsupported device type: cpu')."
)


def prompts(model: Path) -> list[list[int]]:
    """64 held-out chats as token ids."""
    from transformers import AutoTokenizer  # noqa: PLC0415

    tokenizer: Any = AutoTokenizer.from_pretrained(model)
    return [chat_tokens(tokenizer, chat) for chat in messages(CHATS)]


def against_peers(
    pair: Pair, shape: Shape, mode: str, *, model: Path, registry: Path, rounds: int
) -> Table:
    """The same additions at the same layer by Steer, by steering-vectors, and by a hook on vLLM's
    own model; the last two one chat at a time."""
    chats = prompts(model)
    specs: Batch = [add(n % SPECS, [shape.middle]) for n in range(CHATS)]
    with Registry.open(registry) as library:
        rows = [_row(library, spec, shape) for spec in specs[:SPECS]]
    job = registry.parent / "job.json"
    fields = {"model": str(model), "tokens": TOKENS, "prompts": chats, "layer": shape.middle}
    job.write_text(json.dumps({**fields, "directions": rows, "chats": CHATS}))
    texts: dict[str, list[list[int]]] = {}

    def ran(name: str, work: Callable[[], Any]) -> Callable[[], float]:
        def run() -> float:
            found, texts[name] = work()
            return -float(found)

        return run

    def batched(child: Any, wanted: Batch) -> Callable[[], Any]:
        return lambda: child.do("chats", specs=wanted, prompts=chats, tokens=TOKENS)

    steer, peer = f"Steer on vLLM, {SPECS} specs in one batch", "steering-vectors, one at a time"
    hooked = "a hook on vLLM's layer, one at a time"
    contestants = {
        "vLLM, nothing steered, no plugin": ran("plain", batched(pair.plain, [None] * CHATS)),
        steer: ran(steer, batched(pair.steer, specs)),
        peer: lambda: -_peer_rate("steering-vectors", "peers", job),
    }
    if mode == "eager":  # a hook that is added to a compiled model is never called
        order = {"rows": rows, "layer": shape.middle, "prompts": chats, "tokens": TOKENS}
        contestants[hooked] = ran(hooked, lambda: pair.plain.do("hooked", **order))
    found = interleaved(contestants, rounds=rounds, title="chats")
    lines, data = [], []
    for name, figures in found.items():
        ratios = [a / b for a, b in zip(found[steer].rates, figures.rates, strict=True)]
        aim = _SPEEDUP if name == peer else None
        judged = verdict([ratios], aim, at_least=True)
        asked = f"≥ {_SPEEDUP:g} ×" if aim else ""
        lines.append((name, rate(figures.rates), times([ratios]), asked, judged))
        data.append({"what": name, "tokens_per_second": figures.rates, "steer_is": ratios})
    remarks = []
    if mode == "eager":
        same = sum(a == b for a, b in zip(texts[steer], texts[hooked], strict=True))
        remarks = [f"Steer and the hook chose the same tokens in {same} of {CHATS} chats.", NNSIGHT]
    title = f"{CHATS} chats × {TOKENS} tokens: {shape.name}, {mode}"
    return Table(title, ("", "tokens/s", "Steer is faster by", "aim", ""), lines, data, remarks)


def against_registry(
    pair: Pair, shape: Shape, mode: str, *, model: Path, folder: Path,
    sizes: Sequence[int], rounds: int,
) -> Table:  # fmt: skip
    """Front-end work and throughput with more and more registered vectors."""
    chats = prompts(model)
    places = {names: folder / f"registry-{names}" for names in sizes}
    fronts = {n: front_end.measure(place, shape, n, rounds) for n, place in places.items()}

    def job(names: int) -> Callable[[], float]:
        specs = [front_end.spec(shape, names, n) for n in range(CHATS)]
        order = {"specs": specs, "prompts": chats, "tokens": TOKENS, "registry": str(places[names])}
        return lambda: -float(pair.steer.do("chats", **order)[0])

    found = interleaved({str(n): job(n) for n in sizes}, rounds=rounds, title="registry")
    first = found[str(sizes[0])]
    rows, data = [], []
    for names, front in fronts.items():
        rates = found[str(names)].rates
        ratios = [a / b for a, b in zip(rates, first.rates, strict=True)]
        rows.append(
            (
                f"{names:,}",
                micro(front.known),
                micro(front.new),
                f"{1e3 * front.register:.1f}",
                rate(rates),
                times([ratios]),
            )
        )
        data.append({"names": names, **vars(front), "tokens_per_second": rates})
    head = ("vectors", "known spec, µs", "new spec, µs", "to register one, ms", "tokens/s")
    title = f"Registered vectors, {CHATS} specs in a batch: {shape.name}, {mode}"
    return Table(title, (*head, "against the first row"), rows, data)


def _row(library: Registry, spec: Any, shape: Shape) -> list[float]:
    item = spec["interventions"][0]
    row: list[float] = (item["strength"] * library.vector(item["vector"])[shape.middle]).tolist()
    return row
