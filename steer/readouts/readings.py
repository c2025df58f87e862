"""Reading in a forward pass: the readers of its requests see the states, each row once.

T tokens of the batch (packed, or a padded batch flattened), d the width of the states.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from steer.errors import EngineError
from steer.model import HookPoint
from steer.readouts.plan import ReadoutPlan
from steer.readouts.readers import Instruments, LensReader, Reader, read_lenses

Row = NDArray[np.float32]
"""The numbers of one token `[n]`."""


class RequestReadouts:
    """What one request has shown so far, by position.

    Guarantees: `take` gives each position once, in order, whatever was computed twice or was
    drafted and dropped.
    """

    def __init__(
        self,
        plan: ReadoutPlan,
        prompt_length: int,
        owns: Callable[[HookPoint], bool] = lambda _: True,
    ) -> None:
        """`owns` says which hook points lie here: columns of others stay NaN, and where none does
        nothing is read."""
        self.plan, self.prompt_length = plan, prompt_length
        self.columns = [(one, place) for one, place in plan.columns() if owns(one.point)]
        self._first, self._end = plan.wanted(prompt_length)
        self._next = self._first if self.columns else self._end
        self._rows: dict[int, Row] = {}
        self._fault: str | None = None

    @property
    def reads_generated(self) -> bool:
        """Whether states of generated tokens are read."""
        return bool(self.columns) and self._end > self.prompt_length

    def fail(self, why: str) -> None:
        """Something that it asks for could not be read: nothing more is handed out."""
        self._fault = self._fault or why

    def wanted(self, start: int, count: int) -> range:
        """Which of the positions `[start, start + count)` are read."""
        if not self.columns:
            return range(0)
        return range(max(start, self._first), min(start + count, self._end))

    def put(self, positions: range, columns: slice, numbers: Row) -> None:
        """The `numbers` `[positions, n]` of one reader."""
        for position, row in zip(positions, numbers, strict=True):
            if position < self._next:
                continue  # computed again
            if position not in self._rows:
                self._rows[position] = np.full(self.plan.width, np.nan, dtype=np.float32)
            self._rows[position][columns] = row

    def take(self, fed: int) -> list[tuple[int, Row]]:
        """The rows of the positions below `fed` that were not handed out before.

        Raises `EngineError` (`readouts_missed`) where one was never computed, or not read.
        """
        if self._fault is not None:
            raise EngineError(
                f"the read-outs that were asked for could not be made, so the answer is withheld: "
                f"{self._fault}",
                code="readouts_missed",
            )
        end = min(fed, self._end)
        if end <= self._next:
            return []
        wanted, self._next = range(self._next, end), end
        missed = [position for position in wanted if position not in self._rows]
        if missed:
            raise EngineError(
                f"no read-outs were made of the token at position {missed[0]}, so the answer is "
                "withheld",
                code="readouts_missed",
            )
        return [(position, self._rows.pop(position)) for position in wanted]


class SeesRows(Protocol):
    """What a pass hands its numbers to: `RequestReadouts`, or the states that are kept for a twin
    (`twins.KeptStates`)."""

    @property
    def columns(self) -> Sequence[tuple[Any, slice]]:
        """The readers here, each with its place in a row."""

    def wanted(self, start: int, count: int) -> range: ...

    def put(self, positions: range, columns: slice, numbers: Row) -> None: ...

    def fail(self, why: str) -> None: ...


@dataclass(frozen=True)
class ReadSpan:
    """The tokens of one request in a pass: `count` from position `start` on, at the batch's rows
    from `offset` on."""

    request: SeesRows
    offset: int
    start: int
    count: int


@dataclass
class _Group:
    """A reader and all rows that it reads, `[R]`, with whose they are: `parts` are the request,
    its columns, and its span's place."""

    reader: Reader
    rows: Tensor
    parts: list[tuple[int, slice]] = field(default_factory=list)
    seen: Tensor | None = None
    """What was read, `[R, n]`, or for a lens the states that are to be read."""


class Readings:
    """What one pass reads, and with `move` those that follow it.

    Assumes: hooks call `see` once for each of `points`, then `finish` is called.
    Guarantees: nothing that goes wrong here ends a pass; it ends the requests that asked for it,
    when they `take`.
    """

    def __init__(self, spans: Sequence[tuple[ReadSpan, range]], tools: Instruments) -> None:
        self._spans = [span for span, _ in spans]
        self._positions = [positions for _, positions in spans]
        self._tools = tools
        self._groups: dict[HookPoint, list[_Group]] = {}
        for group in _grouped(spans, tools.device):
            self._groups.setdefault(group.reader.point, []).append(group)
        self.points = frozenset(self._groups)

    @staticmethod
    def of(spans: Sequence[ReadSpan], tools: Instruments) -> Readings | None:
        """The readings of a pass; None where nothing in it is to be read."""
        wanted = [(span, span.request.wanted(span.start, span.count)) for span in spans]
        found = [(span, positions) for span, positions in wanted if positions]
        return Readings(found, tools) if found else None

    def see(self, point: HookPoint, before: Tensor, after: Tensor) -> None:
        """Shows the states `[..., d]` at `point`, T rows in all, before and after its edits."""
        groups = self._groups.get(point, ())
        if not groups:
            return
        flat, edited = before.reshape(-1, before.shape[-1]), after.reshape(-1, after.shape[-1])
        for group in groups:
            try:
                # Copies: later modules may add to these tensors in place.
                mine = edited.index_select(0, group.rows)
                was = mine if after is before else flat.index_select(0, group.rows)
                if isinstance(group.reader, LensReader):
                    group.seen = group.reader.states(mine, self._tools)
                else:
                    group.seen = group.reader.read(was, mine, self._tools)
            except Exception as error:
                self._fail([group], f"{type(error).__name__}: {error}")

    def move(self, starts: Mapping[int, int]) -> None:
        """Takes each request on by a token: `starts` are the new positions by offset.

        Assumes: spans of one token, all of them wanted again.
        """
        self._positions = [
            range(starts[span.offset], starts[span.offset] + 1) for span in self._spans
        ]

    def finish(self) -> None:
        """Hands what was read to the requests; called when the pass is over."""
        groups = [group for found in self._groups.values() for group in found]
        try:
            _read_lenses(groups, self._tools)
        except Exception as error:
            lenses = [group for group in groups if isinstance(group.reader, LensReader)]
            self._fail(lenses, f"{type(error).__name__}: {error}")
        for group in groups:
            if group.seen is None:
                self._fail([group], f"no state passed {group.reader.point}")
                continue
            numbers, group.seen = group.seen.float().cpu().numpy(), None
            start = 0
            for place, columns in group.parts:
                positions = self._positions[place]
                end = start + len(positions)
                self._spans[place].request.put(positions, columns, numbers[start:end])
                start = end

    def _fail(self, groups: Sequence[_Group], why: str) -> None:
        """Ends the requests that read by `groups`, and them alone."""
        for group in groups:
            group.seen = None
            for place, _ in group.parts:
                self._spans[place].request.fail(why)


def _read_lenses(groups: Sequence[_Group], tools: Instruments) -> None:
    """Reads the states that lenses have kept."""
    kept = [
        (group, group.reader, group.seen)
        for group in groups
        if isinstance(group.reader, LensReader) and group.seen is not None
    ]
    if kept:
        _, readers, states = zip(*kept, strict=True)
        for (group, _, _), numbers in zip(kept, read_lenses(readers, states, tools), strict=True):
            group.seen = numbers


def _grouped(spans: Sequence[tuple[ReadSpan, range]], device: torch.device) -> list[_Group]:
    """The readers of all spans, each once with the rows of all who have it."""
    readers: dict[str, Reader] = {}
    parts: dict[str, list[tuple[int, slice]]] = {}
    for place, (span, _) in enumerate(spans):
        for reader, columns in span.request.columns:
            readers.setdefault(reader.key, reader)
            parts.setdefault(reader.key, []).append((place, columns))
    rows = [
        np.arange(len(positions), dtype=np.int64) + span.offset + positions.start - span.start
        for span, positions in spans
    ]
    return [
        _Group(
            readers[key],
            torch.from_numpy(np.concatenate([rows[place] for place, _ in mine])).to(device),
            mine,
        )
        for key, mine in parts.items()
    ]
