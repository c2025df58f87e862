"""`kl` where the unsteered twin runs when the answer is complete.

A token's distribution follows from the state after the last block, at the token before it. So the
steered states are kept as they are made, the twin is one pass without the plan over the tokens that
were chosen, and the model's own head reads both. What is kept of a token is a state `[d_model]` and
not a row of logits `[vocab]`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from steer.errors import EngineError
from steer.model import HookPoint, ModelInfo
from steer.readouts.measures import kl_divergence
from steer.readouts.readers import Instruments
from steer.readouts.readings import Row

_LOGITS_AT_ONCE = 1 << 22
"""Logits that are held of each side at a time, in float64 32 MiB."""


def chosen_at(info: ModelInfo) -> HookPoint:
    """Where the state lies that the next token is chosen from."""
    return HookPoint(info.n_layers - 1, "resid_post")


@dataclass(frozen=True)
class StateReader:
    """The state itself, `width` numbers, after the edits of its point."""

    point: HookPoint
    width: int

    @property
    def key(self) -> str:
        return f"state {self.point}"

    def read(self, before: Tensor, after: Tensor, tools: Instruments) -> Tensor:  # noqa: ARG002
        return after


class KeptStates:
    """The states that the tokens behind a prompt are chosen from, by position, until they are
    compared.

    Guarantees: of a token that was computed again, or in the place of a draft that did not stay,
    the last state counts, which is the one that stayed.
    """

    def __init__(
        self,
        info: ModelInfo,
        prompt_length: int,
        owns: Callable[[HookPoint], bool] = lambda _: True,
    ) -> None:
        """`owns` says which hook points lie here: nothing is kept where the last one does not."""
        reader = StateReader(chosen_at(info), info.d_model)
        self.columns = [(reader, slice(0, info.d_model))] if owns(reader.point) else []
        self._first = prompt_length - 1
        self._rows: dict[int, Row] = {}
        self._fault: str | None = None

    def fail(self, why: str) -> None:
        """Something could not be read: `take` will raise."""
        self._fault = self._fault or why

    def wanted(self, start: int, count: int) -> range:
        """Which of the positions `[start, start + count)` are kept: from the prompt's last on."""
        if not self.columns:
            return range(0)
        return range(max(start, self._first), max(start + count, self._first))

    def put(self, positions: range, columns: slice, numbers: Row) -> None:  # noqa: ARG002
        """The states `[positions, d_model]`."""
        for position, row in zip(positions, numbers, strict=True):
            self._rows[position] = row.copy()  # not the whole batch's

    def take(self, fed: int) -> Float[Tensor, "n d"]:
        """The states at the positions from the prompt's last to before `fed`, which are then gone.

        Raises `EngineError` (`readouts_missed`) where one was never computed, or not read.
        """
        rows, self._rows = self._rows, {}
        missed = [at for at in range(self._first, fed) if at not in rows]
        if self._fault is not None or missed:
            why = self._fault or f"no state was kept of the token at position {missed[0]}"
            raise EngineError(
                f"the divergences that were asked for could not be made, so the answer is "
                f"withheld: {why}",
                code="readouts_missed",
            )
        if fed <= self._first:
            return torch.zeros(0, 0)
        return torch.from_numpy(np.stack([rows[at] for at in range(self._first, fed)]))


def divergences(
    steered: Float[Tensor, "n d"], plain: Float[Tensor, "n d"], tools: Instruments
) -> list[float] | None:
    """KL(p ‖ q) in nats of what the model's head makes of each pair of states, a bounded number of
    logits at a time; None on a worker that takes part in making logits and gets none."""
    assert tools.unembed is not None, "checked when the spec was compiled"
    rows = max(1, _LOGITS_AT_ONCE // max(tools.vocab_size, 1))
    found: list[float] = []
    missing = False
    for mine, theirs in zip(torch.split(steered, rows), torch.split(plain, rows), strict=True):
        logits = tools.unembed(mine.to(tools.device))
        reference = tools.unembed(theirs.to(tools.device))
        if logits is None or reference is None:
            missing = True  # and on to the end, where the other ranks go
            continue
        found += kl_divergence(logits, reference).tolist()
    return None if missing else found
