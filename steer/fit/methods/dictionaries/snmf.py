"""Sparse semi-NMF of MLP activations (2506.10920): groups of neurons that fire together.

Each component keeps the largest 1 % of its neurons, and says by itself which ones they are. It acts
where it was found, at site `mlp_act`. The paper sets its strength by a target divergence from the
unsteered model: `"strength": {"kl": x}` on a calibrated card.
"""

from __future__ import annotations

from collections.abc import Sequence

from steer.engines.base import Engine
from steer.fit.data.prompt import Positions, Prompt
from steer.fit.methods.dictionaries.dictionary import Dictionary, fit_dictionary
from steer.fit.methods.dictionaries.semi_nmf import semi_nmf
from steer.fit.states import Progress
from steer.model import HookPoint


def fit_snmf(
    engine: Engine,
    prompts: Sequence[Prompt],
    *,
    layer: int,
    components: int = 50,
    keep: float = 0.01,
    iterations: int = 100,
    positions: Positions = "mean",
    sample: int = 20_000,
    seed: int = 0,
    batch: int = 16,
    progress: Progress | None = None,
) -> Dictionary:
    """Components of the MLP's activations on one layer, over every token of `prompts`
    (`positions="mean"`), those of the responses, or one token of each.

    `keep` is the share of neurons that a component keeps. `progress` is told of every prompt read
    and every iteration. Raises `SteerError`; memory as `dictionary.py` says.
    """
    return fit_dictionary(
        engine,
        prompts,
        lambda rows: semi_nmf(
            rows, components, keep=keep, iterations=iterations, seed=seed, progress=progress
        ),
        point=HookPoint(layer, "mlp_act"),
        positions=positions,
        sample=sample,
        seed=seed,
        batch=batch,
        parameters={
            "method": "snmf",
            "components": components,
            "keep": keep,
            "iterations": iterations,
        },
        progress=progress,
    )
