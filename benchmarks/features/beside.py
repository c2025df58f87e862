"""A feature, several features, a vector, and words, told the same at the same KL, beside chance.

    python -m benchmarks.features.beside

The features are those that `steer sae suggest` finds on some questions; all are judged on others.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from benchmarks.features.ground import (
    CONCEPTS,
    Asked,
    Place,
    arguments,
    asked_place,
    ground_of,
    questions,
    told_score,
)
from steer.engines.base import Engine
from steer.fit.features.effect import raising
from steer.fit.features.suggesting import SuggestOptions, suggest
from steer.fit.features.suggestion import SuggestedFeature
from steer.fit.make.obedience import said_kl
from steer.fit.measure.answers import mean
from steer.fit.measure.nulls.comparison import p_value, values
from steer.fit.measure.nulls.matching import PlanAt, matched_strengths

TOGETHER = 4


def main() -> None:
    parser = arguments(__doc__ or "", "beside")
    parser.add_argument("--kl", type=float, default=0.3, help="nats of every row but the words'")
    parser.add_argument("--nulls", type=int, default=8, help="of each of two kinds")
    given = parser.parse_args()
    print("| concept | by | KL | score | sound | p | an answer |\n|---|---|---|---|---|---|---|")
    with asked_place(given) as place:
        for told in CONCEPTS:
            show(place, Asked.of(place.engine, told), given.kl, given.nulls)


def show(place: Place, asked: Asked, kl: float, nulls: int) -> None:
    """The rows of a concept."""
    told = asked.told
    found = suggest(
        place.engine,
        place.sae,
        place.name,
        questions()[0],
        SuggestOptions(told.instruction, told.opposite, place="after", kl=kl, nulls=2),
    ).features
    ground = ground_of(place, asked.plain[:8], kl, nulls)
    best = list(dict.fromkeys(one.feature for one in found))[:TOGETHER]
    ways: dict[str, PlanAt] = {
        f"the vector `{told.name}`": _vector(place, told.name),
        f"feature {best[0]}": ground.plan_at(best[0]),
        f"features {', '.join(map(str, best))}": _together(place, best),
    }
    chance = place.chance(ground, best)
    plans = [*ways.values(), *chance]
    length = float(place.sae.writes(best[:1]).norm())
    starts = [0.15, *[ground.start(length)] * (len(ways) - 1), *[ground.start(1.0)] * len(chance)]
    matches = matched_strengths(ground.references, plans, [kl] * len(plans), start=starts)
    answers = asked.answers([at(match.strength) for at, match in zip(plans, matches, strict=True)])
    drawn = [mean(values(one)) for one in answers[len(ways) :]]
    _row(told.name, "unsteered", "", asked.plain, "")
    _row(told.name, "words", f"{_words_kl(place.engine, asked):.2f}", asked.in_words, "")
    for name, match, said in zip(ways, matches, answers, strict=False):
        p = p_value(mean(values(said)), drawn)
        _row(told.name, name, f"{match.kl:.2f}", said, f"{p:.2f}")
    print(
        f"| {told.name} | chance, {len(drawn)} directions | {kl} | {fmean(drawn):.2f} (highest "
        f"{max(drawn):.2f}) | {_sound(answers[len(ways) :]):.2f} | | |",
        flush=True,
    )
    _show_suggested(found)


def _show_suggested(found: Sequence[SuggestedFeature]) -> None:
    told = "; ".join(
        f"{one.feature} tells {one.auroc:.2f}, does {one.gain:+.2f} (p {one.p})" for one in found
    )
    print(f"<!-- suggested: {told} -->", flush=True)


def _vector(place: Place, name: str) -> PlanAt:
    return lambda strength: place.plan({"kind": "add", "vector": name, "strength": strength})


def _together(place: Place, features: list[int]) -> PlanAt:
    def at(value: float) -> object:
        items = raising(place.name, features, value)["interventions"]
        return place.plan(*items)  # type: ignore[misc]

    return at  # type: ignore[return-value]


def _words_kl(engine: Engine, asked: Asked) -> float:
    return said_kl(engine, asked.talk.asked(asked.held_out), asked.plain)


def _sound(answers: Sequence[Sequence[object]]) -> float:
    every = [one for said in answers for one in said]
    return fmean(bool(one.score.valid) for one in every)  # type: ignore[attr-defined]


def _row(concept: str, by: str, kl: str, said: Sequence[object], p: str) -> None:
    text = said[0].text[:90].replace("\n", " ").replace("|", "\\|")  # type: ignore[attr-defined]
    print(f"| {concept} | {by} | {kl} | {told_score(said)} | {p} | {text} |", flush=True)  # type: ignore[arg-type]


if __name__ == "__main__":
    main()
