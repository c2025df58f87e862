"""Gates by detectors that pool: the value at a token is made of the scores of several.

    p_t = max or mean of s over the last n tokens that the gate has read, t the last of them

A gate of scope "token" or "onward" reads the tokens that its rule selects, one of scope "prompt"
the last of the prompt. So what was read is kept by position: a pass replaces what was known of the
tokens that it computes (for the first time, again after a preemption, or in the place of drafts
that did not stay), and what lies before them stands.

K tokens of a pass that are read, n the most tokens that one of their gates pools.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from steer.batch.requests import Ints
from steer.model import HookPoint
from steer.plan.plan import Gate

_FIRST_POSITIONS = 64


@dataclass(frozen=True)
class PooledTokens:
    """The tokens of one request in a pass, at `place` in the batch, as a `gate` that pools sees
    them, that of rule `number`; `row` is the request's in the ledger."""

    row: int
    number: int
    gate: Gate
    prompt_length: int
    place: slice


@dataclass(frozen=True)
class PoolWindows:
    """Which scores are pooled at each token that gates read: where it lies in the batch, the `line`
    that keeps its request's scores, and the positions of what is pooled there, its own first, -1
    where there is none. `mean` are those of which the mean is taken."""

    place: Int[Tensor, " K"]
    line: Int[Tensor, " K"]
    window: Int[Tensor, "K n"]
    mean: Bool[Tensor, " K"]


@dataclass
class _Line:
    """Where the scores are kept that one rule's gate read of one request, and the positions of the
    tokens that it read, ascending."""

    line: int
    read: list[int] = field(default_factory=list)


class PooledScores:
    """The scores that pooled gates have read, by row of the ledger, rule and position.

    Assumes: `expect` is called before a pass, and before the passes that carry it on; `pooled` with
    what it has given, once the scores are known.
    Guarantees: what is pooled at a token depends on the scores of the tokens up to it alone,
    whatever passes computed them; of a token that was computed again the last score counts.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self._scores = torch.zeros(0, _FIRST_POSITIONS, device=device)
        self._lines: dict[tuple[int, int], _Line] = {}
        self._free: list[int] = []

    def forget(self, row: int) -> None:
        """Everything that was read of the request in `row`."""
        for key in [key for key in self._lines if key[0] == row]:
            self._free.append(self._lines.pop(key).line)

    def expect(
        self, tokens: Sequence[PooledTokens], read: Ints, positions: Ints
    ) -> dict[tuple[HookPoint, int], PoolWindows]:
        """What the gates of each hook point and rule pool in the coming pass, whose tokens are at
        `positions` `[T]`, and are shown to gates where the slots `read` `[P, T]` are not 0."""
        found: dict[tuple[HookPoint, int], list[tuple[PooledTokens, int, Ints, Ints]]] = {}
        for one in tokens:
            line, places, windows = self._read(one, read, positions)
            if len(places):
                key = (one.gate.point, one.number)
                found.setdefault(key, []).append((one, line, places, windows))
        return {key: self._joined(parts) for key, parts in found.items()}

    def pooled(self, windows: PoolWindows, values: Float[Tensor, " T"]) -> Float[Tensor, " T"]:
        """`values`, the scores of a pass, with what gates pool in the place of what they read at
        the tokens of `windows`. A mean is summed in float64, as far as the device has it."""
        self._scores[windows.line, windows.window[:, 0]] = values[windows.place]
        scores = self._scores[windows.line[:, None], windows.window.clamp_min(0)]
        return values.index_copy(0, windows.place, pool(scores, windows.window >= 0, windows.mean))

    def _read(self, one: PooledTokens, read: Ints, positions: Ints) -> tuple[int, Ints, Ints]:
        """The line of a request's scores, where the tokens lie in the batch that its gate reads,
        and the positions `[K, n]` of what it pools at each."""
        held = self._lines.get((one.row, one.number))
        if held is None:
            held = self._lines[one.row, one.number] = _Line(self._free_line())
        here = positions[one.place]
        mine = read[one.number, one.place] != 0
        if one.gate.prompt_scope:
            mine &= here < one.prompt_length
        places = np.arange(one.place.start, one.place.stop)[mine]
        if not len(here):
            return held.line, places, np.zeros((0, one.gate.last), dtype=np.int64)
        first = bisect_left(held.read, int(here[0]))
        held.read[first : bisect_left(held.read, int(here[-1]) + 1)] = here[mine].tolist()
        if len(places):
            self._widen(int(here[-1]) + 1)
        last, count = one.gate.last, len(places)
        # In front of the first token that was ever read there is nothing.
        known = held.read[max(first - last + 1, 0) : first + count]
        padded = np.array([-1] * (last - 1 + count - len(known)) + known, dtype=np.int64)
        windows = padded[np.arange(count)[:, None] + np.arange(last - 1, -1, -1)]
        return held.line, places, windows

    def _joined(self, parts: Sequence[tuple[PooledTokens, int, Ints, Ints]]) -> PoolWindows:
        longest = max(one.gate.last for one, *_ in parts)
        counts = [len(places) for _, _, places, _ in parts]
        windows = [
            np.pad(window, ((0, 0), (0, longest - window.shape[1])), constant_values=-1)
            for *_, window in parts
        ]
        device = self._scores.device
        lines = np.repeat(np.array([line for _, line, _, _ in parts], dtype=np.int64), counts)
        means = np.repeat(np.array([one.gate.pooling == "mean" for one, *_ in parts]), counts)
        return PoolWindows(
            torch.from_numpy(np.concatenate([places for _, _, places, _ in parts])).to(device),
            torch.from_numpy(lines).to(device),
            torch.from_numpy(np.concatenate(windows)).to(device),
            torch.from_numpy(means).to(device),
        )

    def _free_line(self) -> int:
        if self._free:
            return self._free.pop()
        lines, length = self._scores.shape
        if len(self._lines) == lines:
            more = self._scores.new_zeros(max(lines, 1), length)
            self._scores = torch.cat([self._scores, more])
        return len(self._lines)

    def _widen(self, length: int) -> None:
        """Makes room for positions up to `length`."""
        lines, had = self._scores.shape
        if length > had:
            more = self._scores.new_zeros(lines, max(length, 2 * had) - had)
            self._scores = torch.cat([self._scores, more], dim=1)


def pool(
    scores: Float[Tensor, "K n"], there: Bool[Tensor, "K n"], mean: Bool[Tensor, " K"]
) -> Float[Tensor, " K"]:
    """The mean, or the greatest, of the scores that are `there`, one at least; NaN where one of
    them is."""
    wide = scores.float() if scores.device.type == "mps" else scores.double()
    average = torch.where(there, wide, 0.0).sum(-1) / there.sum(-1)
    greatest = torch.where(there, scores, -torch.inf).amax(-1)
    return torch.where(mean, average.to(scores.dtype), greatest)
