"""What a token's direction does: a model made to say it, kept from it, or from one to the other.

Facts that the model answers itself. Each condition edits every token of the prompt on the given
layers, and the next token is read. A random direction stands beside each added one at the strength
that moves the next-token distributions as far (mean KL), random tokens beside each exchanged one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.inspection.facts import CAPITAL, COUNTRIES, answered, first_token, prompts
from benchmarks.inspection.readings import Tokens
from steer.artefacts.control_vector import ControlVector
from steer.artefacts.lens import Lens
from steer.artefacts.library import MemoryLibrary
from steer.engines.base import CaptureRequest, Engine
from steer.engines.plans import plans_of
from steer.plan.cache import PlanCache
from steer.readouts.measures import kl_divergence
from steer.spec import parse_spec

MODES = ("move", "one_way")
_DOUBLINGS, _HALVINGS = 4, 6


class Fact(NamedTuple):
    """A prompt, the token the model answers it with, another fact's answer, and a random token."""

    prompt: Tokens
    answer: int
    other: int
    random: int


class Row(NamedTuple):
    """A condition: shares of facts, and means over them."""

    condition: str
    layers: str
    strength: str
    kl: float
    says_target: float
    says_answer: float
    target_chance: float
    answer_chance: float


def known_facts(engine: Engine, most: int) -> list[Fact]:
    """Capitals that the model knows, each beside the answer of the next such fact."""
    names = [one.name for one in COUNTRIES]
    capitals = [one.capital for one in COUNTRIES]
    knows = answered(engine, CAPITAL, names, capitals)
    known = [
        pair for pair, yes in zip(zip(names, capitals, strict=True), knows, strict=True) if yes
    ]
    known = known[:most]
    answers = [first_token(engine, capital) for _, capital in known]
    asked = prompts(engine, CAPITAL, [name for name, _ in known])
    draw = torch.Generator().manual_seed(0)
    drawn = torch.randint(engine.info.vocab_size, (len(known),), generator=draw).tolist()
    others = [
        next(answers[(n + step) % len(answers)] for step in range(1, len(answers))
             if answers[(n + step) % len(answers)] != answers[n])
        for n in range(len(answers))
    ]  # fmt: skip
    return [Fact(*one) for one in zip(asked, answers, others, drawn, strict=True)]


class Bench:
    """The facts, read under specs that differ from fact to fact."""

    def __init__(self, engine: Engine, facts: Sequence[Fact], lenses: dict[str, Lens]) -> None:
        self._engine, self.facts = engine, facts
        draw = torch.Generator().manual_seed(1)
        width, last = engine.info.d_model, engine.info.n_layers - 1
        vectors = {
            f"random-{n}": ControlVector.of({last: torch.randn(width, generator=draw)})
            for n in range(len(facts))
        }
        self._plans: PlanCache = plans_of(engine, MemoryLibrary(vectors, lenses=lenses), size=1)
        self._plain = self._read([None] * len(facts))

    def row(
        self, condition: str, layers: Sequence[int], strength: str, items: list[dict[str, Any]],
        targets: Sequence[int] | None = None,
    ) -> Row:  # fmt: skip
        """What becomes of the facts under one intervention each; `targets` default to their other
        answers."""
        logits = self._read(items)
        said, chances = logits.argmax(-1), logits.double().softmax(-1)
        target = torch.tensor(targets or [one.other for one in self.facts])
        answer = torch.tensor([one.answer for one in self.facts])
        where = ",".join(map(str, layers)) if len(layers) < 4 else f"{layers[0]}-{layers[-1]}"
        return Row(
            condition,
            where,
            strength,
            self._kl(logits),
            float((said == target).double().mean()),
            float((said == answer).double().mean()),
            float(chances.gather(1, target[:, None]).mean()),
            float(chances.gather(1, answer[:, None]).mean()),
        )

    def matched(self, item: Callable[[int, float], dict[str, Any]], kl: float) -> float:
        """The strength at which `item(fact, strength)` has this mean KL, by halving; infinity
        where none has."""

        def reached(strength: float) -> bool:
            logits = self._read([item(n, strength) for n in range(len(self.facts))])
            return self._kl(logits) >= kl

        low, high = 0.0, 0.2
        for _ in range(_DOUBLINGS):
            if reached(high):
                break
            low, high = high, 2 * high
        else:
            return math.inf
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            low, high = (low, middle) if reached(middle) else (middle, high)
        return (low + high) / 2

    def _read(self, items: Sequence[dict[str, Any] | None]) -> Tensor:
        plans = [
            None if one is None else self._plans.plan(parse_spec({"interventions": [one]}))
            for one in items
        ]
        request = CaptureRequest([one.prompt for one in self.facts], plans=plans, logits="last")
        found = []
        for captured in self._engine.capture(request):
            assert captured.logits is not None
            found.append(captured.logits[-1])
        return torch.stack(found)

    def _kl(self, logits: Tensor) -> float:
        return float(kl_divergence(logits, self._plain).mean())


def measure(
    engine: Engine,
    lenses: dict[str, Lens | None],
    layers: Sequence[int],
    shares: Sequence[float],
    most: int,
) -> tuple[int, list[Row]]:
    """How many facts are known, and a row for each condition, layer and lens."""
    facts = known_facts(engine, most)
    bench = Bench(engine, facts, {name: one for name, one in lenses.items() if one is not None})
    every = range(len(facts))
    last = engine.info.n_layers - 1
    rows = [bench.row("unsteered", (), "", [_nothing() for _ in every])]
    for layer in layers:
        for name, lens in lenses.items() if shares else ():
            rows += _added(bench, name, lens, layer, shares)
        for name, lens in lenses.items():
            for chosen in ((layer,), tuple(range(layer, last))):
                rows += _taken_and_exchanged(bench, name, lens, chosen)
    return len(facts), rows


def _nothing() -> dict[str, Any]:
    return {"kind": "add", "vector": {"token": 0}, "strength": 0, "layers": [0]}


def _token(number: int, name: str, lens: Lens | None) -> dict[str, Any]:
    return {"token": number} if lens is None else {"token": number, "lens": name}


def _added(
    bench: Bench, name: str, lens: Lens | None, layer: int, shares: Sequence[float]
) -> list[Row]:
    """The other fact's answer added, beside random directions of the same mean KL."""
    rows = []

    def random(number: int, strength: float) -> dict[str, Any]:
        return _add(f"random-{number}", strength, layer)

    for share in shares:
        items = [_add(_token(one.other, name, lens), share, layer) for one in bench.facts]
        rows.append(bench.row(f"add, {name}", (layer,), f"{share:g}", items))
        same = bench.matched(random, rows[-1].kl)
        if math.isfinite(same):
            beside = [random(n, same) for n in range(len(bench.facts))]
            rows.append(bench.row("  random direction", (layer,), f"{same:.2f}", beside))
    return rows


def _add(vector: Any, share: float, layer: int) -> dict[str, Any]:
    return {"kind": "add", "vector": vector, "strength": {"norm": share}, "layers": [layer]}


def _taken_and_exchanged(
    bench: Bench, name: str, lens: Lens | None, layers: tuple[int, ...]
) -> list[Row]:
    """The answer ablated, or exchanged for the other's, beside random tokens."""
    at = {"layers": list(layers)}
    facts = bench.facts
    mine = [_token(one.answer, name, lens) for one in facts]
    theirs = [_token(one.other, name, lens) for one in facts]
    drawn = [_token(one.random, name, lens) for one in facts]
    again = [*drawn[1:], drawn[0]]

    def exchanged(
        label: str, one: list[dict[str, Any]], other: list[dict[str, Any]], mode: str,
        targets: list[int] | None = None,
    ) -> Row:  # fmt: skip
        items = [
            {"kind": "exchange", "vector": a, "toward": b, "mode": mode, **at}
            for a, b in zip(one, other, strict=True)
        ]
        return bench.row(label, layers, mode, items, targets)

    ablated = [{"kind": "ablate", "vector": one, **at} for one in mine]
    unlike = [{"kind": "ablate", "vector": one, **at} for one in drawn]
    return [
        bench.row(f"ablate the answer, {name}", layers, "1", ablated),
        bench.row("  a random token", layers, "1", unlike),
        *(exchanged(f"answer and other, {name}", mine, theirs, m) for m in MODES),
        exchanged("  answer and a random token", mine, drawn, "move", [f.random for f in facts]),
        exchanged("  two random tokens", drawn, again, "move"),
    ]
