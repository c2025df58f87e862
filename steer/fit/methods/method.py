"""The methods a vector can be fitted by, and what one has to offer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Protocol, TypeAlias

from torch import Tensor

from steer.fit.methods.diffmean import DifferenceOfMeans
from steer.fit.methods.logistic import LogisticDirection
from steer.fit.methods.pca import UncentredPCA


class Method(Protocol):
    """Takes states batch by batch, and answers with a direction at the end."""

    def add(self, positive: Tensor, negative: Tensor) -> None:
        """Takes states of both classes, `[n, d]` each: of n pairs, unless the method is one of
        `UNPAIRED`."""

    def direction(self) -> Tensor:
        """The direction `[d]` towards the positive class; strength 1 crosses the class gap."""

    @property
    def held_floats(self) -> int:
        """Numbers in memory now."""


MakeMethod: TypeAlias = Callable[[int], Method]

METHODS: Mapping[str, MakeMethod] = MappingProxyType(
    {"diffmean": DifferenceOfMeans, "pca": UncentredPCA, "logistic": LogisticDirection}
)
"""Methods on pairs, each made from the width of a state."""

UNPAIRED: Mapping[str, MakeMethod] = MappingProxyType(
    {"diffmean": DifferenceOfMeans, "logistic": partial(LogisticDirection, paired=False)}
)
"""Methods on two classes of different sizes."""
