"""Taps that are in place only in the layers where somebody is steered or read.

In an eager engine a tap is a few calls of Python in every layer. While nobody needs a layer's, its
modules have the `forward` that they had before, so that an idle step runs what vLLM alone runs.
Where a graph was traced or captured with its taps they must stay: there this has no place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Set
from typing import Any, NamedTuple

from torch import nn

_FORWARD = "forward"
_NOWHERE: frozenset[int] = frozenset()


class _Tapped(NamedTuple):
    """A module, and what it has for a `forward` of its own, with its taps and without."""

    module: nn.Module
    tapped: Any
    plain: Any

    def turn(self, *, on: bool) -> None:
        """Puts one in the place of the other; what somebody has wrapped around it since stays."""
        mine, other = (self.tapped, self.plain) if on else (self.plain, self.tapped)
        own = vars(self.module)
        if own.get(_FORWARD) is not other:
            return
        if mine is None:
            del own[_FORWARD]
        else:
            own[_FORWARD] = mine


class TapSwitch:
    """Guarantees: a layer that is off is as it was before; a tap that somebody has wrapped since
    stays in place, and does nothing where the running pass has nothing to do there."""

    def __init__(
        self, layers: Mapping[int, Iterable[nn.Module]], install: Callable[[], None]
    ) -> None:
        """`install` puts taps into some of the modules of `layers`; all are off after it."""
        before = {
            number: {module: vars(module).get(_FORWARD) for module in modules}
            for number, modules in layers.items()
        }
        install()
        self._tapped = {
            number: [
                _Tapped(module, tapped, plain)
                for module, plain in modules.items()
                if (tapped := vars(module).get(_FORWARD)) is not plain
            ]
            for number, modules in before.items()
        }
        self._on: Set[int] = self._tapped.keys()
        self.turn(_NOWHERE)

    def turn(self, layers: Set[int]) -> None:
        """Puts the taps of `layers` in place, and takes out all others."""
        if layers == self._on:
            return
        for number in self._on ^ layers:
            for one in self._tapped.get(number, ()):
                one.turn(on=number in layers)
        self._on = layers
