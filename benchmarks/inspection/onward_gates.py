"""What a gate that stays open does beside one that each token opens for itself.

On the demo model: a detector of French, Fisher's direction between the answer tokens of questions
that are answered in French and in English, gates an addition of German to what is generated. It is
tried on other questions, with two thresholds: one that lets a share of English tokens through, one
that lets a share of English answers through. Beside it random directions that fire on as many of
the first answers' tokens, no gate, and no steering.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from benchmarks.inspection.readings import Tokens
from steer.artefacts.control_vector import ControlVector
from steer.artefacts.detector import Detector
from steer.artefacts.library import MemoryLibrary
from steer.engines.base import CaptureRequest, Completion, Engine, GenerationRequest, SamplingParams
from steer.engines.plans import plans_of
from steer.fit.data.pairs import read_pairs
from steer.model import HookPoint
from steer.plan.plan import SteeringPlan
from steer.prompts import Prompt, answer_text, render
from steer.spec import parse_spec

COUNT, TOKENS, RANDOM = 60, 16, 5
READ, WRITTEN = 1, 2
TOKEN_RATE, ANSWER_RATE = 0.01, 0.05
RIDGE = 1e-3
"""Of the mean variance, added to the covariance that Fisher's direction divides by."""
_WORD = re.compile(r"\w+")


class Row(NamedTuple):
    """A gate: shares of answers that are another text than unsteered ones, and of those with a
    word that only German answers have, for both kinds of question; tokens that were steered."""

    gate: str
    french_changed: str
    french_german: str
    english_changed: str
    english_german: str
    steered: str


class Opening(NamedTuple):
    """Where a gate opens in texts that go over from English to French, of how many."""

    gate: str
    before: str
    first: str
    next_two: str
    later: str
    never: str


class Asked(NamedTuple):
    """Prompts and what the model answers, unsteered and greedily."""

    prompts: list[Tokens]
    answers: list[Tokens]


def measure(engine: Engine, data: Path, german: ControlVector) -> tuple[list[Row], list[Opening]]:
    """All gates; `data` is the demo model's folder of pairs, `german` what is added."""
    pairs = read_pairs(data / "french.jsonl").items[: 2 * COUNT]
    french, english = (_asked(engine, [getattr(one, side) for one in pairs])
                       for side in ("positive", "negative"))  # fmt: skip
    half = slice(0, COUNT)
    spoken = _asked(engine, [_in_german(one.positive) for one in pairs[half]])
    words = _only(engine, spoken.answers, [*french.answers[half], *english.answers[half]])
    states = [_answer_states(engine, one, half) for one in (french, english)]
    fisher = _fisher(*map(torch.cat, states))
    scores = [[one @ fisher for one in side] for side in states]
    by_token = _quantile(torch.cat(scores[1]), TOKEN_RATE)
    by_answer = _quantile(torch.stack([one.max() for one in scores[1]]), ANSWER_RATE)
    every = torch.cat([*states[0], *states[1]])
    fires = float((every @ fisher > by_token).double().mean())
    drawn = torch.Generator().manual_seed(0)
    rows = [torch.randn(len(fisher), generator=drawn) for _ in range(RANDOM)]
    detectors = {
        "french": _detector(fisher, by_token),
        "whole": _detector(fisher, by_answer),
        **{f"random-{n}": _detector(r, _quantile(every @ r, fires)) for n, r in enumerate(rows)},
    }
    bench = _Bench(engine, detectors, german, words, (_rest(french), _rest(english)))
    share = f"random directions, {RANDOM} that fire on as many ({fires:.2f})"
    table = [
        bench.row("unsteered", None),
        bench.row("none (always)", {}),
        bench.row("token", {"detector": "french", "scope": "token"}),
        bench.row("onward", {"detector": "french", "scope": "onward"}),
        bench.row("token, threshold by answers", {"detector": "whole", "scope": "token"}),
        bench.row("onward, threshold by answers", {"detector": "whole", "scope": "onward"}),
        bench.spread(
            f"onward, {share}",
            [{"detector": f"random-{n}", "scope": "onward"} for n in range(RANDOM)],
        ),
    ]
    return table, [bench.opening(name) for name in detectors]


class _Bench:
    """The questions that no detector has seen, under gates."""

    def __init__(
        self,
        engine: Engine,
        detectors: dict[str, Detector],
        german: ControlVector,
        words: frozenset[str],
        asked: tuple[Asked, Asked],
    ) -> None:
        self._engine, self._detectors, self._words, self._asked = engine, detectors, words, asked
        library = MemoryLibrary({"german": german}, detectors=detectors)
        self._plans = plans_of(engine, library, size=16)

    def row(self, name: str, when: dict[str, Any] | None) -> Row:
        """`when` is the gate; {} none, None no steering."""
        found = self._run(when)
        return Row._make((name, *(f"{one:.2f}" for one in found[:4]), f"{found[4]:,.0f}"))

    def spread(self, name: str, gates: Sequence[dict[str, Any]]) -> Row:
        """Mean, least and greatest over `gates`."""
        found = list(zip(*map(self._run, gates), strict=True))
        means = [sum(one) / len(one) for one in found]
        shares = [
            f"{mean:.2f} [{min(one):.2f}, {max(one):.2f}]"
            for mean, one in zip(means[:4], found[:4], strict=True)
        ]
        return Row._make((name, *shares, f"{means[4]:,.0f}"))

    def _run(self, when: dict[str, Any] | None) -> tuple[float, float, float, float, float]:
        plan = None if when is None else self._plan(when)
        shares: list[float] = []
        steered = 0
        for side in self._asked:
            done = _answered(self._engine, side.prompts, plan)
            said = [one.tokens for one in done]
            shares.append(_mean(a != b for a, b in zip(said, side.answers, strict=True)))
            shares.append(_mean(bool(_words(self._engine, one) & self._words) for one in said))
            steered += sum(one.receipt.tokens_steered for one in done if one.receipt is not None)
        return shares[0], shares[1], shares[2], shares[3], float(steered)

    def _plan(self, when: dict[str, Any]) -> SteeringPlan:
        item: dict[str, Any] = {
            "kind": "add", "vector": "german", "strength": 1.0, "layers": [WRITTEN],
            "where": {"phases": ["generation"]},
        }  # fmt: skip
        gated = {**item, "when": when} if when else item
        return self._plans.plan(parse_spec({"interventions": [gated]}))

    def opening(self, name: str) -> Opening:
        """Where the detector fires first in an English answer with the French one behind it."""
        detector, (french, english) = self._detectors[name], self._asked
        counts = dict.fromkeys(Opening._fields[1:], 0)
        for prompt, before, after in zip(
            english.prompts, english.answers, french.answers, strict=True
        ):
            [states] = _states(self._engine, [(*prompt, *before, *after)], [len(prompt)])
            above = (detector.scores(states) > detector.threshold).nonzero().flatten().tolist()
            counts[_place(above[0] - len(before) if above else None)] += 1
        return Opening(name, *(str(one) for one in counts.values()))


def _place(first: int | None) -> str:
    """The column of a first token at this distance from the first French one."""
    if first is None:
        return "never"
    if first <= 0:
        return "before" if first < 0 else "first"
    return "next_two" if first <= 2 else "later"


def _asked(engine: Engine, chats: Sequence[Prompt]) -> Asked:
    prompts = [tuple(render(engine.tokenizer, one)) for one in chats]
    return Asked(prompts, [one.tokens for one in _answered(engine, prompts, None)])


def _in_german(chat: Prompt) -> Prompt:
    """The chat that asks for French, asking for German."""
    assert isinstance(chat, Sequence), "a chat is a list of messages"
    said = [dict(one) for one in chat if not isinstance(one, str)]
    return [{**one, "content": one["content"].replace("French", "German")} for one in said]


def _answered(
    engine: Engine, prompts: Sequence[Tokens], plan: SteeringPlan | None
) -> list[Completion]:
    sampling = SamplingParams(max_tokens=TOKENS, temperature=0.0)
    return engine.complete(
        [
            GenerationRequest(f"onward-{n}", prompt, sampling, plan=plan)
            for n, prompt in enumerate(prompts)
        ]
    )


def _rest(asked: Asked) -> Asked:
    return Asked(asked.prompts[COUNT:], asked.answers[COUNT:])


def _answer_states(
    engine: Engine, asked: Asked, part: slice
) -> list[Float[Tensor, "tokens d_model"]]:
    prompts, answers = asked.prompts[part], asked.answers[part]
    whole = [(*a, *b) for a, b in zip(prompts, answers, strict=True)]
    return _states(engine, whole, [len(one) for one in prompts])


def _states(
    engine: Engine, texts: Sequence[Tokens], starts: Sequence[int]
) -> list[Float[Tensor, "tokens d_model"]]:
    """Of each text those of its tokens from `starts` on."""
    point = HookPoint(READ)
    found = engine.capture(CaptureRequest(texts, (point,)))
    return [one.states[point][start:].float() for one, start in zip(found, starts, strict=True)]


def _fisher(
    having: Float[Tensor, "n d_model"], lacking: Float[Tensor, "m d_model"]
) -> Float[Tensor, " d_model"]:
    """S⁻¹(μ₁ − μ₀), S being the covariance within both."""
    sides = [having.double(), lacking.double()]
    within = torch.cat([one - one.mean(0) for one in sides])
    spread = within.T @ within / len(within)
    spread += RIDGE * spread.diagonal().mean() * torch.eye(len(spread), dtype=spread.dtype)
    found: Tensor = torch.linalg.solve(spread, sides[0].mean(0) - sides[1].mean(0))
    return found.div(found.norm()).float()


def _quantile(values: Tensor, rate: float) -> float:
    """The value that the share `rate` of `values` exceeds."""
    return float(values.double().quantile(1 - rate))


def _detector(direction: Tensor, threshold: float) -> Detector:
    return Detector.of(direction, layer=READ, threshold=threshold)


def _words(engine: Engine, tokens: Tokens) -> frozenset[str]:
    return frozenset(_WORD.findall(answer_text(engine.tokenizer, tokens).lower()))


def _only(engine: Engine, having: Sequence[Tokens], lacking: Sequence[Tokens]) -> frozenset[str]:
    """Words of the first answers that none of the others has."""
    mine, others = (
        frozenset(word for one in answers for word in _words(engine, one))
        for answers in (having, lacking)
    )
    return mine - others


def _mean(values: Any) -> float:
    found = [float(one) for one in values]
    return sum(found) / len(found)
