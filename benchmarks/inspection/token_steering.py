"""What a token's direction does: a model made to say it, kept from it, or from one to the other.

Facts that the model answers itself. Each condition edits every token of the prompt on the given
layers, and the next token is read. Beside what is added, ablated and swapped stand random
directions at the strength that moves the next-token distributions as far (mean KL), beside what is
exchanged random tokens, and beside all of it the unsteered model and what it says when it is told.
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
from steer.prompts import text_tokens
from steer.readouts.measures import kl_divergence
from steer.spec import parse_spec

MODES = ("move", "one_way")
TOLD = "Suppose that the capital of {0} is {1}. "
FORBIDDEN = "Whatever you are asked about {0}, never say {1}. "
_DOUBLINGS, _HALVINGS = 4, 6


class Fact(NamedTuple):
    """A prompt, the token the model answers it with, another fact's answer, and a random token; the
    prompt after it was told that the other is the answer, and after it was told not to say it."""

    prompt: Tokens
    answer: int
    other: int
    random: int
    told: Tokens
    forbidden: Tokens


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
    words = {number: capital for number, (_, capital) in zip(answers, known, strict=True)}
    told, forbidden = (
        [tuple(text_tokens(engine.tokenizer, before + text)) for before, text in zip(
            (form.format(name, words[said]) for (name, _), said in zip(known, about, strict=True)),
            (CAPITAL.format(name) for name, _ in known),
            strict=True,
        )]
        for form, about in ((TOLD, others), (FORBIDDEN, answers))
    )  # fmt: skip
    columns = zip(asked, answers, others, drawn, told, forbidden, strict=True)
    return [Fact(*one) for one in columns]


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
        self, condition: str, layers: Sequence[int], strength: str,
        items: Sequence[dict[str, Any] | None], targets: Sequence[int] | None = None,
        prompts: Sequence[Tokens] | None = None,
    ) -> Row:  # fmt: skip
        """What becomes of the facts under one intervention each; `targets` default to their other
        answers, `prompts` to their own."""
        logits = self._read(items, prompts)
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

    def _read(
        self, items: Sequence[dict[str, Any] | None], prompts: Sequence[Tokens] | None = None
    ) -> Tensor:
        plans = [
            None if one is None else self._plans.plan(parse_spec({"interventions": [one]}))
            for one in items
        ]
        asked = prompts or [one.prompt for one in self.facts]
        request = CaptureRequest(asked, plans=plans, logits="last")
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
    rows = [
        bench.row("unsteered", (), "", [_nothing() for _ in every]),
        bench.row("told the other", (), "", [None for _ in every], None, [f.told for f in facts]),
        bench.row(
            "told not to say it", (), "", [None for _ in every], None, [f.forbidden for f in facts]
        ),
    ]
    for layer in layers:
        for name, lens in lenses.items() if shares else ():
            rows += _added(bench, name, lens, layer, shares)
        for name, lens in lenses.items():
            for chosen in ((layer,), tuple(range(layer, last))):
                rows += _taken_and_exchanged(bench, name, lens, chosen)
                rows += _swapped(bench, name, lens, chosen, shares)
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
    taken = bench.row(f"ablate the answer, {name}", layers, "1", ablated)
    return [
        taken,
        bench.row("  a random token", layers, "1", unlike),
        *_equally_far(bench, taken, layers, lambda n, s: _random_add(n, s, layers)),
        *(exchanged(f"answer and other, {name}", mine, theirs, m) for m in MODES),
        exchanged("  answer and a random token", mine, drawn, "move", [f.random for f in facts]),
        exchanged("  two random tokens", drawn, again, "move"),
    ]


def _swapped(
    bench: Bench, name: str, lens: Lens | None, layers: tuple[int, ...], shares: Sequence[float]
) -> list[Row]:
    """The answer swapped for the other's, beside two random directions swapped as far."""
    count = len(bench.facts)

    def random(number: int, strength: float) -> dict[str, Any]:
        return _swap(f"random-{number}", f"random-{(number + 1) % count}", strength, layers)

    rows = []
    for share in shares:
        items = [
            _swap(_token(f.answer, name, lens), _token(f.other, name, lens), share, layers)
            for f in bench.facts
        ]
        done = bench.row(f"swap answer for other, {name}", layers, f"{share:g}", items)
        rows += [done, *_equally_far(bench, done, layers, random)]
    return rows


def _swap(remove: Any, add: Any, share: float, layers: Sequence[int]) -> dict[str, Any]:
    return {
        "kind": "swap", "remove": remove, "add": add, "strength": share, "layers": list(layers)
    }  # fmt: skip


def _random_add(number: int, share: float, layers: Sequence[int]) -> dict[str, Any]:
    return {**_add(f"random-{number}", share, layers[0]), "layers": list(layers)}


def _equally_far(
    bench: Bench, row: Row, layers: Sequence[int], item: Callable[[int, float], dict[str, Any]]
) -> list[Row]:
    """Random directions at the mean KL of `row`; nothing where no strength reaches it."""
    same = bench.matched(item, row.kl)
    if not math.isfinite(same):
        return []
    beside = [item(n, same) for n in range(len(bench.facts))]
    return [bench.row("  random directions", layers, f"{same:.3f}", beside)]
