"""What is read of a sequence, put together for its events."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace

from steer.engines.base import TokenReadout
from steer.readouts.readings import RequestReadouts


def joined(found: Iterable[TokenReadout]) -> tuple[TokenReadout, ...]:
    """One entry for each token, in their order: a divergence may come long after the numbers."""
    tokens: dict[int, TokenReadout] = {}
    for one in found:
        known = tokens.setdefault(one.position, one)
        if known is not one:
            kl = known.kl if one.kl is None else one.kl
            tokens[one.position] = replace(known, numbers=known.numbers or one.numbers, kl=kl)
    return tuple(tokens[position] for position in sorted(tokens))


class ReadoutJoin:
    """Puts the numbers of a sequence's tokens and the divergences by which they were chosen
    together: a divergence is there a pass before the token's other numbers, and waits for them."""

    def __init__(self, readouts: RequestReadouts) -> None:
        self._readouts = readouts
        self._kl: dict[int, float] = {}

    def chosen(self, position: int, kl: float) -> None:
        """The token at `position` was chosen, from a distribution that far from the twin's."""
        self._kl[position] = kl

    def take(self, tokens: Callable[[int], int], fed: int, *, last: bool) -> Iterator[TokenReadout]:
        """What is new of the first `fed` tokens; of the `last` one, and where no numbers of
        generated tokens are read, the divergence alone. `tokens` gives the one at a position."""
        rows = dict(self._readouts.take(fed))
        alone = last or not self._readouts.reads_generated
        due = sorted(at for at in self._kl if alone or at < fed)
        for at in sorted({*rows, *due}):
            numbers = tuple(rows[at].tolist()) if at in rows else ()
            yield TokenReadout(at, tokens(at), numbers, self._kl.pop(at, None))
