"""Chooses how a vector is used: which layers, how strongly, on which tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from steer_vectors.demo.recipe.library.bench import LAST, Bench, add
from steer_vectors.demo.recipe.scorers import scorer

from steer.artefacts.control_vector import ControlVector
from steer.fit.data.pairs import Prompt
from steer.fit.measure.answers import Measured
from steer.spec import Where

FIRST_ROUND = 32
"""Prompts that every setting is tried on; the best go on to all that are given."""
FINALISTS = 8
GOOD = 0.9
MIN_VALID, MAX_NATS = 0.8, 0.3
LAYER_SETS = ((1,), (2,), (3,), (4,), (5,), (2, 3), (3, 4), (4, 5))
PLACES = {"last prompt token": LAST, "last prompt token and answer": Where(positions=((-1, None),))}
STRENGTHS = {
    "last prompt token": (0.5, 0.75, 1.0, 1.5, 2.0, 3.0),
    "last prompt token and answer": (0.25, 0.35, 0.5, 0.75),
}


@dataclass(frozen=True)
class Setting:
    """A way to use a vector."""

    layers: tuple[int, ...]
    strength: float
    place: str

    def of(self, vector: ControlVector) -> ControlVector:
        """The vector with this setting as its card's default."""
        update = {
            "default_layers": self.layers,
            "default_strength": self.strength,
            "default_where": PLACES[self.place],
        }
        return replace(vector, card=vector.card.model_copy(update=update))

    @property
    def dose(self) -> float:
        return self.strength * len(self.layers)


def choose(bench: Bench, vector: ControlVector, prompts: Sequence[Prompt]) -> Setting:
    """The setting with the most answers that have the attribute and are valid. Raises ValueError
    where none steers and spares the text.

    Settings that spoil more than `MIN_VALID` and `MAX_NATS` allow are out. Steering more tokens is
    tried only where the fewest do not reach `GOOD`. Within .01 of the best, the smaller dose wins.
    """
    found: list[tuple[Setting, float]] = []
    for place in PLACES:
        settings = [Setting(x, s, place) for x in LAYER_SETS for s in STRENGTHS[place]]
        first = tried(bench, vector, settings, prompts[:FIRST_ROUND])
        first.sort(key=lambda one: (-round(one[1], 2), one[0].dose))
        found += tried(bench, vector, [s for s, _ in first[:FINALISTS]], prompts)
        best = max(both for _, both in found)
        if best >= GOOD:
            break
    if best == 0:
        raise ValueError(f"no setting of {vector.card.name!r} steers and spares the text")
    good = [setting for setting, both in found if both >= best - 0.01]
    return min(good, key=lambda s: (s.dose, s.layers))


def tried(
    bench: Bench, vector: ControlVector, settings: Sequence[Setting], prompts: Sequence[Prompt]
) -> list[tuple[Setting, float]]:
    """Each setting with its share of answers that have the attribute and are valid; 0 where it
    spoils too much."""
    name = vector.card.name
    plans = [bench.plan(setting.of(vector), add(name)) for setting in settings]
    plain, *steered = bench.measure(prompts, [None, *plans], scorer(name))
    return [
        (setting, (one.both or 0.0) if spares(one, plain) else 0.0)
        for setting, one in zip(settings, steered, strict=True)
    ]


def spares(steered: Measured, plain: Measured) -> bool:
    """Whether the answers stay readable."""
    return (steered.valid or 0.0) >= MIN_VALID and steered.loss - plain.loss <= MAX_NATS
