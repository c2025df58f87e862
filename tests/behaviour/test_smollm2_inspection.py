"""What a real model's states say: the lens that is fitted, and the model's own reading of them."""

from __future__ import annotations

from collections.abc import Iterator
from pydoc_data.topics import topics
from typing import Any

import pytest
from smollm2 import smollm2_folder

from steer.engines.transformers.engine import TransformersEngine
from steer.fit import fit_tuned_lens
from steer.inspection import LogitLensRequest, PatchscopeRequest, logit_lens, patchscope

pytestmark = pytest.mark.slow

TEXTS = [text[:220] for _, text in sorted(topics.items())[:24]]
READ = "The river runs through the old town and then down to the sea, where the boats"
LAYER = 20


@pytest.fixture(scope="module")
def smollm2() -> Iterator[TransformersEngine]:
    with TransformersEngine.load(str(smollm2_folder())) as engine:
        yield engine


def test_a_fitted_lens_reads_every_layer_better_than_the_logit_lens(
    smollm2: TransformersEngine,
) -> None:
    lens = fit_tuned_lens(smollm2, TEXTS, name="reader", steps=0)
    made: dict[str, Any] = lens.card.provenance["kl"]  # type: ignore[assignment]
    assert len(made) == smollm2.info.n_layers
    assert all(one["tuned"] < one["plain"] for one in made.values())
    # By far, and the more so the nearer to the end.
    assert made["28"]["tuned"] < 0.5 * made["28"]["plain"]
    assert made["28"]["tuned"] < made["15"]["tuned"] < made["1"]["tuned"]


def test_the_model_reads_its_own_states_where_the_logit_lens_reads_nothing(
    smollm2: TransformersEngine,
) -> None:
    source: dict[str, Any] = {"text": READ}
    asked = {"source": source, "positions": "all", "layers": [LAYER], "max_tokens": 0, "top": 1}
    request = PatchscopeRequest.model_validate({**asked, "expect": "next_token"})
    (found,) = patchscope(smollm2, request).precision
    cells = logit_lens(
        smollm2, LogitLensRequest(text=READ, layers=(LAYER, smollm2.info.n_layers - 1), top=1)
    )
    read = [
        one.top[0].id == own.top[0].id
        for one, own in zip(cells.row(LAYER), cells.row(smollm2.info.n_layers - 1), strict=True)
    ]
    assert found.precision_at_1 > sum(read) / len(read)
    assert found.precision_at_1 > found.controls["shuffled"]
    assert found.precision_at_1 > found.controls["none"]
