"""A concept dictionary of token states (CoX-LMM, 2406.08074).

States of one token per prompt, at one point of the residual stream, as nonnegative sums of a few
directions, with an L1 price on the weights. Two components that stand for two values of an
attribute make a shift from one to the other: the kind `swap`.
"""

from __future__ import annotations

from collections.abc import Sequence

from steer.engines.base import Engine
from steer.fit.data.prompt import Positions, Prompt
from steer.fit.methods.dictionaries.dictionary import Dictionary, fit_dictionary
from steer.fit.methods.dictionaries.semi_nmf import semi_nmf
from steer.fit.states import Progress
from steer.model import HookPoint
from steer.spec import Site


def fit_nmf(
    engine: Engine,
    prompts: Sequence[Prompt],
    *,
    layer: int,
    components: int = 10,
    penalty: float = 0.01,
    iterations: int = 200,
    site: Site = "resid_post",
    positions: Positions = "last",
    sample: int = 20_000,
    seed: int = 0,
    batch: int = 16,
    progress: Progress | None = None,
) -> Dictionary:
    """A dictionary of `components` directions over the states of `prompts`.

    `penalty` is the price of weights, relative to the states' mean squared length. `progress` is
    told of every prompt read and every iteration. Raises `SteerError`; memory as
    `steer.fit.methods.dictionaries.dictionary` says.
    """
    return fit_dictionary(
        engine,
        prompts,
        lambda rows: semi_nmf(
            rows, components, penalty=penalty, iterations=iterations, seed=seed, progress=progress
        ),
        point=HookPoint(layer, site),
        positions=positions,
        sample=sample,
        seed=seed,
        batch=batch,
        parameters={
            "method": "nmf",
            "components": components,
            "penalty": penalty,
            "iterations": iterations,
        },
        progress=progress,
    )
