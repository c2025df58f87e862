"""Which replica reads which prompts of a capture."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

from steer.engines.base import CaptureRequest


def divided(request: CaptureRequest, parts: int) -> list[list[int]]:
    """The prompts of `request` by number, in `parts` of about equally many tokens.

    Prompts with a common beginning come together, where that is computed once: they are laid in
    order, and the row is cut. The same request is divided in the same way each time.
    """
    beginnings = [_beginning(prompt, request.tail) for prompt in request.prompts]
    order = sorted(range(len(beginnings)), key=beginnings.__getitem__)
    reached = list(accumulate(len(request.prompts[n]) for n in order))
    total = reached[-1] if reached else 0
    found: list[list[int]] = [[] for _ in range(parts)]
    for n, end in zip(order, reached, strict=True):
        middle = end - len(request.prompts[n]) / 2
        found[min(int(parts * middle / max(total, 1)), parts - 1)].append(n)
    return [sorted(part) for part in found]


def _beginning(prompt: Sequence[int], tail: int | None) -> tuple[int, ...]:
    return tuple(prompt if tail is None else prompt[: max(len(prompt) - tail, 0)])
