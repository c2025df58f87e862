"""Steering for notebooks: a context manager around any Hugging Face model.

with steer.attach(model, {"interventions": [{"kind": "add", "vector": "v"}]}, vectors={"v": v}):
    model.generate(...)
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from steer.artefacts.control_vector import ControlVector, LowRankAdapter
from steer.artefacts.library import MemoryLibrary
from steer.artefacts.sae.base import SAE
from steer.batch.ledger import Ledger
from steer.batch.requests import Span, SteeredRequest
from steer.batch.step import Step, build_step
from steer.batch.tables import Tables
from steer.engines.base import Receipt
from steer.engines.receipts import make_receipt
from steer.engines.transformers.blocks import HookMap, find_hook_points
from steer.engines.transformers.cache import given_cache
from steer.engines.transformers.hooks import HookedModel
from steer.errors import SpecError
from steer.model import Capabilities, HookPoint
from steer.plan.cache import PlanCache
from steer.plan.plan import SteeringPlan
from steer.prompts import text_tokens, trigger_tokens
from steer.spec import KINDS, SteeringSpec, parse_spec

_maps: weakref.WeakKeyDictionary[nn.Module, HookMap] = weakref.WeakKeyDictionary()
"""Hook points found so far: finding them runs the model once."""


@dataclass
class Attachment:
    """A model being steered; `receipts` says what was applied to each row of the last batch."""

    plan: SteeringPlan
    _rows: _AttachedBatch

    @property
    def receipts(self) -> list[Receipt]:
        return self._rows.receipts()


@contextmanager
def attach(
    model: nn.Module,
    spec: Mapping[str, Any] | SteeringSpec,
    *,
    vectors: Mapping[str, ControlVector] | None = None,
    saes: Mapping[str, SAE] | None = None,
    low_ranks: Mapping[str, LowRankAdapter] | None = None,
    tokenizer: Any = None,
) -> Iterator[Attachment]:
    """Steers every forward pass of `model` inside the `with` block, then unhooks it.

    A pass without past key values starts a new batch, and its tokens are the prompt; what follows
    is generated. Rows may be padded on the left, as `generate` does. Raises `SteerError` where the
    spec does not fit the model.
    """
    if model not in _maps:
        _maps[model] = find_hook_points(model, type(model).__name__)
    hooked = HookedModel(model, _maps[model])
    plans = PlanCache(
        MemoryLibrary(vectors or {}, saes or {}, low_ranks or {}),
        hooked.info,
        Capabilities("transformers", KINDS, hooked.info.sites),
        tokenize=_tokenize(tokenizer),
        encode_text=_encode_text(hooked, tokenizer),
    )
    plan = plans.plan(parse_spec(spec))
    rows = _AttachedBatch(hooked, plan)
    # Always first in and last out, whatever else is hooked to the model.
    before = model.register_forward_pre_hook(rows.begin, with_kwargs=True, prepend=True)
    after = model.register_forward_hook(rows.end)
    try:
        yield Attachment(plan, rows)
    finally:
        before.remove()
        after.remove()
        hooked.remove()


class _AttachedBatch:
    """Follows a model's own generation loop: which rows there are and how far each has come."""

    def __init__(self, hooked: HookedModel, plan: SteeringPlan) -> None:
        self._hooked, self._plan = hooked, plan
        self._tables = Tables(hooked.info, slots=1, device=hooked.device)
        self._slot = self._tables.acquire(plan)
        self._steered: list[SteeredRequest] = []
        self._fed: list[int] = []
        self._ledger = Ledger(1, hooked.device)
        self._carried: tuple[int, Step | None] | None = None

    def receipts(self) -> list[Receipt]:
        return [
            make_receipt(steered, self._ledger, fed)
            for steered, fed in zip(self._steered, self._fed, strict=True)
        ]

    def begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids = args[0] if args else kwargs.get("input_ids")
        shape = ids if ids is not None else kwargs.get("inputs_embeds")
        if shape is None:
            raise SpecError("the steered model was called without input_ids or inputs_embeds")
        cache = given_cache(kwargs)
        past = 0 if cache is None else int(cache.get_seq_length())
        self._hooked.begin(self._step(ids, shape, past, kwargs.get("attention_mask")))

    def end(self, module: nn.Module, args: Any, output: Any) -> None:
        self._hooked.end()

    def _step(
        self, ids: Tensor | None, shape: Tensor, past: int, mask: Tensor | None
    ) -> Step | None:
        count, columns = shape.shape[:2]
        if past and columns == 1 and self._carried is not None and self._carried[0] == count:
            self._fed = [fed + 1 for fed in self._fed]
            return self._carried[1]
        padding = _padding(mask, count, past + columns)
        if past == 0:
            self._restart(count, [columns - p for p in padding])
        spans = []
        for row, steered in enumerate(self._steered):
            first = max(padding[row] - past, 0)
            places = np.arange(
                past + first - padding[row], past + columns - padding[row], dtype=np.int64
            )
            tokens = np.full(len(places), -1, dtype=np.int64)
            if ids is not None and self._reads_tokens:
                tokens = ids[row, first:].cpu().numpy().astype(np.int64)
            spans.append(Span(steered, row * columns + first, places, tokens))
            self._fed[row] += len(places)
        step = build_step(self._tables, self._ledger, spans, count * columns)
        if past and columns == 1 and self._is_fixed():
            self._carried = (count, step)
        return step

    @property
    def _reads_tokens(self) -> bool:
        return any(one.selection.reads_tokens for one in self._plan.rules)

    def _is_fixed(self) -> bool:
        """Whether the step just built, for the tokens at `fed` − 1, holds for all that follow."""
        bounds = [steered.fixed_from for steered in self._steered]
        return not self._plan.gated and all(
            bound is not None and fed > bound for bound, fed in zip(bounds, self._fed, strict=True)
        )

    def _restart(self, count: int, lengths: list[int]) -> None:
        self._ledger = Ledger(count, self._hooked.device)
        self._steered = [
            SteeredRequest(row, length, self._plan, self._slot)
            for row, length in enumerate(lengths)
        ]
        self._fed = [0] * count
        self._carried = None


def _padding(mask: Tensor | None, rows: int, columns: int) -> list[int]:
    """Padding tokens on the left of each row; padding elsewhere is refused."""
    if mask is None or mask.ndim != 2:
        return [0] * rows
    kept = mask[:, :columns].to(torch.long)
    padding: list[int] = kept.argmax(1).tolist()
    if not bool((kept.sum(1) == columns - kept.argmax(1)).all()):
        raise SpecError(
            "the batch is padded on the right: set tokenizer.padding_side = 'left', so that "
            "positions are counted from the prompt's end"
        )
    return padding


def _tokenize(tokenizer: Any) -> Callable[[str], list[int]] | None:
    if tokenizer is None:
        return None
    return partial(trigger_tokens, tokenizer)


def _encode_text(hooked: HookedModel, tokenizer: Any) -> Callable[[str, HookPoint], Tensor] | None:
    if tokenizer is None:
        return None

    @torch.inference_mode()
    def encode(text: str, point: HookPoint) -> Tensor:
        ids = torch.tensor([text_tokens(tokenizer, text)], device=hooked.device)
        _, states = hooked.forward(None, [point], input_ids=ids, use_cache=False)
        return states[point][0].float().cpu()

    return encode
