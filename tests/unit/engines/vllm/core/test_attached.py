"""Receipts on the engine's own outputs: which requests get theirs so, and what may go wrong."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from steer.engines.vllm.core.attached import AttachedReceipts
from steer.engines.vllm.messages import take_off
from steer.engines.vllm.ticket import Ticket
from steer.plan.selection import EVERYWHERE

TICKET = Ticket("key", fingerprint="print", plan="0" * 64, selections=(EVERYWHERE,), attached=True)
RECEIPT = {
    "fingerprint": "print",
    "tokens_steered": 7,
    "tokens_skipped": 0,
    "tokens_cached": 0,
    "hook_points": [],
    "gates": [],
}


class Worker:
    """Answers for one worker, and notes what it was asked."""

    def __init__(self, fault: Exception | None = None) -> None:
        self.asked: list[Any] = []
        self.fault = fault

    def __call__(self, asked: list[Any]) -> list[Any]:
        self.asked.append(asked)
        if self.fault is not None:
            raise self.fault
        return [[{choice: dict(RECEIPT) for choice in fed} for _, fed in asked]]


def ended(name: str, ticket: Ticket | None, why: str = "length", stop: Any = None) -> Any:
    """A request of vLLM's that has ended with 8 tokens, the last of which was never fed."""
    extra = None if ticket is None else ticket.as_extra_args()
    return SimpleNamespace(
        request_id=name,
        num_tokens=8,
        sampling_params=SimpleNamespace(extra_args=extra, stop=stop),
        get_finished_reason=lambda: why,
    )


def step(*names: str, params: Any = None) -> dict[int, Any]:
    """The outputs of a step, each to a client of its own."""
    outputs = [SimpleNamespace(request_id=name, kv_transfer_params=params) for name in names]
    return {n: SimpleNamespace(outputs=[one]) for n, one in enumerate(outputs)}


def attached(worker: Worker | None, *requests: Any, params: Any = None) -> list[Any]:
    """What comes on the outputs that end `requests`."""
    receipts = AttachedReceipts()
    if worker is not None:
        receipts.ask(worker)
    for one in requests:
        receipts.note(one)
    outputs = step(*(one.request_id for one in requests), params=params)
    receipts.attach(outputs)
    receipts.attach(outputs)  # a step later nobody is asked again
    return [take_off(of_client.outputs[0]) for of_client in outputs.values()]


def test_requests_that_end_together_share_a_call() -> None:
    worker = Worker()
    other = replace(TICKET, key="other")
    found = attached(worker, ended("a", TICKET), ended("b", None), ended("c", other, "stop"))
    assert found == [(7, RECEIPT), None, (7, RECEIPT)]
    assert worker.asked == [[("key", {0: 7}), ("other", {0: 7})]]


@pytest.mark.parametrize(
    "request_",
    [
        ended("a", None),
        ended("a", replace(TICKET, attached=False)),
        ended("a", replace(TICKET, n=2)),
        ended("a", Ticket("key", attached=True)),
        ended("a", TICKET, "abort"),
        ended("a", TICKET, "error"),
        ended("a", TICKET, "stop", stop=["\n"]),
    ],
    ids=["plain", "asks later", "choices", "nothing steered", "aborted", "failed", "stop string"],
)
def test_the_others_are_left_to_their_front_end(request_: Any) -> None:
    worker = Worker()
    assert attached(worker, request_) == [None]
    assert worker.asked == []


@pytest.mark.parametrize("worker", [None, Worker(RuntimeError("gone"))], ids=["nobody", "fails"])
def test_who_cannot_be_asked_harms_nobody(worker: Worker | None) -> None:
    assert attached(worker, ended("a", TICKET)) == [None]


def test_what_vllm_says_beside_it_stays() -> None:
    theirs = {"do_remote_prefill": False}
    receipts = AttachedReceipts()
    receipts.ask(Worker())
    receipts.note(ended("a", TICKET))
    outputs = step("a", params=theirs)
    receipts.attach(outputs)
    (output,) = outputs[0].outputs
    assert take_off(output) == (7, RECEIPT)
    assert output.kv_transfer_params == theirs
    assert take_off(output) is None
