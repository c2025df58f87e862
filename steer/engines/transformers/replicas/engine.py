"""One model on the processors of a CPU, twice: engines over the same weights side by side.

In a step of a small model most operations are too short to gain from a second thread, and between
them runs Python. Two engines with half of the processors each do half of the requests each, and
while one is between two operations the other computes.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from steer.engines.base import Captured, CaptureRequest
from steer.engines.threads import bound_threads
from steer.engines.transformers.capture import capture_batch
from steer.engines.transformers.engine import TransformersEngine
from steer.engines.transformers.replicas.dividing import divided
from steer.engines.transformers.scheduler import Handed, Submission


class ReplicatedEngine(TransformersEngine):
    """A `TransformersEngine` whose `complete` and `capture` are divided among `replicas`, for work
    that comes in large batches. A single stream, and whatever else an engine does, is the first's.
    A model whose modules cannot be copied has one alone.

    Guarantees: the weights are held once; how requests are divided depends on them alone.
    """

    def __init__(
        self, model: nn.Module, tokenizer: Any, *, replicas: int = 2, **options: Any
    ) -> None:
        # Before the first one hooks into its model, or the hooks would be copied too.
        others = _replicas_of(model, replicas - 1)
        super().__init__(model, tokenizer, **options)
        self._replicas: tuple[TransformersEngine, ...] = (
            self,
            *(TransformersEngine(one, tokenizer, **options) for one in others),
        )
        self._threads = max(torch.get_num_threads() // len(self._replicas), 1)
        self._bounding, self._bounded = threading.Lock(), False

    def start(self) -> None:
        """As of one engine. What is proven for the first holds for the others, which are copies."""
        with self._bounding:
            if not self._bounded:
                for one in self._replicas:
                    one._scheduler.run(partial(bound_threads, self._threads))
                self._bounded = True
        super().start()

    def stop(self) -> None:
        super().stop()
        for one in self._replicas[1:]:
            one.stop()

    def _submitted(self, requests: Sequence[Handed]) -> list[Submission]:
        count = len(self._replicas)
        return [
            submission
            for n, one in enumerate(self._replicas)
            for submission in one._scheduler.submit_all(requests[n::count])
        ]

    def _captured(self, request: CaptureRequest) -> list[Captured]:
        mine, *others = divided(request, len(self._replicas))
        begun = [
            (part, one._scheduler.begin(partial(capture_batch, one._batch, request.of(part))))
            for part, one in zip(others, self._replicas[1:], strict=True)
            if part
        ]
        found = dict(zip(mine, super()._captured(request.of(mine)), strict=True)) if mine else {}
        for part, result in begun:
            found.update(zip(part, result.result(), strict=True))
        return [found[n] for n in range(len(request.prompts))]


def _replicas_of(model: nn.Module, count: int) -> list[nn.Module]:
    """The same modules `count` times more, over the same parameters."""
    parameters = {id(one): one for one in model.parameters()}
    try:
        return [copy.deepcopy(model, dict(parameters)) for _ in range(count)]
    except Exception:
        return []  # code of a model's own may hold what has no copy: it runs all the same
