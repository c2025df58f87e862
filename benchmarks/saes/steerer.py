"""Concept Steerers' check (2501.19066): does an attribute's rate follow the strength of its text,
and do the rates of other attributes stay?

The aims: |Spearman(rate, strength)| ≥ .9, and other attributes move by at most 10 points.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from scipy.stats import spearmanr

from benchmarks.saes.attribute import SCALED_ON, Attribute
from benchmarks.saes.setting import Setting, counting
from benchmarks.saes.uses import SAEPlans, concept
from steer.fit.measure.answers import Answer, answers_under, marked
from steer.fit.measure.bootstrap import Resamples
from steer.fit.measure.divergence import References
from steer.fit.measure.nulls.comparison import values
from steer.fit.measure.nulls.directions import answer_states
from steer.fit.measure.nulls.matching import matched_strengths

DOSES = 6
HAS = 0.5
"""The score from which an answer has the attribute: two deviations above unsteered answers."""
RANK, MOVES = 0.9, 0.1
MATCHED_ANSWERS, MATCHED_TOKENS = 6, 24


def measure(
    setting: Setting, names: Sequence[str], *, questions: int, tokens: int, kl: float
) -> dict[str, Any]:
    """The rates of every attribute under the text of each, and under it less its opposite, at
    strengths in equal steps from 0 up to that whose KL is `kl`."""
    engine, sae = setting.engine, setting.sae
    attributes = [
        Attribute.of(setting, one, fitted=SCALED_ON, questions=questions, tokens=tokens)
        for one in names
    ]
    first = attributes[0]
    asked, sampling = first.held_out, first.talk.sampling
    [plain] = first.talk.answers(asked)
    references = References(engine, plain).first(MATCHED_ANSWERS, MATCHED_TOKENS)
    states = answer_states(engine, plain, sae.site, [sae.layer])[sae.layer]
    ways = {}
    for one in attributes:
        ways[f"{one.name}: text"] = concept(setting, one.talk.instruction)
        ways[f"{one.name}: text less its opposite"] = concept(
            setting, one.talk.instruction, one.talk.opposed.text
        )
    plans = SAEPlans(engine, sae, ways, float(states.norm(dim=-1).mean()))
    uses = [plans.use(name) for name in ways]
    with counting("strengths", len(uses), "text") as bar:
        tops = matched_strengths(
            references,
            [partial(plans.plan, use) for use in uses],
            [kl] * len(uses),
            start=[plans.likely_strength(use, kl) for use in uses],
            progress=bar.update,
        )
    steered = [
        plans.plan(use, top.strength * n / DOSES)
        for use, top in zip(uses, tops, strict=True)
        for n in range(1, DOSES + 1)
    ]
    with counting("answers", len(steered) * len(asked), "answer") as bar:
        said = answers_under(
            engine, [asked] * len(steered), steered, sampling=sampling, progress=bar.update
        )
    doses = references.divergences(steered).mean(1).tolist()
    scored = {one.name: marked(engine, one.followed.scorer, [plain, *said]) for one in attributes}
    found = []
    for place, (name, top) in enumerate(zip(ways, tops, strict=True)):
        mine = slice(1 + place * DOSES, 1 + (place + 1) * DOSES)
        rows = {other: [each[0], *each[mine]] for other, each in scored.items()}
        own = name.partition(":")[0]
        found.append(
            {
                "text": name,
                "strengths": [top.strength * n / DOSES for n in range(DOSES + 1)],
                "kl": [0.0, *doses[mine.start - 1 : mine.stop - 1]],
                "reached": top.reached,
                **judged(own, rows),
                "example": rows[own][-1][0].text,
            }
        )
    return {"questions": len(asked), "tokens": tokens, "texts": found}


def judged(own: str, rows: Mapping[str, Sequence[Sequence[Answer]]]) -> dict[str, Any]:
    """From the answers at each strength, the first of them unsteered, as every attribute's scorer
    marked them: rates, Spearman's correlation of the own one with the strength, and how far each
    other moves, at most, from its unsteered rate; the same up to the last strength at which nine
    answers of ten are sound."""
    rates = {name: [_rate(one) for one in each] for name, each in rows.items()}
    means = [float(np.mean(values(one))) for one in rows[own]]
    sound = [float(np.mean([bool(answer.score.valid) for answer in one])) for one in rows[own]]
    last = next((n for n, share in enumerate(sound) if share < 0.9), len(sound))
    others = {name: one for name, one in rates.items() if name != own}
    draws = Resamples.draw(len(rows[own][0]))
    return {
        "rates": rates,
        "score": means,
        "sound": sound,
        "spearman": spearman(rates[own]),
        "spearman of score": spearman(means),
        "rise": draws.difference(_has(rows[own][-1]), _has(rows[own][0])),
        "others move": {name: moves(one) for name, one in others.items()},
        "others move where sound": {name: moves(one[:last]) for name, one in others.items()},
        "met": {
            "spearman": abs(spearman(rates[own])) >= RANK,
            "others": all(moves(one) <= MOVES + 1e-9 for one in others.values()),
        },
    }


def spearman(rates: Sequence[float]) -> float:
    """The rank correlation of what was measured at rising strengths with the strength; 0 where
    nothing differs."""
    if len(set(rates)) < 2:
        return 0.0
    return float(spearmanr(range(len(rates)), rates).statistic)


def moves(rates: Sequence[float]) -> float:
    """The farthest that a rate is from the first."""
    return max((abs(one - rates[0]) for one in rates), default=0.0)


def _has(answers: Sequence[Answer]) -> list[float]:
    return [float(one >= HAS) for one in values(answers)]


def _rate(answers: Sequence[Answer]) -> float:
    return float(np.mean(_has(answers)))


HEADINGS = ("text", "own rate by strength", "sound", "Spearman", "others move", "where sound")


def lines(found: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """The rows of the table; rates in points."""
    return [
        (
            one["text"],
            " ".join(f"{100 * rate:.0f}" for rate in one["rates"][one["text"].partition(":")[0]]),
            " ".join(f"{share:.2f}" for share in one["sound"]),
            f"{one['spearman']:.2f} (score {one['spearman of score']:.2f})",
            _points(one["others move"]),
            _points(one["others move where sound"]),
        )
        for one in found["texts"]
    ]


def _points(moved: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {100 * most:.0f}" for name, most in moved.items())
