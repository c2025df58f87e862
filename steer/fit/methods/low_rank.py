"""A low-rank adapter trained on prompts and answers (LoReFT, 2404.03592).

    x ← x + Rᵀ(W x + b − R x),   R with orthonormal rows

at the tokens that `where` names, on a few layers; the model's weights stay as they are. The result
is a `LowRankAdapter`, which the kind `low_rank` runs on every engine.

Memory: the tokens of all exercises; 3·(2·r·d + r) floats per layer (parameters and Adam's moments);
and the graph of one training batch, every activation of batch · tokens.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from steer.artefacts.control_vector import LowRankAdapter
from steer.engines.base import Engine
from steer.engines.gradients import DifferentiableModel, Edit, differentiable
from steer.errors import SteerError
from steer.fit.data.exercises import Exercise, ExerciseSet
from steer.fit.data.where import WhereName, where_named
from steer.fit.methods.card import made_on
from steer.fit.states import Progress, check_length, make_reading, prompt_tokens
from steer.model import HookPoint
from steer.prompts import Marked, answer_end, part_tokens
from steer.spec import Site


@dataclass(frozen=True)
class _Row:
    """One exercise as tokens: those of the prompt, then those to be predicted."""

    tokens: tuple[int, ...]
    prompt: int

    def steered(self, where: WhereName) -> range:
        """The fed positions that the adapter acts on."""
        fed = len(self.tokens) - 1
        if where == "last":
            return range(self.prompt - 1, self.prompt)
        first = {"onward": self.prompt - 1, "generation": self.prompt, "all": 0}[where]
        return range(first, fed)


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
    _check(engine, exercises, site, rank, steps, batch)
    rows = [_row(engine, one) for one in exercises.items]
    generator = torch.Generator().manual_seed(seed)
    width = engine.info.width(site)
    edits = {point: LoReFT(width, rank, generator) for point in reading.points}
    losses = _trained(engine, rows, edits, where, steps, batch, rate, seed, progress)
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
            "first_loss": round(losses[0], 4),
            "last_loss": round(sum(losses[-10:]) / len(losses[-10:]), 4),
            **made_on(engine),
        },
    )


def _trained(
    engine: Engine,
    rows: Sequence[_Row],
    edits: Mapping[HookPoint, LoReFT],
    where: WhereName,
    steps: int,
    batch: int,
    rate: float,
    seed: int,
    progress: Progress | None,
) -> list[float]:
    """Trains `edits` in place; the loss of every step."""
    device = differentiable(engine).differentiate(lambda model: model.device)
    for edit in edits.values():
        edit.to(device)
    parameters = [p for edit in edits.values() for p in edit.parameters()]
    optimiser = torch.optim.Adam(parameters, lr=rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: 1 - step / steps)
    losses = []
    for _, chosen in zip(range(steps), _batches(rows, batch, seed), strict=False):
        loss = differentiable(engine).differentiate(_step(chosen, edits, where, optimiser))
        losses.append(loss)
        schedule.step()
        if progress is not None:
            progress(1)
    return losses


def _step(
    rows: Sequence[_Row],
    edits: Mapping[HookPoint, LoReFT],
    where: WhereName,
    optimiser: torch.optim.Optimizer,
) -> Callable[[DifferentiableModel], float]:
    def work(model: DifferentiableModel) -> float:
        optimiser.zero_grad()
        loss = answer_loss(model, rows, edits, where)
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        return float(loss.detach())

    return work


def answer_loss(
    model: DifferentiableModel,
    rows: Sequence[_Row],
    edits: Mapping[HookPoint, LoReFT],
    where: WhereName,
) -> Tensor:
    """The mean −log p of all answers' tokens under `edits`."""
    fed = [row.tokens[:-1] for row in rows]
    mask = torch.zeros(len(rows), max(map(len, fed)), 1, dtype=torch.bool)
    for n, row in enumerate(rows):
        steered = row.steered(where)
        mask[n, steered.start : steered.stop] = True
    mask = mask.to(model.device)
    traced = model.run(fed, edits={p: _masked(edit, mask) for p, edit in edits.items()})
    logits = [traced.logits[n, row.prompt - 1 : len(row.tokens) - 1] for n, row in enumerate(rows)]
    wanted = [token for row in rows for token in row.tokens[row.prompt :]]
    return functional.cross_entropy(torch.cat(logits), torch.tensor(wanted, device=model.device))


def _masked(edit: LoReFT, mask: Tensor) -> Edit:
    return lambda x: torch.where(mask, edit(x).to(x.dtype), x)


def _batches(rows: Sequence[_Row], batch: int, seed: int) -> Iterator[list[_Row]]:
    """Batches without end; every row once in each turn through the data."""
    order = list(rows)
    draw = random.Random(seed)
    while True:
        draw.shuffle(order)
        for first in range(0, len(order), batch):
            yield order[first : first + batch]


def _row(engine: Engine, one: Exercise) -> _Row:
    prompt = prompt_tokens(engine, one.prompt)
    answer = part_tokens(engine.tokenizer, one.answer)
    asked = one.prompt.prompt if isinstance(one.prompt, Marked) else one.prompt
    end = answer_end(engine.tokenizer, chat=not isinstance(asked, str))
    whole = [*prompt, *answer, *([] if end is None else [end])]
    check_length(engine, whole, one.prompt)
    return _Row(tuple(whole), len(prompt))


def _check(
    engine: Engine,
    exercises: ExerciseSet,
    site: Site,
    rank: int,
    steps: int,
    batch: int,
) -> None:
    if not len(exercises):
        raise SteerError("there are no exercises to learn from", code="no_exercises")
    width = engine.info.width(site)
    if not 1 <= rank <= width:
        raise SteerError(
            f"a rank must be from 1 to the width, {width}; got {rank!r}", code="invalid_option"
        )
    if steps < 1 or batch < 1:
        raise SteerError(
            f"steps ({steps!r}) and batch ({batch!r}) must be at least 1", code="invalid_option"
        )
