"""What attention, MLP, their heads and their neurons add to the residual stream at one token.

Attention and MLP are read where they are added (`attn_out`, `mlp_out`). Heads and neurons are the
columns of the output projections behind `head_out` and `mlp_act`; a norm between projection and
stream, as in models with sandwich norms, is taken at the scale that it has at this token.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from steer.engines.base import Engine
from steer.errors import Unsupported
from steer.model import HookPoint
from steer.spec import Site

States: TypeAlias = Mapping[HookPoint, Float[Tensor, "tokens width"]]
"""What was captured of one prompt, the token in question last."""

ADDED: dict[Site, Site] = {"head_out": "attn_out", "mlp_act": "mlp_out"}
"""By the site before an output projection, the site where its part is added to the stream."""

_TOLERANCE = 1e-3
_TOLERANCE_HALF = 3e-2
"""How far, relative to its length, what is added may be from what the projection makes, in 32 bits
and in 16."""

_TURNS = 8

_NUMBERS_AT_ONCE = 1 << 24


@dataclass(frozen=True)
class ProjectedPart:
    """A part of a block behind its output projection: what is added is `gain` ⊙ (W z + b), z being
    the state before the projection.

    `state` `[width]`, `added`, `gain` and `bias` `[d_model]`, all float64; `bias` is b before the
    gain.
    """

    point: HookPoint
    state: Float[Tensor, " width"]
    added: Float[Tensor, " d_model"]
    gain: Float[Tensor, " d_model"]
    bias: Float[Tensor, " d_model"]

    def heads(self, engine: Engine, count: int) -> Float[Tensor, "heads d_model"]:
        """What each of `count` heads adds, the bias left out."""
        one = torch.eye(count, dtype=torch.float64)[:, :, None]
        split = (one * self.state.reshape(1, count, -1)).flatten(1)
        return self.gain * (projected(engine, self.point, split) - self.bias)

    def along(
        self, engine: Engine, direction: Float[Tensor, " d_model"]
    ) -> Float[Tensor, " width"]:
        """How far each channel of the state, a neuron, goes along `direction` in the stream."""
        weighted = self.gain * direction
        rows = max(1, _NUMBERS_AT_ONCE // len(self.state))
        found = []
        for start in range(0, len(self.state), rows):
            end = min(start + rows, len(self.state))
            units = torch.zeros(end - start, len(self.state), dtype=torch.float64)
            units[torch.arange(end - start), torch.arange(start, end)] = 1.0
            found.append((projected(engine, self.point, units) - self.bias) @ weighted)
        return torch.cat(found) * self.state


def projected_parts(
    engine: Engine, states: States, site: Site, *, instead: str
) -> Iterator[ProjectedPart]:
    """The part behind `site` of each layer, at the last token of `states`.

    They hold `site` and where it is added, the latter as no steering edits it. Raises
    `Unsupported` (`unsupported_inspection`) where what is added is no multiple, channel by
    channel, of what the projection makes; `instead` says what to do then.
    """
    for layer in range(engine.info.n_layers):
        point, out = HookPoint(layer, site), HookPoint(layer, ADDED[site])
        before, added = states[point].double().cpu(), states[out].double().cpu()
        made = projected(engine, point, before)
        gain = _gain(engine, made, added)
        if gain is None:
            raise Unsupported(
                f"what layer {layer} adds at {out.site!r} is no norm of what its output "
                "projection makes, so that the channels of "
                f"{site!r} have no share in it: {instead}",
                code="unsupported_inspection",
            )
        bias = projected(engine, point, torch.zeros_like(before[:1]))[0]
        yield ProjectedPart(point, before[-1], added[-1], gain, bias)


def _gain(
    engine: Engine,
    made: Float[Tensor, "tokens d_model"],
    added: Float[Tensor, "tokens d_model"],
) -> Float[Tensor, " d_model"] | None:
    """What `made` is multiplied by at the last token, channel by channel, to give what is added.

    One everywhere, or the weight of a norm that divides by the root mean square: that weight is
    the same at all tokens, and found over them all, because one token may be near zero in a
    channel. None where neither explains it.
    """
    single = engine.info.dtype in ("float32", "float64")
    tolerance = _TOLERANCE if single else _TOLERANCE_HALF
    here = added[-1]
    if (made[-1] - here).norm() <= tolerance * here.norm():
        return torch.ones_like(here)
    weight = weight_of_norm(made, added)
    # A norm adds a small number to what it divides by, so that short states come out shorter: what
    # it divides each token by is fitted too, in turn with the weight.
    for _ in range(_TURNS):
        scales = _shares(weight * made, added, -1)
        weight = _shares(scales * made, added, 0)[0]
    like = weight * made[-1]
    gain = weight * (here @ like) / like.pow(2).sum().clamp_min(1e-30)
    error = (gain * made[-1] - here).norm()
    return gain if error <= tolerance * here.norm() else None


def _shares(made: Tensor, added: Tensor, dim: int) -> Tensor:
    """What `made` is best multiplied by along `dim` to give `added`."""
    by: Tensor = (added * made).sum(dim, keepdim=True) / made.pow(2).sum(
        dim, keepdim=True
    ).clamp_min(1e-30)
    return by


def weight_of_norm(
    made: Float[Tensor, "N d_model"], added: Float[Tensor, "N d_model"]
) -> Float[Tensor, " d_model"]:
    """The weight of a norm by the root mean square, as far as it explains `added` by `made`."""
    normed = made / made.pow(2).mean(-1, keepdim=True).sqrt().clamp_min(1e-30)
    weight: Tensor = (added * normed).sum(0) / normed.pow(2).sum(0).clamp_min(1e-30)
    return weight


def projected(
    engine: Engine, point: HookPoint, states: Float[Tensor, "N width"]
) -> Float[Tensor, "N d_model"]:
    return engine.project(point, states.float()).double().cpu()
