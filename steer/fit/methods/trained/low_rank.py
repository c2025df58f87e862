"""A low-rank adapter trained on prompts and answers (LoReFT, 2404.03592).

    x ← x + Rᵀ(W x + b − R x),   R with orthonormal rows

at the tokens that `where` names, on a few layers; the model's weights stay as they are. The result
is a `LowRankAdapter`, which the kind `low_rank` runs on every engine.

Memory: the tokens of all exercises; 3·(2·r·d + r) floats per layer (parameters and Adam's moments);
and the graph of one training batch, every activation of batch · tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from steer.artefacts.control_vector import LowRankAdapter
from steer.engines.base import Engine
from steer.engines.gradients import DifferentiableModel, differentiable
from steer.errors import SteerError
from steer.fit.data.exercises import ExerciseSet
from steer.fit.data.where import WhereName, where_named
from steer.fit.methods.card import made_on
from steer.fit.methods.trained.rows import AnswerRow, answer_row, log_probabilities
from steer.fit.methods.trained.training import check_training, train
from steer.fit.states import Progress, make_reading
from steer.model import HookPoint
from steer.spec import Site, Where


class LoReFT(nn.Module):
    """One layer's R, W and b. Starts as the identity: W = R, b = 0.

    Guarantees: the rows of R are orthonormal at every step: R is the Q of a free matrix's QR
    decomposition, with the signs that make it unique.
    """

    def __init__(self, width: int, rank: int, generator: torch.Generator) -> None:
        super().__init__()
        free = torch.linalg.qr(torch.randn(width, rank, generator=generator)).Q
        self.free = nn.Parameter(free)
        self.weight = nn.Parameter(self.rotation().detach().clone())
        self.bias = nn.Parameter(torch.zeros(rank))

    def rotation(self) -> Tensor:
        """R `[rank, width]`."""
        q, r = torch.linalg.qr(self.free)
        rotation: Tensor = (q * r.diagonal().sign()).T
        return rotation

    def forward(self, x: Tensor) -> Tensor:
        """The edited states, float32."""
        rotation = self.rotation()
        x = x.float()
        change = x @ self.weight.T + self.bias - x @ rotation.T
        edited: Tensor = x + change @ rotation
        return edited

    def parts(self) -> tuple[Tensor, Tensor, Tensor]:
        """R, W and b on the CPU."""
        found = (self.rotation(), self.weight, self.bias)
        return found[0].detach().cpu(), found[1].detach().cpu(), found[2].detach().cpu()


def fit_low_rank(
    engine: Engine,
    exercises: ExerciseSet,
    *,
    name: str,
    layers: Sequence[int],
    rank: int = 4,
    site: Site = "resid_post",
    where: WhereName = "last",
    steps: int = 200,
    batch: int = 8,
    rate: float = 4e-3,
    seed: int = 0,
    description: str = "",
    licence: str = "",
    progress: Progress | None = None,
) -> LowRankAdapter:
    """An adapter under which the model gives the exercises' answers.

    Adam with linear decay of `rate` over `steps` batches; the loss is the answer's mean −log p, its
    end included. Each step is one piece of work for the engine, so other requests go on between
    them. `progress` is told of every step. `where` becomes the card's default.

    Raises `Unsupported` (`no_gradients`) on an engine that cannot differentiate, `SteerError` for
    unusable arguments.
    """
    differentiable(engine)
    reading = make_reading(engine, site=site, layers=layers)
    default_where = where_named(where)
    _check(engine, exercises, site, rank)
    check_training(steps, batch)
    rows = [answer_row(engine, one.prompt, one.answer) for one in exercises.items]
    generator = torch.Generator().manual_seed(seed)
    width = engine.info.width(site)
    device = differentiable(engine).differentiate(lambda model: model.device)
    edits = {p: LoReFT(width, rank, generator).to(device) for p in reading.points}
    losses = train(
        engine,
        rows,
        lambda model, chosen: answer_loss(model, chosen, edits, default_where),
        torch.optim.Adam([p for edit in edits.values() for p in edit.parameters()], lr=rate),
        what=["low_rank", exercises.sha256, list(layers), rank, site, where, rate],
        steps=steps,
        batch=batch,
        seed=seed,
        progress=progress,
    )
    return LowRankAdapter.of(
        {point.layer: edit.parts() for point, edit in edits.items()},
        name=name,
        model=engine.info.own_name,
        site=site,
        default_where=default_where,
        description=description,
        licence=licence,
        provenance={
            "method": "low_rank",
            "data_sha256": exercises.sha256,
            "exercises": len(exercises),
            "rank": rank,
            "steps": steps,
            "batch": batch,
            "rate": rate,
            "where": where,
            "seed": seed,
            **losses.told(),
            **made_on(engine),
        },
    )


def answer_loss(
    model: DifferentiableModel,
    rows: Sequence[AnswerRow],
    edits: Mapping[HookPoint, LoReFT],
    where: Where | None,
) -> Tensor:
    """The mean −log p of all answers' tokens under `edits`."""
    return -torch.cat(log_probabilities(model, rows, edits, where)).mean()


def _check(
    engine: Engine,
    exercises: ExerciseSet,
    site: Site,
    rank: int,
) -> None:
    if not len(exercises):
        raise SteerError("there are no exercises to learn from", code="no_exercises")
    width = engine.info.width(site)
    if not 1 <= rank <= width:
        raise SteerError(
            f"a rank must be from 1 to the width, {width}; got {rank!r}", code="invalid_option"
        )
