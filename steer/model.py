"""What Steer knows about the model being served: its hook points, widths and abilities."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple, TypeAlias

from steer.errors import IncompatibleArtefact, SteerError, Unsupported
from steer.spec import STRENGTH_UNITS, Role, Site

MAX_LAYERS = 1024
"""More layers than any model has; what is written beyond them is a slip."""

_LAYERS = re.compile(r"([0-9]+)(?:-([0-9]+))?")
_DIGITS = 20


class HookPoint(NamedTuple):
    """A place in the forward pass: a 0-based decoder block and a site within it.

    `resid_post` of block i is that block's true output; `resid_mid` is the stream between
    attention and MLP; `attn_out` and `mlp_out` are what those parts add to the stream; `attn_in`
    and `mlp_in` are what they read, the outputs of their norms; `mlp_act` and `head_out` are the
    inputs of their output projections.
    """

    layer: int
    site: Site = "resid_post"

    def __str__(self) -> str:
        return f"{self.layer}.{self.site}"


SITE_ORDER: dict[Site, int] = {
    "resid_pre": 0,
    "attn_in": 1,
    "head_out": 2,
    "attn_out": 3,
    "resid_mid": 4,
    "mlp_in": 5,
    "mlp_act": 6,
    "mlp_out": 7,
    "resid_post": 8,
}


INNER_SITES: dict[Site, Site] = {
    "attn_in": "attn_out",
    "head_out": "attn_out",
    "mlp_in": "mlp_out",
    "mlp_act": "mlp_out",
}
"""The sites inside attention and MLP, each with that where what the part makes of it shows."""


PROJECTED_SITES: tuple[Site, ...] = ("head_out", "mlp_act")
"""The sites that an output projection, one matrix and perhaps a bias, reads."""


def forward_order(point: HookPoint) -> tuple[int, int]:
    """Sorts hook points in the order in which a forward pass reaches them."""
    return (point.layer, SITE_ORDER[point.site])


def parse_layers(text: str, *, param: str = "/layers") -> tuple[int, ...]:
    """0-based layers, sorted, from `3`, `1,3`, `2-5` (both ends included) or `0,4-6`.

    Raises `SteerError` (`invalid_option`) for what is no such list and for a layer named twice,
    `IncompatibleArtefact` (`layer_out_of_range`) for numbers that no model has.
    """
    found: set[int] = set()
    for part in text.split(","):
        if part.strip().startswith("-") and part.strip()[1:].isdecimal():
            why = "layers are numbered from 0, the last is their number less 1: write 3, 1,3 or 2-5"
            raise _no_layers(text, why, param)
        match = _LAYERS.fullmatch(part.strip())
        if match is None:
            raise _no_layers(text, "write 3, or 1,3, or 2-5", param)
        first, last = (_layer_number(number, param) for number in (match[1], match[2] or match[1]))
        if last < first:
            raise _no_layers(text, f"{first}-{last} counts down; write {last}-{first}", param)
        layers = set(range(first, last + 1))
        if twice := found & layers:
            raise _no_layers(text, f"it names layer {min(twice)} twice; name it once", param)
        found |= layers
    return tuple(sorted(found))


SomeLayersOrAll: TypeAlias = tuple[int, ...] | Literal["all"]


def parse_layer_choice(text: str) -> SomeLayersOrAll:
    """As `parse_layers`, or `all`."""
    return "all" if text.strip() == "all" else parse_layers(text)


def _layer_number(digits: str, param: str) -> int:
    # Python refuses to read thousands of digits.
    if len(digits) > _DIGITS or int(digits) >= MAX_LAYERS:
        shown = digits if len(digits) <= _DIGITS else digits[:_DIGITS] + "…"
        raise IncompatibleArtefact(
            f"layer {shown} is out of range: layers are numbered from 0, and no model has more "
            f"than {MAX_LAYERS}",
            code="layer_out_of_range",
            param=param,
        )
    return int(digits)


def _no_layers(text: str, why: str, param: str) -> SteerError:
    shown = text if len(text) <= 60 else text[:59] + "…"
    return SteerError(f"{shown!r} is no list of layers: {why}", code="invalid_option", param=param)


def bare_name(model: str) -> str:
    """A model's name without the folder or organisation: engines and tools differ in what they
    keep."""
    return model.rstrip("/").rpartition("/")[2]


@dataclass(frozen=True)
class ModelInfo:
    """The shape of a decoder-only model, as plans and artefacts need it.

    `name` is what the model is called in answers and errors. `origin` is where it comes from (a
    folder, a hub name) where it is served under a name of its own: by it artefacts are known to be
    for this model, and it stands in no answer, because it may be a path of the server. `absent`
    are sites that `sites` lacks, each with why, and what to do where something can be done.
    """

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
    origin: str | None = None
    absent: tuple[tuple[Site, str], ...] = ()

    @property
    def own_name(self) -> str:
        """What cards and calibrations call the model: its own name, whatever it is served as,
        without the folder or organisation."""
        return bare_name(self.origin or self.name)

    @property
    def names(self) -> tuple[str, ...]:
        """All that cards and clients may call the model, without folder or organisation; its own
        name first."""
        return tuple(dict.fromkeys((self.own_name, bare_name(self.name))))

    def served_as(self, name: str) -> ModelInfo:
        """The same model under the name that clients use."""
        if name == self.name:
            return self
        return replace(self, name=name, origin=self.origin or self.name)

    def is_called(self, model: str) -> bool:
        """Whether `model`, as a card or a client states it, is this model."""
        return bare_name(model) in self.names

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
            reason = dict(self.absent).get(point.site, f"does not exist in {self.architecture}")
            raise Unsupported(
                f"the site {point.site!r} {reason}: use one of {', '.join(self.sites)}",
                code="unsupported_site",
                param=param,
            )


SAMPLING = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "seed",
    "stop",
    "n",
    "logprobs",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "logit_bias",
    "min_tokens",
    "stop_token_ids",
    "ignore_eos",
)
"""All that can be asked for about the choice of tokens, by the names of requests' fields."""


@dataclass(frozen=True)
class Capabilities:
    """What an engine can really do; anything else is refused by name at admission.

    `captures` are the sites whose states can be read (none: `capture` is refused), `gradients`
    whether the model can be differentiated (`steer.engines.gradients`); `no_unembedding` says why
    states cannot be read as logits, where they cannot; `projections` are the sites whose output
    projection can be asked (`Engine.project`); `carries` whether a block can be run by itself
    (`Engine.carry`); `attention` whether a capture can tell what heads attend to, and what they
    attend by (`Engine.queries_and_keys`); `readouts` are the fields of a `ReadoutSpec` that can be
    read while a request runs; `lora` whether a request may bring a LoRA adapter. What can be
    inspected and fitted follows from them: engines know no method by name. `roles` are those whose
    messages are found in the model's chats.
    """

    engine: str
    kinds: tuple[str, ...]
    sites: tuple[Site, ...]
    strength_units: tuple[str, ...] = STRENGTH_UNITS
    gate_scopes: tuple[str, ...] = ("prompt", "token", "onward")
    sae_architectures: tuple[str, ...] = ()
    norm_preserving: bool = True
    sampling: tuple[str, ...] = ()
    captures: tuple[Site, ...] = ()
    gradients: bool = False
    no_unembedding: str | None = None
    projections: tuple[Site, ...] = ()
    carries: bool = False
    attention: bool = False
    roles: tuple[Role, ...] = ()
    readouts: tuple[str, ...] = ()
    lora: bool = False
    limits: dict[str, int] = field(default_factory=dict)
