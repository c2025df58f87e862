"""How well an SAE stands for states: on rows it was not trained on, and in the model's stead."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from pydantic import BaseModel, ConfigDict
from torch import Tensor
from torch.nn import functional

from steer.artefacts.sae.base import SAE
from steer.engines.base import Engine
from steer.engines.gradients import DifferentiableModel, Edit, differentiable
from steer.fit.data.texts import Tokens
from steer.fit.saes.network import typical
from steer.model import HookPoint

_NUMBERS = 1 << 24


class SAEMeasures(BaseModel):
    """How well an SAE stands for states.

    `explained` is 1 − Σ‖x − x̂‖² / Σ‖x − mean‖² over typical tokens, `explained_all` over all of
    them: `outliers` is the share of tokens whose states are more than four times as long as the
    median, which then decide the second figure alone. `cosine` is the mean cosine of x and x̂;
    `active` the mean number of features on a token; `dead` the share of features on none of the
    `tokens`, `dense` of those on more than a tenth of them.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    tokens: int
    explained: float
    explained_all: float
    outliers: float
    cosine: float
    active: float
    dead: float
    dense: float


class LossRecovered(BaseModel):
    """The model's loss on `tokens`, in nats a token, as it is, on what the SAE rebuilds, and with
    the mean state in its place; `recovered` is (mean − rebuilt) / (mean − own)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    tokens: int
    own: float
    rebuilt: float
    mean: float

    @property
    def recovered(self) -> float:
        return (self.mean - self.rebuilt) / (self.mean - self.own)

    def as_json(self) -> dict[str, Any]:
        return {**self.model_dump(), "recovered": self.recovered}


def measure(sae: SAE, rows: Float[Tensor, "n d"]) -> SAEMeasures:
    """The SAE on `rows`, a few at a time."""
    size = max(16, _NUMBERS // sae.d_sae)
    ordinary, cosines = typical(rows), 0.0
    left: list[Tensor] = []
    fired = torch.zeros(sae.d_sae, dtype=torch.int64)
    for start in range(0, len(rows), size):
        block = rows[start : start + size]
        f = sae.encode(block)
        rebuilt = sae.decode(f)
        left.append((block - rebuilt).double().square().sum(-1))
        cosines += float(functional.cosine_similarity(block, rebuilt, dim=-1).sum())
        fired += (f != 0).sum(0)
    errors = torch.cat(left)
    rates = fired.double() / len(rows)
    return SAEMeasures(
        tokens=len(rows),
        explained=_explained(errors[ordinary], rows[ordinary]),
        explained_all=_explained(errors, rows),
        outliers=1 - float(ordinary.double().mean()),
        cosine=cosines / len(rows),
        active=float(rates.sum()),
        dead=float((fired == 0).double().mean()),
        dense=float((rates > 0.1).double().mean()),
    )


def _explained(errors: Float[Tensor, " n"], rows: Float[Tensor, "n d"]) -> float:
    variance = (rows - rows.mean(0)).double().square().sum()
    return 1 - float(errors.sum() / variance)


def loss_recovered(
    engine: Engine,
    sae: SAE,
    texts: Sequence[Tokens],
    mean: Float[Tensor, " d"],
    *,
    skip: int = 1,
    counted: Sequence[int] | None = None,
    batch: int = 8,
) -> LossRecovered:
    """The loss on `texts` with the states at the SAE's point replaced; the first `skip` tokens of
    a text keep theirs, as in training. Of each text the tokens from number `counted` on count, by
    default those that follow a replaced state. Raises `Unsupported` (`no_gradients`)."""
    able = differentiable(engine)
    point = HookPoint(sae.layer, sae.site)
    edits: list[Edit | None] = [
        None,
        lambda x: sae.decode(sae.encode(x.float().cpu())).to(x),
        lambda x: mean.to(x).expand_as(x),
    ]
    given = [skip + 1] * len(texts) if counted is None else counted
    every = [
        (text, max(first, skip + 1))
        for text, first in zip(texts, given, strict=True)
        if len(text) > max(first, skip + 1)
    ]
    totals = [0.0, 0.0, 0.0]
    tokens = sum(len(text) - first for text, first in every)
    for start in range(0, len(every), batch):
        for place, edit in enumerate(edits):
            group = every[start : start + batch]
            totals[place] += able.differentiate(_losses(group, point, edit, skip))
    own, rebuilt, without = (total / tokens for total in totals)
    return LossRecovered(tokens=tokens, own=own, rebuilt=rebuilt, mean=without)


def _losses(
    group: Sequence[tuple[Tokens, int]], point: HookPoint, edit: Edit | None, skip: int
) -> Any:
    """Work that gives the summed loss of each text's tokens from its number on."""

    def changed(x: Tensor) -> Tensor:
        assert edit is not None
        return torch.cat([x[:, :skip], edit(x[:, skip:])], 1)

    def work(model: DifferentiableModel) -> float:
        with torch.no_grad():
            texts = [text for text, _ in group]
            logits = model.run(texts, edits={point: changed} if edit else {}).logits
            total = 0.0
            for row, (text, first) in zip(logits, group, strict=True):
                wanted = torch.tensor(text[first:], device=row.device)
                said = row[first - 1 : len(text) - 1]
                total += float(functional.cross_entropy(said, wanted, reduction="sum"))
            return total

    return work
