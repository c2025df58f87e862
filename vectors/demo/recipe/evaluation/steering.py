"""Shipped vectors: what they do where and as strongly as their cards say, and at smaller doses."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from statistics import fmean

from steer_vectors.demo.recipe.data import asked_of
from steer_vectors.demo.recipe.evaluation.checks import Check, count
from steer_vectors.demo.recipe.evaluation.demo import Demo, Reply, is_sentiment
from steer_vectors.demo.recipe.evaluation.estimates import difference, difference_of_ratios, share

SUCCESS, VALID, NATS = 0.85, 0.8, 0.3
ATTRIBUTES = 4
RISE = 0.5
DOSES = (0.25, 0.5, 0.75, 1.0)
"""Shares of the strength that the card says."""


def vectors(demo: Demo) -> Iterator[Check]:
    """Three rows for each attribute's vector, then how many meet all three."""
    meeting: dict[str, list[Check]] = {}
    for name in demo.attributes:
        prompts = demo.held_out(name)
        steered = demo.answers(prompts, demo.added(name))
        meeting[name] = list(_effects(name, steered, demo.answers(prompts)))
        yield from meeting[name]
    good = {name: all(row.met for row in rows) for name, rows in meeting.items()}
    yield count("vectors", "vectors that meet all three", good.values(), ATTRIBUTES)
    moods = (met for name, met in good.items() if is_sentiment(name))
    yield count("vectors", "vectors of a sentiment among them", moods, 1)


def _effects(name: str, steered: Sequence[Reply], plain: Sequence[Reply]) -> Iterator[Check]:
    success = share([r.reading.all(name) for r in steered])
    yield Check("vectors", f"{name}: success", success, SUCCESS, part=True)
    valid = share([r.reading.valid for r in steered])
    yield Check("vectors", f"{name}: valid", valid, VALID, part=True)
    more = difference_of_ratios(
        [(r.loss, r.tokens) for r in steered], [(r.loss, r.tokens) for r in plain]
    )
    yield Check("vectors", f"{name}: nats more loss", more, NATS, at_most=True, part=True)


def doses(demo: Demo) -> Iterator[Check]:
    """For each attribute's vector, how far success rises, and whether it falls anywhere.

    A dose falls below the one before it only if the interval of their difference, paired by
    prompt, lies below 0; its level is divided among the steps (Bonferroni).
    """
    level = 1 - 0.05 / len(DOSES)
    for name in (*demo.attributes, "refusal"):
        prompts = demo.held_out(asked_of(name))
        plans = [demo.added(name, dose) for dose in DOSES]
        every = [demo.answers(prompts), *(demo.answers(prompts, plan) for plan in plans)]
        hits = [[float(r.reading.all(name)) for r in replies] for replies in every]
        rise = difference(hits[-1], hits[0])
        shown = ", ".join(f"{fmean(one):.2f}" for one in hits)
        yield Check("doses", f"{name}: rise ({shown})", rise, RISE)
        steps = [difference(after, before, level=level) for before, after in pairwise(hits)]
        lowest = min(steps, key=lambda step: (step.high, step.value))
        yield Check("doses", f"{name}: least step between doses", lowest, 0.0, noise=True)
