"""Requests with a LoRA adapter beside those without: a batch of their own, step by step between the
steps of the other, whose passes never see the adapter.

The second batch has its own slots, ledger and cache; the one model serves both, always in the
engine's thread.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from typing import Any, cast

import torch
from torch import nn

from steer.artefacts.lora import Lora, LoraPart
from steer.batch.tables import Tables
from steer.engines.base import Completion, GenerationRequest
from steer.engines.listeners import BlockingListener, Item
from steer.engines.transformers.alone.batch import AloneBatch
from steer.engines.transformers.alone.caches import OwnCaches
from steer.engines.transformers.grammar import Grammars
from steer.engines.transformers.lora.applied import lora_modules, with_lora
from steer.engines.transformers.rolling.batch import RollingBatch
from steer.engines.transformers.scheduler import Scheduler
from steer.engines.transformers.sequences import Batch, BatchSequence

_KEPT = 2
"""Adapters that stay on the model's device."""
_SLOTS = 64


class LoraRuns:
    """Runs requests with adapters, those of one adapter at a time; others wait.

    Assumes: `main` drives `batch`, and nobody else runs the model.
    """

    def __init__(self, main: Scheduler, batch: Batch, grammars: Grammars) -> None:
        self._main, self._batch, self._grammars = main, batch, grammars
        self._turn = threading.Lock()
        self._kept: OrderedDict[str, dict[str, LoraPart]] = OrderedDict()

    def check(self, lora: Lora) -> None:
        """Raises `IncompatibleArtefact` (`wrong_lora`) for an adapter of another model."""
        lora_modules(self._model, lora.parts)

    def complete(self, lora: Lora, requests: Sequence[GenerationRequest]) -> list[Completion]:
        """Whole sequences, batched together; in the order of `requests`."""
        modules = lora_modules(self._model, lora.parts)
        with self._turn:
            scheduler = self._scheduler
            self._beside.put_on(modules, self._placed(lora))
            listeners = [BlockingListener() for _ in requests]
            submitted = scheduler.submit_all(list(zip(requests, listeners, strict=True)))
            try:
                return [listener.result() for listener in listeners]
            finally:
                for one in submitted:
                    one.cancel()
                # Nobody else's adapter comes on before the last of these has left.
                scheduler.stop()

    @property
    def _model(self) -> nn.Module:
        return self._batch.hooked.model

    @cached_property
    def _beside(self) -> _BesideBatch:
        return _BesideBatch(self._main.run(partial(_batch_like, self._batch)), self._main)

    @cached_property
    def _scheduler(self) -> Scheduler:
        return Scheduler(cast(Batch, self._beside), self._grammars)

    def _placed(self, lora: Lora) -> dict[str, LoraPart]:
        """The parts on the model's device, in float32."""
        parts = self._kept.pop(lora.sha256, None)
        if parts is None:
            device = self._batch.hooked.device
            parts = {
                name: LoraPart(part.down.float().to(device), part.up.float().to(device), part.scale)
                for name, part in lora.parts.items()
            }
        self._kept[lora.sha256] = parts
        while len(self._kept) > _KEPT:
            self._kept.popitem(last=False)
        return parts


@torch.inference_mode()
def _batch_like(batch: Batch) -> Batch:
    """An empty batch for the same model, in whose form prompts are computed beside `batch`."""
    hooked, rows, eos = batch.hooked, batch.rows, batch.eos
    tables = Tables(hooked.info, slots=_SLOTS, device=hooked.device)
    if batch.chunk is None:
        return AloneBatch(hooked, tables, OwnCaches(hooked), rows=rows, eos=eos, room=batch.room)
    return RollingBatch(hooked, tables, rows=rows, eos=eos, chunk=batch.chunk, room=batch.room)


class _BesideBatch:
    """A `Batch` whose passes run in the engine's thread, between two steps of its own batch, each
    with the adapter on the model."""

    def __init__(self, batch: Batch, main: Scheduler) -> None:
        self._batch, self._main = batch, main
        self._modules: dict[str, nn.Module] = {}
        self._parts: dict[str, LoraPart] = {}

    def put_on(self, modules: dict[str, nn.Module], parts: dict[str, LoraPart]) -> None:
        """Which adapter the next passes have."""
        self._modules, self._parts = modules, parts

    def join(self, newcomers: Sequence[BatchSequence]) -> list[tuple[BatchSequence, Item]]:
        return self._between(partial(self._batch.join, newcomers))

    def decode(self) -> list[tuple[BatchSequence, Item]]:
        return self._between(self._batch.decode)

    def _between(
        self, work: Callable[[], list[tuple[BatchSequence, Item]]]
    ) -> list[tuple[BatchSequence, Item]]:
        def passed() -> list[tuple[BatchSequence, Item]]:
            with torch.inference_mode(), with_lora(self._modules, self._parts):
                return work()

        return self._main.run(passed)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._batch, name)
