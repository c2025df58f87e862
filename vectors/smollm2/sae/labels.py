"""Labels for the features of SmolLM2's SAE: what they fire on, in the states it was trained on."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
from steer_vectors.smollm2.sae.states import Collected
from tqdm import tqdm

from steer.artefacts.sae.base import SAE
from steer.artefacts.sae.labels import FeatureLabel
from steer.engines.base import Engine
from steer.fit.data.texts import Tokens
from steer.fit.features.exemplars import exemplar_labels
from steer.fit.features.surveying import survey_card
from steer.fit.features.tally import Tally
from steer.registry.features.store import SurveyStore

EVERY = 3
"""Of so many texts one is looked at."""


def labels_of(engine: Engine, sae: SAE, found: Collected) -> dict[int, FeatureLabel]:
    """A label for each feature that fires, from its best examples (`exemplars`); nothing is run
    again, for the states are there."""
    tally = Tally(sae.encode, sae.d_in, sae.d_sae)
    texts: list[Tokens] = []
    for capture, asked in zip(found.captures, found.texts, strict=True):
        ends = np.searchsorted(capture.texts, np.arange(capture.card.texts + 1))
        for n in tqdm(range(0, len(asked), EVERY), desc="labels", unit="text", mininterval=10):
            rows = np.arange(ends[n], ends[n + 1])
            skip = capture.card.skip
            tally.add(capture.rows(rows), len(texts), skip)
            texts.append(asked[n][:skip] + tuple(capture.tokens[rows].tolist()))
    arrays = tally.arrays()
    arrays["tokens"] = np.array([token for text in texts for token in text], np.int32)
    arrays["text_start"] = np.cumsum([0, *map(len, texts)])
    card = survey_card(engine, sae, "0" * 64, texts).model_copy(update={"tokens": tally.tokens})
    with tempfile.TemporaryDirectory() as folder:
        store = SurveyStore(folder)
        store.keep(card, arrays, Path(folder))
        labels = exemplar_labels(store.of(card.sae, sae.card.name))
    return {
        feature: one.model_copy(
            update={
                "density": None if one.density is None else round(one.density, 5),
                "largest": None if one.largest is None else round(one.largest, 2),
            }
        )
        for feature, one in labels.items()
    }
