"""Does a feature cause, or only detect? What raising it does to what the model says next.

A feature is raised, on the tokens of unsteered answers to neutral questions, until the next-token
distributions have moved by a given mean KL. Any direction that moves them so far promotes some
tokens. So what a feature does to *its* tokens is held against directions that know nothing of it,
each at the same KL:

- `decoder`: other features of the same SAE, drawn at random;
- `covariance`: random combinations of the states' differences from their mean (2608.24335).

Its tokens are those that its decoder row points to (logit lens), and those on which the survey saw
it fire, with those that followed. Of a feature that detects and does not cause, the latter rise no
more than by chance (input and output features: 2501.08319, 2505.20063).

A shift that flattens every distribution raises all rare tokens. So a token's change is counted less
the mean change of the whole vocabulary.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize

from steer.artefacts.control_vector import ControlVector
from steer.artefacts.library import MemoryLibrary
from steer.artefacts.sae.base import SAE
from steer.engines.base import Engine, SamplingParams
from steer.engines.plans import plans_of
from steer.errors import SteerError
from steer.fit.data.where import WHERES
from steer.fit.features.surveying import check_fits
from steer.fit.measure.answers import Answer, Progress, answers_under
from steer.fit.measure.divergence import References, TokenChanges
from steer.fit.measure.nulls.comparison import p_value, q_values
from steer.fit.measure.nulls.directions import answer_states, null_vector
from steer.fit.measure.nulls.in_plans import with_vector
from steer.fit.measure.nulls.matching import Match, PlanAt, matched_strengths
from steer.plan.plan import SteeringPlan
from steer.prompts import Prompt, token_texts
from steer.registry.features.effect import (
    ChangedToken,
    OutputEffect,
    OutputVerdict,
    TargetEffect,
)
from steer.registry.features.survey import Survey
from steer.spec import parse_spec

LEVEL = 0.05
WRITTEN = 20
"""Tokens that a decoder row is said to point to."""
LEAST_PROBABILITY = 1e-4
"""A token that is never likelier on average is not listed as promoted or demoted: among tens of
thousands that are never said, some always change most."""
NEAR = 0.5
"""A direction with this cosine to a feature knows of it, and is no null."""
_PER_ROOT_KL = 0.47
"""Shares of the states' norm to a root of the KL, from where strengths are searched."""
_BATCH = 8


@dataclass(frozen=True)
class EffectOptions:
    """How far features are raised (`kl`, in nats on average), beside how many `nulls` of each
    kind, on answers of `max_tokens`, of which `top` promoted tokens are told."""

    kl: float = 0.2
    nulls: int = 10
    max_tokens: int = 24
    top: int = 10
    seed: int = 0


@dataclass(frozen=True)
class EffectGround:
    """What features are raised on: unsteered answers, and where the SAE writes."""

    engine: Engine
    sae: SAE
    references: References
    options: EffectOptions
    mean_norm: float
    states: Float[Tensor, "n d"]

    @staticmethod
    def of(
        engine: Engine, sae: SAE, prompts: Sequence[Prompt], options: EffectOptions
    ) -> EffectGround:
        """Asks the questions unsteered. Raises `SteerError`."""
        check_fits(engine, sae)
        sampling = SamplingParams(max_tokens=options.max_tokens, temperature=0.0, logprobs=0)
        [plain] = answers_under(engine, [prompts], [None], sampling=sampling)
        return EffectGround.along(engine, sae, plain, options)

    @staticmethod
    def along(
        engine: Engine, sae: SAE, answers: Sequence[Answer], options: EffectOptions
    ) -> EffectGround:
        """The ground of answers that there are."""
        point = sae.write_point
        states = answer_states(engine, answers, point.site, [point.layer])[point.layer]
        norm = float(states.norm(dim=-1).mean())
        return EffectGround(
            engine, sae, References(engine, answers, batch=_BATCH), options, norm, states
        )

    def plan_at(self, feature: int) -> PlanAt:
        """The plan that adds so much to a feature, from the last token of the prompt on."""
        plans = plans_of(self.engine, MemoryLibrary(saes={"sae": self.sae}))
        return lambda value: plans.plan(parse_spec(raising("sae", [feature], value)))

    def start(self, length: float) -> float:
        """About the strength at which a row of this length moves the model as far as is wanted."""
        return _PER_ROOT_KL * math.sqrt(self.options.kl) * self.mean_norm / length


def raising(sae: str, features: Sequence[int], value: float) -> dict[str, object]:
    """The spec that adds `value` to features, from the last token of the prompt on."""
    item = {
        "kind": "clamp",
        "sae": sae,
        "features": list(features),
        "mode": "add",
        "value": value,
        "where": WHERES["onward"],
    }
    return {"interventions": [item]}


@dataclass(frozen=True)
class Raised:
    """Features and then nulls, at the strengths of one KL: `plans` with their `matches`, of which
    the first `features` are the features'. `missed` nulls of those asked for are not there."""

    features: int
    matches: Sequence[Match]
    plans: Sequence[SteeringPlan]
    missed: int = 0


def output_effects(
    engine: Engine,
    sae: SAE,
    features: Sequence[int],
    prompts: Sequence[Prompt],
    options: EffectOptions = EffectOptions(),
    *,
    survey: Survey | None = None,
    progress: Progress | None = None,
) -> list[OutputEffect]:
    """What each feature does to what the model says, beside the same nulls.

    Decoder rows are not zero. `progress` is told of `effect_steps`. Raises `SteerError`.
    """
    return effects_on(
        EffectGround.of(engine, sae, prompts, options), features, survey=survey, progress=progress
    )


def effects_on(
    ground: EffectGround,
    features: Sequence[int],
    *,
    survey: Survey | None = None,
    progress: Progress | None = None,
) -> list[OutputEffect]:
    """As `output_effects`, on a ground that there is."""
    raised = raised_features(ground, features, progress=progress)
    changes = ground.references.token_changes(raised.plans)
    lens = written_tokens(ground.engine, ground.sae, features)
    special = frozenset(getattr(ground.engine.tokenizer, "all_special_ids", ()))
    return corrected(
        [
            _effect(ground, feature, row, raised, changes, lens[row], survey, special)
            for row, feature in enumerate(features)
        ]
    )


def corrected(effects: Sequence[OutputEffect]) -> list[OutputEffect]:
    """The effects with the q-values of what is written, and of what is detected, over all."""
    found = list(effects)
    for kind in ("written", "detected"):
        targets: list[TargetEffect | None] = [getattr(one, kind) for one in found]
        each = q_values([None if one is None else one.p for one in targets])
        for place, (target, q) in enumerate(zip(targets, each, strict=True)):
            if target is not None:
                update = {kind: target.model_copy(update={"q": q})}
                found[place] = found[place].model_copy(update=update)
    return found


def raised_features(
    ground: EffectGround, features: Sequence[int], *, progress: Progress | None = None
) -> Raised:
    """The features, and those nulls that know nothing of them and can be raised as far, at the
    ground's KL. `progress` is told of `effect_steps`."""
    lengths = (ground.sae.writes(features) * ground.sae.write_scale).norm(dim=-1).tolist()
    own = [ground.plan_at(feature) for feature in features]
    nulls = [_null_at(own[0](1.0), one) for one in drawn_nulls(ground, features)]
    plans = [*own, *nulls]
    matches = matched_strengths(
        ground.references,
        plans,
        [ground.options.kl] * len(plans),
        start=[*map(ground.start, lengths), *[ground.start(1.0)] * len(nulls)],
        progress=progress,
    )
    steps = effect_steps(len(own), ground.options)
    if progress is not None:
        progress(steps - len(plans))
    # A null that saturates below the KL would be too easy to beat.
    kept = [n for n, one in enumerate(matches) if n < len(own) or one.reached]
    return Raised(
        len(own),
        [matches[n] for n in kept],
        [plans[n](matches[n].strength) for n in kept],
        missed=steps - len(kept),
    )


def effect_steps(features: int, options: EffectOptions) -> int:
    """How much `output_effects` tells `progress` of: every direction that was matched."""
    return features + 2 * options.nulls


def check_raisable(engine: Engine, sae: SAE, feature: int) -> None:
    """Raises `SteerError` where features of this SAE cannot be raised on this engine."""
    plans = plans_of(engine, MemoryLibrary(saes={"sae": sae}))
    try:
        plans.plan(parse_spec(raising("sae", [feature], 1.0)))
    except SteerError as error:
        error.param = "/sae"
        raise


def drawn_nulls(ground: EffectGround, features: Sequence[int]) -> list[ControlVector]:
    """Directions of length 1 that know nothing of `features`: decoder rows of others, and random
    combinations of states."""
    sae, options = ground.sae, ground.options
    generator = torch.Generator().manual_seed(options.seed)
    order: list[int] = torch.randperm(sae.d_sae, generator=generator).tolist()
    # More than are needed: some may point nearly where a feature does, or nowhere.
    rows = sae.writes([n for n in order if n not in set(features)][: 4 * options.nulls])
    cosines = normalize(rows, dim=-1) @ normalize(sae.writes(features), dim=-1).T
    apart = (rows.norm(dim=-1) > 0) & (cosines.abs() < NEAR).all(1)
    point = sae.write_point
    found = [
        ControlVector.of({point.layer: row / row.norm()}, site=point.site)
        for row in rows[apart].double()[: options.nulls]
    ]
    # Of the covariance's nulls the direction alone matters; any vector gives them their length.
    unit = torch.zeros(ground.states.shape[1])
    unit[0] = 1.0
    like = ControlVector.of({point.layer: unit}, site=point.site)
    for n in range(options.nulls if len(ground.states) > 1 else 0):
        null = null_vector(
            like, "covariance", seed=options.seed + n, states={point.layer: ground.states}
        )
        found.append(null.vector)
    return found


def _null_at(base: SteeringPlan, vector: ControlVector) -> PlanAt:
    return lambda strength: with_vector(base, vector, strength)


def written_tokens(
    engine: Engine, sae: SAE, features: Sequence[int], count: int = WRITTEN
) -> list[Mapping[int, float] | None]:
    """The tokens that each decoder row points to, by the logit lens, each with the weight 1; None
    where the engine cannot read states as logits, or the SAE does not write to the stream."""
    rows = sae.writes(features)
    if engine.capabilities.no_unembedding is not None or rows.shape[1] != engine.info.d_model:
        return [None] * len(features)
    if sae.write_point.site in ("mlp_act", "head_out"):
        return [None] * len(features)
    # Less what the norm and the output matrix say of nothing (their biases).
    logits = engine.unembed(torch.cat([rows, torch.zeros_like(rows[:1])])).float().cpu()
    best = (logits[:-1] - logits[-1]).topk(min(count, logits.shape[-1])).indices
    return [dict.fromkeys(row, 1.0) for row in best.tolist()]


def _detected(
    survey: Survey | None, feature: int, special: frozenset[int]
) -> Mapping[int, float] | None:
    """The tokens on which the feature fired and those that followed, by how often, in the survey's
    examples; None where there are none. `special` tokens, which belong to a chat's form and to no
    word, do not count."""
    if survey is None:
        return None
    counts: Counter[int] = Counter()
    found = survey.feature(feature)
    for one in {(one.text, one.position): one for one in (*found.top, *found.sample)}.values():
        counts.update(survey.text(one.text)[one.position : one.position + 2])
    return {token: count for token, count in counts.items() if token not in special} or None


def _effect(
    ground: EffectGround,
    feature: int,
    row: int,
    raised: Raised,
    changes: TokenChanges,
    written: Mapping[int, float] | None,
    survey: Survey | None,
    special: frozenset[int],
) -> OutputEffect:
    match, tokenizer = raised.matches[row], ground.engine.tokenizer
    risen = changes.change - changes.change.mean(1, keepdim=True)
    nulls = risen[raised.features :]
    detected = _detected(survey, feature, special)
    beside_written = _beside(risen[row], nulls, written, tokenizer)
    beside_detected = _beside(risen[row], nulls, detected, tokenizer)
    promoted, demoted = _changed(changes, row, ground.options.top, tokenizer)
    return OutputEffect(
        feature=feature,
        model=ground.engine.info.name,
        prompts=len(ground.references.answers),
        strength=match.strength,
        kl=match.kl,
        reached=match.reached,
        nulls=len(nulls),
        promoted=promoted,
        demoted=demoted,
        written=beside_written,
        detected=beside_detected,
        verdict=_verdict(match, beside_written, beside_detected),
    )


def _beside(
    risen: Float[Tensor, " vocab"],
    nulls: Float[Tensor, "nulls vocab"],
    tokens: Mapping[int, float] | None,
    tokenizer: object,
) -> TargetEffect | None:
    if not tokens or not len(nulls):
        return None
    ids = list(tokens)
    weights = torch.tensor([tokens[one] for one in ids], dtype=torch.float64)
    weights /= weights.sum()
    change = float(risen[ids] @ weights)
    chance: list[float] = (nulls[:, ids] @ weights).tolist()
    return TargetEffect(
        tokens=tuple(token_texts(tokenizer, ids[:WRITTEN])),
        change=change,
        null=sum(chance) / len(chance),
        strongest=max(chance),
        p=p_value(change, chance),
    )


def _changed(
    changes: TokenChanges, row: int, count: int, tokenizer: object
) -> tuple[tuple[ChangedToken, ...], tuple[ChangedToken, ...]]:
    """The tokens that rose and fell most, of those that are said at all."""
    change = changes.change[row]
    said = torch.maximum(changes.probability[row], changes.before) >= LEAST_PROBABILITY
    order = [n for n in change.argsort(descending=True).tolist() if said[n]]
    up = [n for n in order[:count] if change[n] > 0]
    down = [n for n in order[::-1][:count] if change[n] < 0]

    def told(ids: list[int]) -> tuple[ChangedToken, ...]:
        texts = token_texts(tokenizer, ids)
        return tuple(
            ChangedToken(id=one, token=text, change=float(change[one]))
            for one, text in zip(ids, texts, strict=True)
        )

    return told(up), told(down)


def _verdict(
    match: Match, written: TargetEffect | None, detected: TargetEffect | None
) -> OutputVerdict:
    if not match.reached or (written is None and detected is None):
        return "unknown"
    if detected is not None and detected.p <= LEVEL:
        return "causes"
    if written is not None and written.p <= LEVEL:
        return "writes"
    return "detects"
