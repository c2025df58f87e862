"""How far features can be trusted to stand for concepts that labelled texts have."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy import sparse

from steer.artefacts.sae.base import SAE
from steer.engines.base import Engine
from steer.errors import SteerError
from steer.fit.data.labels import LabelledSet
from steer.fit.data.prompt import Prompt
from steer.fit.features.absorption import Floats, absorption
from steer.fit.features.monosemanticity import LEAST, BalancedHalves, monosemanticity
from steer.fit.features.pooling import Pooled, pooled_activations
from steer.fit.states import Progress, make_reading, read_rows
from steer.registry.features.trust import Absorption, ConceptTrust


def concept_trust(
    engine: Engine,
    sae: SAE,
    data: LabelledSet,
    *,
    pooled: Pooled = "last",
    p: int = 1,
    seed: int = 0,
    batch: int = 16,
    progress: Progress | None = None,
) -> list[ConceptTrust]:
    """For each label of the texts, against the rest, the feature that tells it and how purely;
    labels that no feature tells are left out.

    A text is its activations at the last token, or their mean or maximum over all; absorption,
    which is of tokens, is measured at the last alone, and not where an SAE measures each token in
    its own units. `progress` is told of texts, twice where absorption is. Raises `SteerError`
    (`too_few_texts`).
    """
    check_classes(data)
    prompts = [one.prompt for one in data.items]
    rows = pooled_activations(engine, sae, prompts, pooled, batch=batch, progress=progress)
    states = None
    if measures_absorption(sae, pooled):
        states = _last_states(engine, sae, prompts, batch, progress)
    found = []
    for label in data.labels:
        positive = np.array([one.label == label for one in data.items])
        split = BalancedHalves.of(positive, seed)
        score = monosemanticity(rows, positive, split, p=p, seed=seed)
        if score is None:
            continue
        first, *others = score.features
        column = rows[:, [first]].toarray()[:, 0]
        present = bool(column[positive].mean() > column[~positive].mean())
        found.append(
            ConceptTrust(
                feature=first,
                model=engine.info.name,
                concept=label,
                present=present,
                texts=2 * min(int(positive.sum()), int((~positive).sum())),
                p=p,
                fms=score.fms,
                capacity=score.capacity,
                local=score.local,
                widely=score.widely,
                runners_up=tuple(others),
                absorption=(
                    _absorption(sae, states, rows, positive, split, first) if present else None
                ),
            )
        )
    return found


def measures_absorption(sae: SAE, pooled: Pooled) -> bool:
    """Whether absorption can be measured: of tokens, in the units in which the SAE writes."""
    return pooled == "last" and sae.measure == "product" and sae.d_in == sae.d_out


def check_classes(data: LabelledSet) -> None:
    """Raises `SteerError` (`too_few_texts`) unless each label, and the rest, has enough texts."""
    for label in data.labels:
        count = sum(one.label == label for one in data.items)
        if min(count, len(data) - count) < 2 * LEAST:
            raise SteerError(
                f"the label {label!r} has {count} of {len(data)} texts: half of them are fitted on "
                f"and half held out, which takes at least {2 * LEAST} with it and without",
                code="too_few_texts",
                param="/texts",
            )


def _last_states(
    engine: Engine, sae: SAE, prompts: Sequence[Prompt], batch: int, progress: Progress | None
) -> Floats:
    reading = make_reading(engine, site=sae.site, layers=[sae.layer], positions="last", batch=batch)
    found = []
    for first in range(0, len(prompts), batch):
        group = prompts[first : first + batch]
        found.append(read_rows(engine, group, reading)[sae.layer].double().numpy())
        if progress is not None:
            progress(len(group))
    return np.concatenate(found)


def _absorption(
    sae: SAE,
    states: Floats | None,
    rows: sparse.csr_array,
    positive: np.ndarray,
    split: BalancedHalves,
    first: int,
) -> Absorption | None:
    if states is None:
        return None

    def writes(features: Sequence[int]) -> Floats:
        return sae.writes(features).double().numpy()

    return absorption(states, rows, positive, split, first, writes)
