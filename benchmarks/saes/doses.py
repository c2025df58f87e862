"""How a feature's effect grows with how far it is raised, beside chance at the same KL.

The effect is what raising the feature does to the tokens that its decoder row points to: the mean
change of their log-probability less that of the whole vocabulary, in nats.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.saes.setting import Setting, counting
from benchmarks.saes.steerer import spearman
from steer.engines.journal import remembered
from steer.fit.features.effect import EffectGround, EffectOptions, drawn_nulls, written_tokens
from steer.fit.measure.nulls.comparison import p_value
from steer.fit.measure.nulls.in_plans import with_vector
from steer.fit.measure.nulls.matching import PlanAt, matched_strengths
from steer.fit.requests.features.effect import asked_questions
from steer.plan.plan import SteeringPlan
from steer.prompts import token_texts

KLS = (0.025, 0.05, 0.1, 0.2, 0.4, 0.8)
"""Nats; six doses, each twice the one before."""
SLACK = 0.02
"""Nats by which an effect may fall between two doses and still be called rising."""


@dataclass(frozen=True)
class Curve:
    """The effect of one direction at every dose, its strengths and the KLs that were reached."""

    strengths: tuple[float, ...]
    kls: tuple[float, ...]
    effects: tuple[float, ...]


def measure(
    setting: Setting, features: Sequence[int], options: EffectOptions, questions: int
) -> dict[str, Any]:
    """The dose-response of each feature, and of the nulls on that feature's tokens."""
    engine, sae = setting.engine, setting.sae
    asked = asked_questions(engine, None, options.seed, questions)
    ground = EffectGround.of(engine, sae, asked, options)
    targets = written_tokens(engine, sae, features)
    own = [ground.plan_at(feature) for feature in features]
    nulls = [_null(own[0](1.0), one) for one in drawn_nulls(ground, features)]
    lengths = (sae.writes(features) * sae.write_scale).norm(dim=-1).tolist()
    starts = [*map(ground.start, lengths), *[ground.start(1.0)] * len(nulls)]
    with counting("doses", len(KLS) * len(starts), "match") as bar:
        strengths: list[list[float]] = []
        kls: list[list[float]] = []
        risen: list[Tensor] = []
        for kl in KLS:
            near = [
                strengths[-1][n] * (kl / kls[-1][n]) ** 0.5
                if strengths and kls[-1][n] > 0
                else start * (kl / options.kl) ** 0.5
                for n, start in enumerate(starts)
            ]
            matches = matched_strengths(
                ground.references,
                [*own, *nulls],
                [kl] * len(starts),
                start=near,
                tolerance=0.1,
                progress=bar.update,
            )
            strengths.append([one.strength for one in matches])
            kls.append([one.kl for one in matches])
            plans = [at(one.strength) for at, one in zip([*own, *nulls], matches, strict=True)]
            risen.append(_risen(ground, plans, targets))
    effects = torch.stack(risen).numpy()  # [doses, directions, targets]
    rows = []
    for row, feature in enumerate(features):
        curve = Curve(
            tuple(one[row] for one in strengths),
            tuple(one[row] for one in kls),
            tuple(effects[:, row, row].tolist()),
        )
        tokens = targets[row]
        rows.append(
            {
                "feature": feature,
                "label": setting.labels[feature].text if feature in setting.labels else "",
                "points to": token_texts(engine.tokenizer, list(tokens or ())[:6]),
                **beside(curve, effects[:, len(features) :, row]),
            }
        )
    return {
        "questions": len(asked),
        "tokens": options.max_tokens,
        "kls": KLS,
        "nulls": len(nulls),
        "features": rows,
        **summary(rows),
    }


def beside(curve: Curve, nulls: NDArray[np.float64]) -> dict[str, Any]:
    """A curve beside the effects `[doses, nulls]` of chance on the same tokens: Spearman's rank
    correlation of dose and effect, whether it never falls, and at which doses it is above every
    null."""
    steps = np.diff(curve.effects)
    return {
        "strengths": curve.strengths,
        "kl": curve.kls,
        "effects": curve.effects,
        "null": nulls.mean(1).tolist(),
        "strongest": nulls.max(1).tolist(),
        "spearman": spearman(curve.effects),
        "null spearman": [spearman(column) for column in nulls.T.tolist()],
        "rises": bool((steps >= -SLACK).all()),
        "above": [
            bool(one > strongest)
            for one, strongest in zip(curve.effects, nulls.max(1), strict=True)
        ],
        "p": [p_value(one, row.tolist()) for one, row in zip(curve.effects, nulls, strict=True)],
    }


def summary(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Of all features: how many rise, correlate and are above chance, and the mean effects."""
    return {
        "rise": sum(one["rises"] for one in rows),
        "spearman ≥ .9": sum(one["spearman"] >= 0.9 for one in rows),
        "above every null at each dose": [
            sum(one["above"][n] for one in rows) for n in range(len(KLS))
        ],
        "mean effect": np.mean([one["effects"] for one in rows], axis=0).tolist(),
        "mean null": np.mean([one["null"] for one in rows], axis=0).tolist(),
        "mean strongest": np.mean([one["strongest"] for one in rows], axis=0).tolist(),
    }


def _null(base: SteeringPlan, vector: Any) -> PlanAt:
    return lambda strength: with_vector(base, vector, strength)


def _risen(
    ground: EffectGround,
    plans: Sequence[SteeringPlan],
    targets: Sequence[Mapping[int, float] | None],
) -> Tensor:
    """`[plans, targets]`: the mean change of each target's tokens, less that of all."""
    if None in targets:
        raise ValueError("the engine cannot say which tokens the decoder rows point to")
    wanted = [list(one or ()) for one in targets]

    def work() -> Tensor:
        change = ground.references.token_changes(plans).change
        mean = change.mean(1)
        return torch.stack([change[:, ids].mean(1) - mean for ids in wanted], 1)

    texts = [(one.prompt, one.tokens) for one in ground.references.answers]
    what = ["risen", wanted, [one.fingerprint for one in plans], texts]
    return remembered(ground.engine, what, work)


HEADINGS = ("feature", "label", "points to", *(f"{kl:g}" for kl in KLS), "Spearman", "rises")


def lines(found: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """The rows of the table: each effect with the strongest of chance."""
    return [
        (
            str(one["feature"]),
            one["label"],
            ", ".join(token.strip() for token in one["points to"][:3]),
            *(
                f"{effect:+.2f} ({null:+.2f})"
                for effect, null in zip(one["effects"], one["strongest"], strict=True)
            ),
            f"{one['spearman']:.2f}",
            "yes" if one["rises"] else "no",
        )
        for one in found["features"]
    ]
