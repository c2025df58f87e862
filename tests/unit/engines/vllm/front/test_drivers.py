"""A step that fails: everybody in it is told, also whom it had ended already."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from steer.engines.base import GenerationRequest
from steer.engines.listeners import BlockingListener
from steer.engines.vllm.front.drivers import _Stepper
from steer.engines.vllm.front.sequences import RunningSequence
from steer.engines.vllm.ticket import Ticket
from steer.errors import EngineError
from steer.plan.selection import EVERYWHERE

TICKET = Ticket("key", fingerprint="print", plan="0" * 64, selections=(EVERYWHERE,))


class Engine:
    """vLLM's engine, as a stepper meets it: the first sequence ends in a step, and then the workers
    cannot be asked."""

    def __init__(self, ends: RunningSequence) -> None:
        self.engine_core, self._ends = SimpleNamespace(), ends

    def has_unfinished_requests(self) -> bool:
        return True

    def step(self) -> list[Any]:
        made = SimpleNamespace(token_ids=[5], logprobs=None, finish_reason="length")
        return [SimpleNamespace(request_id=self._ends.key, outputs=[made], finished=True)]

    def collective_rpc(self, *_: Any, **__: Any) -> list[Any]:
        raise RuntimeError("the workers are gone")

    def abort_request(self, keys: list[str]) -> None:
        assert keys


def test_a_step_that_fails_leaves_nobody_waiting() -> None:
    listeners = [BlockingListener(), BlockingListener()]
    sequences = [
        RunningSequence(GenerationRequest(str(n), (1, 2)), TICKET, listener, frozenset())
        for n, listener in enumerate(listeners)
    ]
    stepper = _Stepper(Engine(sequences[0]))
    stepper._running = {one.key: one for one in sequences}
    stepper.step()
    for listener in listeners:
        with pytest.raises(EngineError, match="the workers are gone"):
            listener.result()
