"""What Steer knows about the model being served: its hook points, widths and abilities."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from steer.errors import IncompatibleArtefact, Unsupported
from steer.spec import Site


class HookPoint(NamedTuple):
    """A place in the forward pass: a 0-based decoder block and a site within it.

    `resid_post` of block i is that block's true output; `resid_mid` is the stream between
    attention and MLP; `attn_out` and `mlp_out` are what those parts add to the stream; `mlp_act`
    and `head_out` are the inputs of their output projections.
    """

    layer: int
    site: Site = "resid_post"

    def __str__(self) -> str:
        return f"{self.layer}.{self.site}"


SITE_ORDER: dict[Site, int] = {
    "resid_pre": 0,
    "head_out": 1,
    "attn_out": 2,
    "resid_mid": 3,
    "mlp_act": 4,
    "mlp_out": 5,
    "resid_post": 6,
}


def forward_order(point: HookPoint) -> tuple[int, int]:
    """Sorts hook points in the order in which a forward pass reaches them."""
    return (point.layer, SITE_ORDER[point.site])


@dataclass(frozen=True)
class ModelInfo:
    """The shape of a decoder-only model, as plans and artefacts need it."""

    name: str
    architecture: str
    n_layers: int
    d_model: int
    vocab_size: int
    max_length: int
    dtype: str = "float32"
    sites: tuple[Site, ...] = ("resid_post",)
    d_mlp: int | None = None
    n_heads: int | None = None
    head_dim: int | None = None

    def width(self, site: Site) -> int:
        """The length of an activation row at `site`."""
        if site == "mlp_act":
            return self.d_mlp or 0
        if site == "head_out":
            return (self.n_heads or 0) * (self.head_dim or 0)
        return self.d_model

    def check_point(self, point: HookPoint, *, param: str | None = None) -> None:
        """Raises unless `point` exists in this model."""
        if not 0 <= point.layer < self.n_layers:
            raise IncompatibleArtefact(
                f"layer {point.layer} is out of range: {self.name!r} has layers "
                f"0 to {self.n_layers - 1}",
                code="layer_out_of_range",
                param=param,
            )
        if point.site not in self.sites:
            raise Unsupported(
                f"the site {point.site!r} does not exist in {self.architecture}: "
                f"use one of {', '.join(self.sites)}",
                code="unsupported_site",
                param=param,
            )


@dataclass(frozen=True)
class Capabilities:
    """What an engine can really do; anything else is refused by name at admission."""

    engine: str
    kinds: tuple[str, ...]
    sites: tuple[Site, ...]
    strength_units: tuple[str, ...] = ("multiple", "norm")
    gate_scopes: tuple[str, ...] = ("prompt", "token")
    sae_architectures: tuple[str, ...] = ()
    norm_preserving: bool = True
    sampling: tuple[str, ...] = ()
    inspection: tuple[str, ...] = ()
    limits: dict[str, int] = field(default_factory=dict)
