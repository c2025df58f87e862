"""Receipts on the engine's own last outputs, so that no front end has to ask for them.

When a request ends, the engine core asks its workers what was applied, itself and at once, for all
that end in the same step; the answer travels in the output that tells of the end, in
`kv_transfer_params`, which vLLM hands through to whoever watches the request. A front end that is
not told asks as ever (`steer_receipts`): where a stop string, which the front end looks for, may
end a request before what the core counted, where several choices share a ticket, and where the
workers could not be asked.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from steer.engines.vllm.core.cache_keys import ticket_of
from steer.engines.vllm.messages import put_on
from steer.engines.vllm.pipeline import merged_answers

log = logging.getLogger("steer.engine")

Ask = Callable[[list[tuple[str, dict[int, int]]]], list[Any]]
"""Calls `steer_receipts` on all workers; their answers, in order."""


class AttachedReceipts:
    """Assumes: called by the engine core's thread, between two steps.

    Guarantees: nothing that goes wrong here ends a request, or the engine.
    """

    def __init__(self) -> None:
        self._ask: Ask | None = None
        self._ended: dict[str, tuple[str, int]] = {}

    def ask(self, ask: Ask) -> None:
        """Workers are asked by `ask` from now on."""
        self._ask = ask

    def note(self, request: Any) -> None:
        """One of vLLM's requests has ended."""
        ticket = ticket_of(request)
        if ticket is None or not ticket.attached or ticket.plan is None or ticket.n != 1:
            return
        if str(request.get_finished_reason()) in ("stop", "length") and not (
            request.sampling_params.stop
        ):
            self._ended[request.request_id] = (ticket.key, request.num_tokens - 1)

    def attach(self, outputs: Mapping[int, Any]) -> None:
        """Puts the receipts of the requests that have ended on their last outputs; `outputs` are
        the `EngineCoreOutputs` of a step by client."""
        if not self._ended:
            return
        ended, self._ended = self._ended, {}
        answers = self._answers(list(ended.values()))
        found = dict(zip(ended, answers, strict=False))
        for of_client in outputs.values():
            for output in of_client.outputs:
                if output.request_id in found:
                    put_on(output, ended[output.request_id][1], found[output.request_id])

    def _answers(self, ended: Sequence[tuple[str, int]]) -> list[Mapping[str, Any]]:
        """The answer about each of `ended`, a ticket's key and the tokens fed; none where the
        workers could not be asked."""
        if self._ask is None:
            return []
        try:
            workers = self._ask([(key, {0: fed}) for key, fed in ended])
            return [answer[0] for answer in merged_answers(workers)]
        except Exception as error:  # the front end asks again, and withholds the answer
            log.warning("the workers could not be asked for receipts: %r", error)
            return []
