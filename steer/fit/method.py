"""The methods a vector can be fitted by, and what one has to offer."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal, Protocol, TypeAlias

from torch import Tensor

from steer.fit.diffmean import DifferenceOfMeans
from steer.fit.pca import UncentredPCA

MethodName: TypeAlias = Literal["diffmean", "pca"]


class Method(Protocol):
    """Takes pairs of states batch by batch, and answers with a direction at the end."""

    def __init__(self, width: int) -> None: ...

    def add(self, positive: Tensor, negative: Tensor) -> None:
        """Takes the states `[n, d]` of n pairs."""

    def direction(self) -> Tensor:
        """The direction `[d]` towards the positive class; strength 1 crosses the class gap."""

    @property
    def held_floats(self) -> int:
        """Numbers in memory now."""


METHODS: Mapping[str, type[Method]] = MappingProxyType(
    {"diffmean": DifferenceOfMeans, "pca": UncentredPCA}
)
