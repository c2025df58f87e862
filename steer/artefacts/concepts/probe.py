"""Probes: a small network, the names that it was taught, and how well it reads them."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from steer.artefacts.concepts.codebook import Codebook
from steer.artefacts.concepts.form import ProbeForm
from steer.artefacts.concepts.network import CodeNetwork, summed_centroids
from steer.artefacts.control_vector import Card, canonical_bytes, parse_canonical
from steer.errors import FileFormatError, IncompatibleArtefact, SteerError
from steer.model import HookPoint, ModelInfo
from steer.spec import Site

SITE: Site = "resid_post"


@dataclass(frozen=True, eq=False)
class ConceptProbe:
    """A network, and on its card the layers that it reads together and its form.

    Guarantees: finite, of the shapes that the card says, reads at `resid_post`.
    """

    network: CodeNetwork
    card: Card

    @staticmethod
    def of(network: CodeNetwork, *, form: ProbeForm, **card: Any) -> ConceptProbe:
        """A checked probe; `card` holds any other field of `Card`, `layers` among them. Raises
        `FileFormatError`."""
        width = _check(network, form)
        described = Card(**{"kind": "probe", "width": width, "probe": form, **card})
        if described.site != SITE or not described.layers:
            raise FileFormatError(
                f"a probe reads one layer or more, at {SITE}; the card says "
                f"{list(described.layers)} at {described.site}",
                code="invalid_card",
            )
        return ConceptProbe(network, described)

    @property
    def form(self) -> ProbeForm:
        """What it was taught. Raises `FileFormatError` for a card without one."""
        if self.card.probe is None:
            raise FileFormatError("a probe's card says what it was taught ('probe')")
        return self.card.probe

    @property
    def points(self) -> tuple[HookPoint, ...]:
        """Where it reads."""
        return tuple(HookPoint(layer) for layer in self.card.layers)

    @property
    def codebook(self) -> Codebook:
        """The codes of its names."""
        return Codebook(self.form.dimensions, self.form.seed)

    def check_fits(self, model: ModelInfo) -> None:
        """Raises `IncompatibleArtefact` unless `model` has this width and these layers."""
        if self.card.width != model.d_model:
            raise IncompatibleArtefact(
                f"the probe {self.card.name!r} reads states of width {self.card.width}; "
                f"{model.name!r} has {model.d_model}",
                code="wrong_width",
            )
        for point in self.points:
            try:
                model.check_point(point)
            except SteerError as error:
                raise IncompatibleArtefact(
                    f"the probe {self.card.name!r} does not fit: {error}", code=error.code
                ) from None

    def code(self, states: Float[Tensor, "N layers width"]) -> Float[Tensor, "N dimensions"]:
        """What it says of tokens, whose states at its layers these are."""
        form = self.form
        inputs = [summed_centroids(one, form.clusters, form.seed) for one in states]
        return self.network.code(torch.stack(inputs))

    @cached_property
    def sha256(self) -> str:
        """The identity of the probe: the hash of its canonical file."""
        return hashlib.sha256(self.to_bytes()).hexdigest()

    def to_bytes(self) -> bytes:
        """The canonical file: `probe.mean`, `.scale`, `.hidden_weight` and so on, and the card."""
        return canonical_bytes(
            {f"probe.{name}": one for name, one in self.network.tensors.items()}, self.card
        )

    @staticmethod
    def from_bytes(data: bytes, *, name: str = "") -> ConceptProbe:
        tensors, card = parse_canonical(data, name)
        return ConceptProbe(
            CodeNetwork(**{one.name: tensors[f"probe.{one.name}"] for one in fields(CodeNetwork)}),
            card,
        )


def _check(network: CodeNetwork, form: ProbeForm) -> int:
    """The width of the states that `network` reads. Raises `FileFormatError`."""
    width, hidden = network.mean.numel(), network.hidden_bias.numel()
    wanted = {
        "mean": (width,),
        "scale": (width,),
        "hidden_weight": (hidden, width),
        "hidden_bias": (hidden,),
        "code_weight": (form.dimensions, hidden),
        "code_bias": (form.dimensions,),
    }
    for name, one in network.tensors.items():
        if one.dtype != torch.float32 or tuple(one.shape) != wanted[name] or not one.numel():
            raise FileFormatError(
                f"probe.{name} is {one.dtype} {list(one.shape)}; it must be torch.float32 "
                f"{list(wanted[name])}, none of them 0"
            )
        if not bool(one.isfinite().all()):
            raise FileFormatError(f"probe.{name} contains NaN or Inf", code="not_finite")
    if not bool((network.scale > 0).all()):
        raise FileFormatError("probe.scale has a channel that is not above 0")
    return width
