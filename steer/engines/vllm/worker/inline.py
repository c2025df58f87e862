"""The tokens that a compiled graph steers by itself, by constants in its own buffers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from steer.batch.requests import Ints
from steer.engines.vllm.taps.shifts import Key, Shifts
from steer.engines.vllm.taps.taps import tap_of
from steer.engines.vllm.worker.prepared import ScheduledRequest


def assign_shifts(
    shifts: Shifts, scheduled: Sequence[ScheduledRequest], total: int
) -> tuple[list[ScheduledRequest], list[Ints]]:
    """Names the variant of each of the `total` tokens of the coming pass; the requests that found
    room, and for each the rules that select its tokens. The others run through the tables."""
    selected = [one.request.selected(one.start, one.ids).astype(np.int64) for one in scheduled]
    wanted = [
        {(one.request.ticket.fingerprint, chosen) for chosen in set(mine.tolist())}
        for one, mine in zip(scheduled, selected, strict=True)
    ]
    keep: set[Key] = set().union(*wanted)
    variants = np.zeros(total, dtype=np.int64)
    inline, recorded = [], []
    for one, mine, keys in zip(scheduled, selected, wanted, strict=True):
        plan = one.request.plan
        assert plan is not None
        numbers = {0: 0}
        for key in keys:
            number = shifts.find(plan, key[1], tap_of, keep)
            if number is None:
                break
            numbers[key[1]] = number
        else:
            one.variants = numbers
            variants[one.place] = [numbers[chosen] for chosen in mine.tolist()]
            inline.append(one)
            recorded.append(mine)
    shifts.assign(torch.from_numpy(variants))
    return inline, recorded
