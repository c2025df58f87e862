"""Features against a vector, against words and against chance, for one attribute.

1. The features that tell the answers of the told model from the opposed ones (`steer sae suggest`).
2. Ways to use them, and the SAE's reading of the words themselves, are tried as `steer make` tries
   vectors: sound answers, on questions that nothing was fitted on.
3. On questions that had no part in either, every way is run at the KL that was chosen, beside the
   vector at that KL, words, random features clamped alike, and directions of the states'
   covariance.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from benchmarks.saes.attribute import Attribute
from benchmarks.saes.setting import Setting, counting
from benchmarks.saes.uses import SAEPlans, Way, answered, clamp, concept, differences, like
from steer.artefacts.control_vector import ControlVector
from steer.artefacts.library import MemoryLibrary
from steer.cli.sae.tables import number
from steer.engines.plans import plans_of
from steer.fit.features.pooling import pooled_activations
from steer.fit.features.suggesting import SuggestOptions, suggest, suggest_steps
from steer.fit.features.suggestion import Suggestions
from steer.fit.make import choosing
from steer.fit.make.trials import Trial, Use, plan_of
from steer.fit.measure.answers import Answer, answers_under, marked
from steer.fit.measure.bootstrap import Interval, Resamples
from steer.fit.measure.divergence import References
from steer.fit.measure.nulls.comparison import p_value, values, wrong_way
from steer.fit.measure.nulls.directions import answer_states, null_vector
from steer.fit.measure.nulls.matching import Match, PlanAt, matched_strengths
from steer.plan.plan import SteeringPlan
from steer.spec import parse_spec

MATCHED_ANSWERS, MATCHED_TOKENS = 6, 24
TOGETHER = 8
"""Features that are clamped together: the candidates of the contrast."""
NULLS = 4
"""Directions of chance of each kind beside the candidates; there are others on what is held out."""
DIFFERENCE = ", by difference"
UNSTEERED, WORDS, SHIPPED, VECTOR = "unsteered", "in words", "vector as shipped", "vector"


@dataclass(frozen=True)
class Contestant:
    """A plan by its strength, searched from `start`; where `kl` is None, at `start` as it is."""

    name: str
    at: PlanAt
    start: float
    kl: float | None


def measure(
    setting: Setting, name: str, *, fitted: int, questions: int, tokens: int, nulls: int
) -> dict[str, Any]:
    """The figures of one attribute, which is a vector's name."""
    attribute = Attribute.of(setting, name, fitted=fitted, questions=questions, tokens=tokens)
    suggested = _suggested(setting, attribute)
    for one in suggested.features:
        print(
            f"feature {one.feature}: tells {one.held_out:.2f}, does {one.gain:+.3f} nats a token "
            f"at KL {one.kl:.2f} (chance {number(one.null)}, p {number(one.p)}, q {number(one.q)}; "
            f"words {suggested.told:+.3f}): {one.label.text if one.label else 'no label'}",
            flush=True,
        )
    states = answer_states(setting.engine, attribute.told, setting.sae.site, [setting.sae.layer])[
        setting.sae.layer
    ]
    ways = _ways(setting, attribute, [one.feature for one in suggested.features])
    plans = SAEPlans(setting.engine, setting.sae, ways, float(states.norm(dim=-1).mean()))
    choice, said_kl = _chosen(attribute, plans)
    best = choice.best
    print(
        f"chosen of {len(choice.trials)} trials: {best.use.source}, {best.use.where}, KL "
        f"{best.kl:.2f}: score {best.score:.2f}, {best.valid:.0%} sound; the words' KL "
        f"{said_kl:.2f}",
        flush=True,
    )
    rates = (setting.sae.encode(states) != 0).float().mean(0)
    rows = _held_out(setting, attribute, plans, best, rates, nulls)
    return {
        "attribute": name,
        "instruction": attribute.talk.instruction,
        "opposite": attribute.talk.opposite,
        "place": attribute.talk.place,
        "obedience": attribute.followed.area,
        "questions": len(attribute.held_out),
        "tokens": tokens,
        "words' KL": said_kl,
        "suggested": [
            {
                "feature": one.feature,
                "label": None if one.label is None else one.label.text,
                **one.model_dump(include={"auroc", "confirmed", "gain", "null", "p", "kl"}),
            }
            for one in suggested.features
        ],
        "words' gain": suggested.told,
        "chosen": best.as_json(),
        "trials": [one.as_json() for one in choice.trials],
        "rows": rows,
    }


def _suggested(setting: Setting, attribute: Attribute) -> Suggestions:
    talk = attribute.talk
    options = SuggestOptions(
        instruction=talk.instruction,
        opposite=talk.opposite,
        place=talk.place,
        candidates=TOGETHER,
        nulls=NULLS,
        max_tokens=talk.sampling.max_tokens,
        temperature=talk.sampling.temperature,
        seed=talk.sampling.seed or 0,
    )
    fitted = attribute.parts.fitted
    with counting(
        f"{attribute.name}: features", suggest_steps(len(fitted), options), "step"
    ) as bar:
        return suggest(
            setting.engine,
            setting.sae,
            setting.options.sae,
            fitted,
            options,
            labels=setting.labels,
            progress=bar.update,
        )


def _ways(setting: Setting, attribute: Attribute, features: Sequence[int]) -> dict[str, Way]:
    """What is tried; `features` are in the order of what each does alone."""
    sae, talk = setting.sae, attribute.talk
    sides = [
        pooled_activations(
            setting.engine,
            sae,
            answered(attribute.parts.fitted, [one.text for one in side]),
            "mean",
            at="response",
        )[:, list(features)]
        .toarray()
        .tolist()
        for side in (attribute.told, attribute.opposed)
    ]
    best, together = list(features[:1]), list(features)
    return {
        "best feature, add": clamp(sae, best, "add"),
        "best feature, set": clamp(sae, best, "set"),
        f"{len(together)} features, set": clamp(sae, together, "set"),
        f"{len(together)} features{DIFFERENCE}": clamp(sae, together, "add", differences(*sides)),
        "concept": concept(setting, talk.instruction),
        "concept, less the opposite": concept(setting, talk.instruction, talk.opposed.text),
    }


def _chosen(attribute: Attribute, plans: SAEPlans) -> tuple[choosing.Choice, float]:
    """The use and strength, as `steer make` chooses them; and the KL of the words."""
    talk, parts = attribute.talk, attribute.parts
    [plain] = talk.answers(parts.chosen)
    total = choosing.steps(len(plans.ways), len(parts.chosen), more=len(parts.run_off))
    with counting(f"{attribute.name}: choice", total, "step") as bar:
        ground = choosing.Ground.of(
            talk.engine,
            parts.chosen,
            talk.asked(parts.chosen),
            plain,
            attribute.followed.scorer,
            talk.sampling,
            bar.update,
        )
        uses = [plans.use(name) for name in plans.ways]
        return choosing.choose(ground, plans, uses, more=parts.run_off), ground.said_kl


def _held_out(
    setting: Setting,
    attribute: Attribute,
    plans: SAEPlans,
    best: Trial,
    rates: torch.Tensor,
    nulls: int,
) -> list[dict[str, Any]]:
    """Every contestant on the questions that are held out; the nulls' last."""
    engine, talk, asked = setting.engine, attribute.talk, attribute.held_out
    [plain] = talk.answers(asked)
    references = References(engine, plain).first(MATCHED_ANSWERS, MATCHED_TOKENS)
    where, kl = best.use.where, best.kl
    contestants = [
        *_vector(setting, attribute, kl),
        *(
            Contestant(name, partial(plans.plan, use), plans.likely_strength(use, kl), kl)
            for name, use in ((name, plans.use(name, where)) for name in plans.ways)
        ),
        *_chance(setting, plans, best, plain, rates, nulls),
    ]
    told = [talk.told(one) for one in asked]
    with counting(f"{attribute.name}: held out", len(contestants), "contestant") as bar:
        matches = _matched(references, contestants, bar.update)
    steered = [one.at(match.strength) for one, match in zip(contestants, matches, strict=True)]
    with counting(f"{attribute.name}: answers", (2 + len(steered)) * len(asked), "answer") as bar:
        everything = answers_under(
            engine,
            [asked, told, *[asked] * len(steered)],
            [None, None, *steered],
            sampling=talk.sampling,
            progress=bar.update,
        )
    said = marked(engine, attribute.followed.scorer, everything)
    names = [UNSTEERED, WORDS, *(one.name for one in contestants)]
    none = [None, None]
    return table(names, [*none, *matches], said, by_chance=2 * nulls)


def table(
    names: Sequence[str],
    matches: Sequence[Match | None],
    said: Sequence[Sequence[Answer]],
    *,
    by_chance: int,
) -> list[dict[str, Any]]:
    """A row for each contestant: score and share of sound answers with intervals over questions,
    the score's difference to the unsteered and to the vector's at the same KL, and p: the chance of
    one of the last `by_chance` rows that scores as much."""
    draws = Resamples.draw(len(said[0]))
    scores = [values(one) for one in said]
    means = [draws.mean(one).value for one in scores]
    chance = means[len(means) - by_chance :] if by_chance else []
    vector = scores[names.index(VECTOR)]
    rows = []
    for n, (name, match) in enumerate(zip(names, matches, strict=True)):
        own = name not in (UNSTEERED, WORDS, SHIPPED) and n < len(names) - by_chance
        rows.append(
            {
                "name": name,
                "strength": None if match is None else match.strength,
                "kl": None if match is None else match.kl,
                "reached": None if match is None else match.reached,
                "score": draws.mean(scores[n]),
                "valid": draws.mean([float(bool(one.score.valid)) for one in said[n]]),
                "wrong way": wrong_way(draws, scores[0], scores[n]),
                "over unsteered": draws.difference(scores[n], scores[0]),
                "over vector": draws.difference(scores[n], vector),
                "p": p_value(means[n], chance) if own and chance else None,
                "example": said[n][0].text,
            }
        )
    return rows


def _vector(setting: Setting, attribute: Attribute, kl: float) -> list[Contestant]:
    """The vector with its card's use, at its own strength and at the KL of the SAE's best."""
    vector = attribute.vector
    card = vector.card

    def at(strength: float) -> SteeringPlan:
        item = {"kind": "add", "vector": "made", "strength": strength}
        plans = plans_of(setting.engine, MemoryLibrary({"made": vector}))
        return plans.plan(parse_spec({"interventions": [item]}))

    own = card.default_strength
    return [Contestant(SHIPPED, at, own, None), Contestant(VECTOR, at, own, kl)]


def _chance(
    setting: Setting,
    plans: SAEPlans,
    best: Trial,
    plain: Sequence[Answer],
    rates: torch.Tensor,
    nulls: int,
) -> list[Contestant]:
    """Random features in the place of those of the best use (of all, where it clamps none), clamped
    alike; and directions of the states' covariance."""
    sae, kl = setting.sae, best.kl
    pattern = _clamped(plans, best)
    features: list[int] = pattern["features"]
    sets = like(features, rates, sae.writes(), nulls, setting.options.seed)
    ways = {
        f"random features {n}": clamp(sae, drawn, pattern["mode"], pattern["value"])
        for n, drawn in enumerate(sets)
    }
    drawn = SAEPlans(plans.engine, sae, ways, plans.mean_norm)
    found = [
        Contestant(
            name,
            partial(drawn.plan, drawn.use(name, best.use.where)),
            drawn.likely_strength(drawn.use(name), kl),
            kl,
        )
        for name in ways
    ]
    point = sae.write_point
    states = answer_states(setting.engine, plain, point.site, [point.layer])
    unit = torch.zeros(states[point.layer].shape[1])
    unit[0] = 1.0
    model = ControlVector.of({point.layer: unit}, site=point.site)
    for n in range(nulls):
        vector = null_vector(model, "covariance", seed=n, states=states).vector
        use = Use("null", (point.layer,), best.use.where)
        found.append(
            Contestant(
                f"covariance {n}",
                partial(plan_of, setting.engine, vector, use),
                0.47 * kl**0.5 * plans.mean_norm,
                kl,
            )
        )
    return found


def _clamped(plans: SAEPlans, best: Trial) -> dict[str, Any]:
    """The clamp at strength 1 whose features chance takes the place of."""
    item = plans.ways[best.use.source].item(1.0)
    if item["kind"] == "clamp":
        return item
    [several] = [way.item(1.0) for name, way in plans.ways.items() if name.endswith(DIFFERENCE)]
    return several


def _matched(
    references: References, contestants: Sequence[Contestant], progress: Any
) -> list[Match]:
    """All that are wanted at a KL together; the others as they are."""
    wanted = [one for one in contestants if one.kl is not None]
    found = iter(
        matched_strengths(
            references,
            [one.at for one in wanted],
            [one.kl or 0.0 for one in wanted],
            start=[one.start for one in wanted],
            progress=progress,
        )
    )
    as_is = [one for one in contestants if one.kl is None]
    nats = iter(references.divergences([one.at(one.start) for one in as_is]).mean(1).tolist())
    return [
        Match(one.start, next(nats), 1, reached=True) if one.kl is None else next(found)
        for one in contestants
    ]


HEADINGS = ("", "KL", "score", "sound", "wrong way", "over the vector at this KL", "p", "an answer")


def lines(found: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """The rows of the table; chance as its mean and highest of each kind."""
    rows = [one for one in found["rows"] if not _by_chance(one["name"])]
    shown = [_line(one) for one in rows]
    for kind in ("random features", "covariance"):
        scores = [one["score"].value for one in found["rows"] if one["name"].startswith(kind)]
        if scores:
            mean = sum(scores) / len(scores)
            shown.append((kind, "", f"{mean:.2f} (highest {max(scores):.2f})", *[""] * 5))
    return shown


def _by_chance(name: str) -> bool:
    return name.startswith(("random features", "covariance"))


def _line(one: Mapping[str, Any]) -> tuple[str, ...]:
    kl = "" if one["kl"] is None else f"{one['kl']:.2f}{'' if one['reached'] else ' (nearest)'}"
    score: Interval = one["score"]
    return (
        one["name"],
        kl,
        str(score),
        f"{one['valid'].value:.2f}",
        f"{one['wrong way'].value:.2f}",
        str(one["over vector"]),
        "" if one["p"] is None else f"{one['p']:.2g}",
        one["example"][:60].replace("\n", " "),
    )
