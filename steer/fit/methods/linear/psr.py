"""What a system prompt does to the states, as one direction read and one written (PSR, 2605.03907).

    x ← x + ReLU(⟨w, x⟩ + b)·z

Only forward passes are needed. For prompts x, the same with an instruction x′, and answers y′ given
under x′, a token of y′ has one state after x′ and another after x; the shift between them is what
the instruction did. z is the unit direction that the shifts have most of (the first right singular
vector of all of them, not centred, pointing as their mean does), and w, b a regression of each
shift's length along z on the state without the instruction, through a ReLU: where the instruction
did much, much is added, and where nothing, nothing.

With several layers each is fitted after the ones before it, whose edits are on while the states
without the instruction are read (the greedy form of A-PSR). Memory per layer: two samples of at
most `sample` states, 2·sample·d.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from steer.artefacts.adapter_parts import EditRows
from steer.artefacts.control_vector import LowRankAdapter
from steer.artefacts.library import MemoryLibrary
from steer.engines.base import CaptureRequest, Engine
from steer.engines.plans import plans_of
from steer.errors import SteerError
from steer.fit.data.answering import completed
from steer.fit.data.instruction import Placement, Telling
from steer.fit.data.preferences import Preference, PreferenceSet
from steer.fit.data.where import WhereName, where_named
from steer.fit.measure.divergence import anchored
from steer.fit.methods.card import made_on, split
from steer.fit.methods.dictionaries.reservoir import Reservoir
from steer.fit.methods.linear.relu import ReluFit, relu_regression, unexplained
from steer.fit.methods.trained.rows import AnswerRow, answer_row
from steer.fit.states import Progress, make_reading
from steer.model import HookPoint
from steer.plan.plan import SteeringPlan
from steer.spec import Site, Where, parse_spec


@dataclass(frozen=True)
class _Told:
    """One answer after its prompt, and the same answer after the prompt with the instruction."""

    plain: AnswerRow
    told: AnswerRow


@dataclass(frozen=True)
class ShiftFit:
    """What was found for one layer: z, how states are read, and how well that explains shifts.

    `unexplained` is the share of the shifts along z, squared, that the read value leaves on answers
    held out, `constant` what their mean alone would leave, `along` the share of all shifts, squared
    too, that lies along z.
    """

    write: Tensor
    read: ReluFit
    unexplained: float
    constant: float
    along: float

    @property
    def edits(self) -> EditRows:
        """x + ReLU(⟨w, x⟩ + b)·z as an adapter's part."""
        bias = torch.tensor([self.read.bias])
        return EditRows(self.read.weight[None], self.write[None], bias, torch.zeros(1))

    def as_json(self) -> dict[str, float]:
        found = {
            "unexplained": self.unexplained,
            "unexplained_by_mean": self.constant,
            "shift_along": self.along,
        }
        return {name: round(value, 4) for name, value in found.items()}


def fit_psr(
    engine: Engine,
    preferences: PreferenceSet,
    *,
    name: str,
    instruction: str,
    layers: Sequence[int],
    place: Placement = "system",
    site: Site = "resid_post",
    where: WhereName = "onward",
    penalty: float = 1.0,
    max_tokens: int = 48,
    temperature: float = 1.0,
    sample: int = 8192,
    held_out: float = 0.2,
    seed: int = 0,
    batch: int = 8,
    description: str = "",
    licence: str = "",
    progress: Progress | None = None,
) -> LowRankAdapter:
    """An edit that does to the states what `instruction`, at its `place` in the prompt, does.

    The answers are those to prefer in `preferences`; where one is missing, the model gives it under
    `instruction`, at `temperature`. Each layer's regression pays `penalty` for ‖w‖² in units of the
    states, and is measured on a share `held_out` of the prompts, drawn with `seed`. `progress` is
    told of every answer that is asked for, and of every prompt that is read for each layer.

    Raises `SteerError` for unusable arguments, and where the instruction moves no state.
    """
    reading = make_reading(engine, site=site, layers=layers, batch=batch)
    default_where = where_named(where)
    data = completed(
        engine,
        preferences,
        instruction,
        sides=("chosen",),
        place=place,
        max_tokens=max_tokens,
        temperature=temperature,
        seed=seed,
        progress=progress,
    )
    telling = Telling(instruction, place)
    rows = [_told(engine, one, telling) for one in data.items]
    fitted, measured = split(rows, held_out, seed)
    found: dict[int, ShiftFit] = {}
    for point in reading.points:
        plan = _plan(engine, found, site, default_where)
        shifts = _Shifts(engine, point, plan, batch, sample, progress)
        states, held = shifts.read(fitted, seed), shifts.read(measured, seed)
        found[point.layer] = shift_fit(*states, *held, penalty)
    return LowRankAdapter.of(
        {layer: one.edits for layer, one in found.items()},
        name=name,
        model=engine.info.own_name,
        site=site,
        default_where=default_where,
        description=description,
        licence=licence,
        provenance={
            "method": "psr",
            "data_sha256": preferences.sha256,
            "instruction": instruction,
            "place": place,
            "prompts": len(data),
            "held_out_prompts": 0 if len(fitted) == len(data) else len(measured),
            "penalty": penalty,
            "temperature": temperature,
            "shifts": {str(layer): one.as_json() for layer, one in found.items()},
            "seed": seed,
            **made_on(engine),
        },
    )


def shift_fit(
    states: Tensor, shifts: Tensor, held_states: Tensor, held_shifts: Tensor, penalty: float
) -> ShiftFit:
    """z, w and b from `states` and `shifts` `[n, d]`, measured on others.

    Raises `SteerError` (`no_difference`) where there are no shifts.
    """
    if not bool(shifts.any()):
        raise SteerError(
            "the instruction changes no state on a layer asked for: read a later one, or give "
            "another instruction",
            code="no_difference",
        )
    direction = torch.linalg.svd(shifts.double(), full_matrices=False).Vh[0]
    if float(direction @ shifts.double().mean(0)) < 0:
        direction = -direction
    read = relu_regression(states.double(), shifts.double() @ direction, penalty)
    lengths = held_shifts.double() @ direction
    return ShiftFit(
        write=direction,
        read=read,
        unexplained=unexplained(lengths, read(held_states.double())),
        constant=unexplained(lengths, lengths.mean().expand_as(lengths)),
        along=float(lengths.square().sum() / held_shifts.double().square().sum()),
    )


def _told(engine: Engine, one: Preference, telling: Telling) -> _Told:
    assert one.chosen is not None, "an answer is missing"
    prompts = (one.prompt, telling(one.prompt))
    return _Told(*(answer_row(engine, prompt, one.chosen, ends=False) for prompt in prompts))


def _plan(
    engine: Engine, found: Mapping[int, ShiftFit], site: Site, where: Where | None
) -> SteeringPlan | None:
    """The edits of the layers before, where they will act; none on the first layer."""
    if not found:
        return None
    edits = {layer: one.edits for layer, one in found.items()}
    adapter = LowRankAdapter.of(edits, site=site, default_where=where)
    spec = {"interventions": [{"kind": "low_rank", "adapter": "before"}]}
    return plans_of(engine, MemoryLibrary(low_ranks={"before": adapter})).plan(parse_spec(spec))


@dataclass(frozen=True)
class _Shifts:
    """States of answers without the instruction, and what it adds to them, at one hook point."""

    engine: Engine
    point: HookPoint
    plan: SteeringPlan | None
    batch: int
    sample: int
    progress: Progress | None

    def read(self, rows: Sequence[_Told], seed: int) -> tuple[Tensor, Tensor]:
        """Both `[n, d]`, n at most `sample`."""
        width = self.engine.info.width(self.point.site)
        kept = Reservoir(2 * width, self.sample, seed)
        for states, shifts in self._each(rows):
            kept.add(torch.cat([states, shifts], -1))
        return kept.rows[:, :width], kept.rows[:, width:]

    def _on(self, row: AnswerRow) -> SteeringPlan | None:
        return None if self.plan is None else anchored(self.plan, row.prompt)

    def _each(self, rows: Sequence[_Told]) -> Iterator[tuple[Tensor, Tensor]]:
        for first in range(0, len(rows), self.batch):
            group = rows[first : first + self.batch]
            prompts = [one.fed for row in group for one in (row.plain, row.told)]
            plans = [plan for row in group for plan in (self._on(row.plain), None)]
            found = self.engine.capture(CaptureRequest(prompts, (self.point,), plans=plans))
            for n, row in enumerate(group):
                plain, told = (
                    found[2 * n + side].states[self.point][one.prompt - 1 :]
                    for side, one in ((0, row.plain), (1, row.told))
                )
                yield plain, told - plain
            if self.progress is not None:
                self.progress(len(group))
