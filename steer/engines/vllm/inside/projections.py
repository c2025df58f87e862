"""The output projections behind `head_out` and `mlp_act`, asked by themselves between two steps.

The module itself is applied, never its matrix read: weights may be quantised, split over
tensor-parallel workers, or merged with something else. That it is linear is looked at once, because
a projection that quantises what it reads has no columns of which a head or a neuron would be one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from steer.engines.vllm.taps.inner_sites import InnerSite, Shard
from steer.engines.vllm.taps.taps import DecoderStack
from steer.errors import Unsupported
from steer.model import PROJECTED_SITES, HookPoint
from steer.spec import Site

_TOLERANCE = 1e-3
_TOLERANCE_HALF = 3e-2
"""How far, relative to its length, what is made of a sum may be from the sum of what is made of its
parts, in 32 bits and in 16."""


@dataclass
class Projections:
    """Those of the layers that this worker has.

    Assumes: tensor-parallel workers are all asked at once, because each has a part of every row.
    """

    modules: Mapping[HookPoint, Callable[[Tensor], Any]]
    """What each was before it was tapped."""
    shards: Mapping[Site, Shard]
    sums: Callable[[HookPoint, Tensor], Tensor]
    """Brings the parts of what the workers made together, where the module itself does not."""
    device: torch.device
    dtype: torch.dtype
    _linear: set[HookPoint] = field(default_factory=set)

    @property
    def sites(self) -> tuple[Site, ...]:
        """The sites behind which there is a projection in every layer of this worker."""
        found = {point.site for point in self.modules}
        return tuple(site for site in PROJECTED_SITES if site in found)

    @torch.inference_mode()
    def __call__(
        self, point: HookPoint, states: Float[Tensor, "N width"]
    ) -> Float[Tensor, "N d_model"] | None:
        """Float32; None where another worker has the layer. Raises `Unsupported` (`no_projection`)
        where what is made of states is no linear function of them."""
        if point not in self.modules:
            return None
        if point not in self._linear:
            self._check_linear(point, states.shape[-1])
            self._linear.add(point)
        return self._made(point, states)

    def _made(self, point: HookPoint, states: Tensor) -> Tensor:
        rows = states.to(self.device, self.dtype)
        shard = self.shards.get(point.site)
        own = rows if shard is None else shard.own(rows).contiguous()
        made = self.modules[point](own)
        out, bias = made if isinstance(made, tuple) else (made, None)
        out = self.sums(point, out)
        return (out if bias is None else out + bias).float().cpu()

    def _check_linear(self, point: HookPoint, width: int) -> None:
        generator = torch.Generator().manual_seed(0)
        one, other = torch.randn(2, width, generator=generator)
        both = one + other
        made = self._made(point, torch.stack([one, other, both, torch.zeros_like(both)]))
        moved = made[2] - made[3]
        error = made[2] + made[3] - made[0] - made[1]
        allowed = _TOLERANCE if self.dtype == torch.float32 else _TOLERANCE_HALF
        if not float(error.norm()) <= allowed * float(moved.norm()):
            raise Unsupported(
                f"what the output projection behind {point} makes is not linear in what it reads, "
                "as where it quantises that: its channels have no share of their own on this "
                "server; leave heads and neurons out, or serve weights that are not quantised",
                code="no_projection",
            )


def find_projections(
    stack: DecoderStack, shards: Mapping[Site, Shard], device: torch.device, dtype: torch.dtype
) -> Projections:
    """Those that `stack` has sites in front of. Assumes: nothing is tapped yet."""
    modules: dict[HookPoint, Callable[[Tensor], Any]] = {}
    unsummed: set[HookPoint] = set()
    for number, layer in stack.layers:
        for one in stack.inner:
            if one.site in PROJECTED_SITES:
                point, module = HookPoint(number, one.site), _base(one, layer)
                modules[point] = module.forward
                if one.workers > 1 and not getattr(module, "reduce_results", True):
                    unsummed.add(point)

    def summed(point: HookPoint, made: Tensor) -> Tensor:
        if point not in unsummed:
            return made
        from vllm.distributed import tensor_model_parallel_all_reduce  # noqa: PLC0415

        whole: Tensor = tensor_model_parallel_all_reduce(made)
        return whole

    return Projections(modules, shards, summed, device, dtype)


def _base(site: InnerSite, layer: nn.Module) -> nn.Module:
    """The projection itself, inside of what adapters wrap around it."""
    module = site.module(layer)
    base = getattr(module, "base_layer", module)
    assert isinstance(base, nn.Module)
    return base
