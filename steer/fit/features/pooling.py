"""One number a feature for each text: its activations, pooled over the text's tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray
from scipy import sparse
from torch import Tensor

from steer.artefacts.sae.base import SAE
from steer.engines.base import Engine
from steer.fit.data.prompt import Positions, Prompt
from steer.fit.features.surveying import check_fits
from steer.fit.states import Progress, make_reading, read_tokens
from steer.prompts import begins

Pooled = Literal["max", "mean", "last"]
_NUMBERS = 1 << 24


def pooled_activations(
    engine: Engine,
    sae: SAE,
    prompts: Sequence[Prompt],
    pooled: Pooled,
    *,
    at: Positions = "mean",
    param: str = "/positions",
    batch: int = 16,
    progress: Progress | None = None,
) -> sparse.csr_array:
    """`[prompts, d_sae]` float32, sparse: of the tokens at `at` (by default all; a beginning that
    the tokenizer puts before a text does not count); a selection stands at `param` of a request.
    Raises `SteerError`."""
    check_fits(engine, sae)
    reading = make_reading(
        engine, site=sae.site, layers=[sae.layer], positions=at, batch=batch, at=param
    )
    rows = []
    for ids, states in read_tokens(engine, prompts, reading):
        kept = states[sae.layer][int(len(ids) > 1 and begins(engine.tokenizer, ids)) :]
        rows.append(sparse.csr_array(_pool(sae, kept[-1:] if pooled == "last" else kept, pooled)))
        if progress is not None:
            progress(1)
    return sparse.vstack(rows, format="csr")


def _pool(sae: SAE, states: Float[Tensor, "T d_in"], pooled: Pooled) -> NDArray[np.float32]:
    """`[1, d_sae]`, a few tokens at a time."""
    size = max(16, _NUMBERS // sae.d_sae)
    found = np.zeros((1, sae.d_sae), np.float64 if pooled == "mean" else np.float32)
    for first in range(0, len(states), size):
        block = sae.encode(states[first : first + size]).numpy()
        if pooled == "mean":
            found += block.sum(0, dtype=np.float64) / len(states)
        else:
            np.maximum(found, block.max(0), out=found)
    return found.astype(np.float32)
