"""The start-up proof of packed batches, after the one for plain passes (`proof.py`).

Sequences packed side by side must give the logits that each gives alone in a plain pass, for their
prompts and for a token after them; and at every site, in the first and the last layer, an edit
must act on its own sequence and leave its neighbour as it is. (To the bit only without a mixture of
experts: there an edit changes how many tokens share an expert's matrix product.)
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from steer.batch.ledger import Ledger
from steer.batch.requests import Span, SteeredRequest
from steer.batch.step import Step, build_step
from steer.batch.tables import Tables
from steer.engines.proof import agree, edit_size, probe_plan
from steer.engines.transformers.packed.model import PackedModel
from steer.engines.transformers.proof import is_idle
from steer.errors import Unsupported
from steer.model import HookPoint

_PROMPTS = ((1, 2, 3, 4), (5, 6, 7, 8, 9, 10, 11))
_NEXT = 12


@torch.inference_mode()
def prove_packed(model: PackedModel) -> None:
    """Raises `Unsupported` naming what differs."""
    try:
        _prove_agreement(model)
        layers = sorted({0, model.hooked.info.n_layers - 1})
        points = [HookPoint(layer, site) for site in model.hooked.info.sites for layer in layers]
        states = _plain_states(model, points)
        for point in points:
            if not is_idle(point, states):
                _prove_edit(model, point, edit_size(point.site, states))
    finally:
        model.reset()
        model.lend()


def _prove_agreement(model: PackedModel) -> None:
    prompts, after = _packed_logits(model, None)
    model.lend()
    for number, prompt in enumerate(_PROMPTS):
        ids = torch.tensor([[*prompt, _NEXT]], device=model.hooked.device)
        outputs, _ = model.hooked.forward(None, input_ids=ids, use_cache=False)
        plain = outputs.logits[0].float()
        for packed, alone in ((prompts[number], plain[-2]), (after[number], plain[-1])):
            if not agree(packed, alone, model.dtype):
                raise Unsupported(
                    f"{model.hooked.info.architecture} computes other logits in packed batches "
                    "than alone: choose batching='rolling'",
                    code="packed_batches_unavailable",
                )


def _plain_states(model: PackedModel, points: Sequence[HookPoint]) -> dict[HookPoint, Tensor]:
    model.lend()
    ids = torch.tensor([_PROMPTS[0]], device=model.hooked.device)
    _, states = model.hooked.forward(None, points, input_ids=ids, use_cache=False)
    return states


def _prove_edit(model: PackedModel, point: HookPoint, size: float) -> None:
    tables = Tables(model.hooked.info, slots=1, device=model.hooked.device)
    plan = probe_plan(model.hooked.info, point, size=size)
    length = len(_PROMPTS[0])
    positions = np.arange(length, dtype=np.int64)
    steered = SteeredRequest(0, length, plan, tables.acquire(plan))
    span = Span(steered, 0, positions, np.array(_PROMPTS[0], dtype=np.int64))
    ledger = Ledger(1, model.hooked.device)
    step = build_step(tables, ledger, [span], sum(map(len, _PROMPTS)))
    plain, _ = _packed_logits(model, None)
    edited, _ = _packed_logits(model, step)
    kept = agree(edited[1], plain[1], model.dtype)
    acted = (edited[0] - plain[0]).norm() > 10 * (edited[1] - plain[1]).norm()
    if not (acted and kept):
        raise Unsupported(
            f"in packed batches of {model.hooked.info.architecture}, an edit at {point} does not "
            "act on exactly its own sequence: choose batching='rolling'",
            code="packed_batches_unavailable",
        )


def _packed_logits(model: PackedModel, step: Step | None) -> tuple[Tensor, Tensor]:
    """Logits `[2, vocab]` after the prompts, with `step`'s edits, and after one more token."""
    model.reset()
    for number, prompt in enumerate(_PROMPTS):
        model.add(str(number), prompt)
    chunks = model.next()
    if [chunk.length for chunk in chunks] != [len(prompt) for prompt in _PROMPTS]:
        raise Unsupported(
            f"a packed batch of {model.batch_tokens} tokens over a cache of {model.capacity} has "
            "no room for two short prompts: raise batch_tokens or cache_tokens",
            code="packed_batches_unavailable",
        )
    prompts = model.forward(chunks, step)
    model.accept([_NEXT] * len(_PROMPTS))
    return prompts, model.forward(model.next(), None)
