"""The start-up proof: at every hook point steering acts, and doing nothing changes nothing.

For each site one batch is run in which row i is steered at layer i and the last row is not. Each
steered row must differ from the model without hooks, the last must equal it to the bit.
"""

from __future__ import annotations

import numpy as np
import torch

from steer.batch.ledger import Ledger
from steer.batch.requests import Span, SteeredRequest
from steer.batch.step import build_step
from steer.batch.tables import Tables
from steer.engines.proof import probe_plan, unchanged
from steer.engines.transformers.hooks import HookedModel
from steer.errors import Unsupported
from steer.model import HookPoint
from steer.spec import Site

_PROBE_LENGTH = 4


@torch.inference_mode()
def prove_steering(hooked: HookedModel) -> None:
    """Raises `Unsupported` naming the first hook point at which an edit does not act."""
    rows = hooked.info.n_layers + 1
    ids = torch.arange(1, _PROBE_LENGTH + 1, device=hooked.device).repeat(rows, 1)
    plain, _ = hooked.forward(None, input_ids=ids, use_cache=False)
    # A mixture of experts is known by what it has no hook point for.
    experts = "mlp_act" not in hooked.info.sites
    for site in hooked.info.sites:
        steered = _probe(hooked, site, ids)
        for layer in range(hooked.info.n_layers):
            if torch.equal(steered[layer], plain.logits[layer]):
                raise Unsupported(
                    f"an edit at {HookPoint(layer, site)} of {hooked.info.architecture} changes "
                    "nothing: this model is not supported",
                    code="steering_does_not_act",
                )
        if not unchanged(steered[-1], plain.logits[-1], experts=experts):
            raise Unsupported(
                f"an unsteered row next to edits at {site} is not what the model computes without "
                "hooks: this model is not supported",
                code="neighbour_changed",
            )


def _probe(hooked: HookedModel, site: Site, ids: torch.Tensor) -> torch.Tensor:
    tables = Tables(hooked.info, slots=hooked.info.n_layers, device=hooked.device)
    spans = []
    positions = np.arange(_PROBE_LENGTH, dtype=np.int64)
    for layer in range(hooked.info.n_layers):
        plan = probe_plan(hooked.info, HookPoint(layer, site))
        steered = SteeredRequest(layer, _PROBE_LENGTH, plan, tables.acquire(plan))
        spans.append(Span(steered, layer * _PROBE_LENGTH, positions, positions + 1))
    ledger = Ledger(hooked.info.n_layers + 1, hooked.device)
    step = build_step(tables, ledger, spans, ids.numel())
    outputs, _ = hooked.forward(step, input_ids=ids, use_cache=False)
    logits: torch.Tensor = outputs.logits
    return logits
