"""The start-up proof: at every hook point steering acts, and doing nothing changes nothing.

For each site a batch is run in which row i is steered at layer i and the last row is not. Each
steered row must differ from the model without hooks, the last must equal it to the bit. And each
site must be what its name says: the edit arrives there as it is, and the streams of its block move
by as much as what is added to them.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from steer.batch.ledger import Ledger
from steer.batch.requests import Span, SteeredRequest
from steer.batch.step import build_step
from steer.batch.tables import Tables
from steer.engines.proof import States, edit_size, misplaced, probe_plan, probe_shift, unchanged
from steer.engines.transformers.hooks import HookedModel
from steer.errors import Unsupported
from steer.model import INNER_SITES, HookPoint
from steer.spec import Site

_PROBE_LENGTH = 4
_LAYERS_AT_ONCE = 16
"""Layers proven by one batch, whose states are all held."""


@torch.inference_mode()
def prove_steering(hooked: HookedModel) -> None:
    """Raises `Unsupported` naming the first hook point at which an edit does not act."""
    for first in range(0, hooked.info.n_layers, _LAYERS_AT_ONCE):
        layers = range(first, min(first + _LAYERS_AT_ONCE, hooked.info.n_layers))
        ids = torch.arange(1, _PROBE_LENGTH + 1, device=hooked.device).repeat(len(layers) + 1, 1)
        plain, _ = hooked.forward(None, input_ids=ids, use_cache=False)
        if not plain.logits.isfinite().all():
            raise _unsupported(hooked, "gives logits that are not finite")
        points = [HookPoint(layer, site) for layer in layers for site in hooked.info.sites]
        _, before = hooked.forward(None, points, input_ids=ids, use_cache=False)
        for site in hooked.info.sites:
            _prove_site(hooked, site, layers, ids, plain.logits, before)


def _prove_site(
    hooked: HookedModel, site: Site, layers: range, ids: Tensor, plain: Tensor, before: States
) -> None:
    size = edit_size(site, before)
    logits, after = _probe(hooked, site, layers, size, ids)
    shift = probe_shift(hooked.info, site, size).to(hooked.device)
    for row, layer in enumerate(layers):
        point = HookPoint(layer, site)
        if torch.equal(logits[row], plain[row]) and not is_idle(point, before):
            raise _unsupported(hooked, f"is not changed by an edit at {point}")
        here = [at for at in before if at.layer == layer]
        unmoved = {at: before[at][row].float() for at in here}
        moved = {at: after[at][row].float() - unmoved[at] for at in here}
        wrong = misplaced(point, shift, moved, unmoved, before[point].dtype)
        if wrong is not None:
            raise _unsupported(
                hooked, f"does not move at {wrong} by what an edit at {point} adds there"
            )
    # A mixture of experts is known by what it has no hook point for.
    if not unchanged(logits[-1], plain[-1], experts="mlp_act" not in hooked.info.sites):
        raise _unsupported(
            hooked,
            f"gives other logits for an unsteered row next to edits at {site} than without hooks",
            code="neighbour_changed",
        )


def _unsupported(
    hooked: HookedModel, what: str, code: str = "steering_does_not_act"
) -> Unsupported:
    return Unsupported(f"{hooked.info.architecture} {what}: this model is not supported", code=code)


def is_idle(point: HookPoint, states: States) -> bool:
    """Whether the part around `point` adds the same to every token, whatever it reads: a block
    with weights of zero."""
    if point.site not in INNER_SITES:
        return False
    added = states.get(HookPoint(point.layer, INNER_SITES[point.site]))
    return added is not None and bool((added == added[:, :1]).all())


def _probe(
    hooked: HookedModel, site: Site, layers: range, size: float, ids: Tensor
) -> tuple[Tensor, dict[HookPoint, Tensor]]:
    """Logits, and the states of `layers`, of a batch whose row i is edited at the i-th of them."""
    tables = Tables(hooked.info, slots=len(layers), device=hooked.device)
    spans = []
    positions = np.arange(_PROBE_LENGTH, dtype=np.int64)
    for row, layer in enumerate(layers):
        plan = probe_plan(hooked.info, HookPoint(layer, site), size=size)
        steered = SteeredRequest(row, _PROBE_LENGTH, plan, tables.acquire(plan))
        spans.append(Span(steered, row * _PROBE_LENGTH, positions, positions + 1))
    ledger = Ledger(len(layers) + 1, hooked.device)
    step = build_step(tables, ledger, spans, ids.numel())
    points = [HookPoint(layer, each) for layer in layers for each in hooked.info.sites]
    outputs, states = hooked.forward(step, points, input_ids=ids, use_cache=False)
    return outputs.logits, states
