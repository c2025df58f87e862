"""Which requests come and go with one of vLLM's scheduler outputs; the same in both runners."""

from __future__ import annotations

from typing import Any

from steer.engines.vllm.ticket import Ticket
from steer.engines.vllm.worker.steering import WorkerSteering


def take_note(steering: WorkerSteering, output: Any) -> None:
    """Ends the requests that `output` ends, and then takes in those that it starts.

    A preempted request has not ended. In runner V2 it comes again among the new ones.
    """
    for req_id in output.finished_req_ids:
        steering.retire(req_id)
    for new in output.scheduled_new_reqs:
        params = new.sampling_params
        ticket = Ticket.of(params.extra_args) if params is not None else None
        steering.admit(new.req_id, new.prompt_token_ids, ticket)
