"""What was read, on the engine's own outputs, so that no front end has to ask for it.

A front end that asks is answered between two steps, so that each output would be handed on a step
after it has come, and every answer would last a step longer. So the engine core asks its workers
itself, after each step and once for all requests whose outputs it is about to send; the front end
takes the numbers off before vLLM sees the outputs, of which it merges those that nobody was quick
enough to take. An answer that is sent whole brings all of them at its end.

A front end that is not told asks as ever (`steer_readouts`): where several choices share a ticket.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from steer.engines.vllm.core.cache_keys import ticket_of
from steer.engines.vllm.messages import Arrival, put_readouts_on
from steer.engines.vllm.pipeline import readout_answers

log = logging.getLogger("steer.engine")

Asked = tuple[str, dict[int, int], bool]
"""A ticket's key, the tokens fed by each choice, and whether nobody asks again."""
Ask = Callable[[list[Asked]], list[Any]]
"""Calls `steer_readouts` on all workers; their answers, in order."""


@dataclass
class _Reading:
    """A request of vLLM's that reads under a ticket's `key`, and whether it has ended."""

    key: str
    request: Any
    over: bool = False

    @property
    def fed(self) -> int:
        """All of its tokens but the last, which is not fed yet."""
        return int(self.request.num_tokens) - 1

    @property
    def due(self) -> bool:
        """Whether its next output is to bring what was read: of an answer that nobody sees before
        its end only the last does, unless the front end may end it, by a stop string."""
        params = self.request.sampling_params
        return self.over or bool(params.stop) or str(params.output_kind.name) != "FINAL_ONLY"


class AttachedReadouts:
    """Assumes: called by the engine core's thread, between two steps.

    Guarantees: nothing that goes wrong here ends the engine; the requests that were to be told
    are told of it.
    """

    def __init__(self) -> None:
        self._ask: Ask | None = None
        self._reading: dict[str, _Reading] = {}
        """By vLLM's name."""
        self._abandoned: list[Asked] = []

    def ask(self, ask: Ask) -> None:
        """Workers are asked by `ask` from now on."""
        self._ask = ask

    def follow(self, request: Any) -> None:
        """One of vLLM's requests has come."""
        ticket = ticket_of(request)
        if ticket is not None and ticket.brings_readouts:
            self._reading[request.request_id] = _Reading(ticket.key, request)

    def note(self, request: Any) -> None:
        """One of vLLM's requests has ended."""
        if request.request_id not in self._reading:
            return
        if str(request.get_finished_reason()) in ("stop", "length"):
            self._reading[request.request_id].over = True
        else:
            # Nobody waits for its numbers. What is kept for a twin is its front end's to fetch.
            left = self._reading.pop(request.request_id)
            self._abandoned.append((left.key, {0: 0}, True))

    def attach(self, outputs: Mapping[int, Any]) -> None:
        """Puts what was read on `outputs`, the `EngineCoreOutputs` of a step by client."""
        if not self._reading:
            return
        told = [
            (output, reading)
            for of_client in outputs.values()
            for output in of_client.outputs
            if (reading := self._reading.get(output.request_id)) is not None
            and output.new_token_ids
            and reading.due
        ]
        if not told:
            return
        answers = self._answers([(one.key, {0: one.fed}, one.over) for _, one in told])
        for (output, reading), answer in zip(told, answers, strict=True):
            put_readouts_on(output, Arrival(reading.key, reading.fed, answer))
            if reading.over:
                del self._reading[output.request_id]

    def _answers(self, asked: Sequence[Asked]) -> list[list[Mapping[str, Any]]]:
        """What the workers say about each of `asked`."""
        abandoned, self._abandoned = self._abandoned, []
        try:
            if self._ask is None:
                raise RuntimeError("the engine core has no workers yet")
            found = readout_answers([self._ask([*asked, *abandoned])])
        except Exception as error:
            log.warning("the workers could not be asked what was read: %r", error)
            why = f"the workers could not be asked what was read ({type(error).__name__})"
            return [[{"error": why, "code": "readouts_missed"}] for _ in asked]
        return [list(one.get(0, ())) for one in found[: len(asked)]]
