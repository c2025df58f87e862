"""Read-outs on the engine's own outputs: whose come so, what they hold, and what may go wrong."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from steer.engines.vllm.core.attached_readouts import AttachedReadouts
from steer.engines.vllm.messages import read_readouts, take_readouts_off
from steer.engines.vllm.ticket import ReadoutOrder, Ticket
from steer.errors import EngineError

ORDER = ReadoutOrder("0" * 64, prompt=False, attached=True)
TICKET = Ticket("key", readouts=ORDER)


class Worker:
    """Has read one number of each token, its position, and gives each once."""

    def __init__(self, fault: Exception | None = None) -> None:
        self.fault = fault
        self.calls: list[Any] = []
        self.given: dict[str, int] = {}

    def __call__(self, asked: list[Any]) -> list[Any]:
        self.calls.append(asked)
        if self.fault is not None:
            raise self.fault
        return [[self._answer(key, fed) for key, fed, _ in asked]]

    def _answer(self, key: str, fed: dict[int, int]) -> dict[int, Any]:
        start, self.given[key] = self.given.get(key, 0), max(fed[0], self.given.get(key, 0))
        positions = list(range(start, fed[0]))
        return {
            0: {"positions": positions, "numbers": np.array(positions, dtype=np.float32).tobytes()}
        }


class Request:
    """A request of vLLM's with a prompt of three tokens."""

    def __init__(
        self, name: str, ticket: Ticket | None, kind: str = "DELTA", stop: Any = None
    ) -> None:
        extra = None if ticket is None else ticket.as_extra_args()
        self.request_id, self.num_tokens, self.why = name, 3, ""
        self.sampling_params = SimpleNamespace(
            extra_args=extra, stop=stop, output_kind=SimpleNamespace(name=kind)
        )

    def get_finished_reason(self) -> str:
        return self.why

    def chose(self, tokens: int = 1) -> Any:
        """The output that tells of so many new tokens."""
        self.num_tokens += tokens
        return SimpleNamespace(
            request_id=self.request_id,
            new_token_ids=list(range(tokens)),
            kv_transfer_params={"theirs": 1},
        )


def followed(worker: Worker | None, *requests: Request) -> AttachedReadouts:
    readouts = AttachedReadouts()
    if worker is not None:
        readouts.ask(worker)
    for request in requests:
        readouts.follow(request)
    return readouts


def rows_on(readouts: AttachedReadouts, *outputs: Any) -> list[Any]:
    """What comes on the outputs of a step, each to a client of its own."""
    readouts.attach({n: SimpleNamespace(outputs=[one]) for n, one in enumerate(outputs)})
    arrivals = [take_readouts_off(output) for output in outputs]
    assert all(output.kv_transfer_params == {"theirs": 1} for output in outputs)
    return [
        arrival and [row for row, _ in read_readouts(arrival.answers, 1)] for arrival in arrivals
    ]


def test_each_step_brings_what_is_new_with_one_call() -> None:
    worker, other = Worker(), Request("b", replace(TICKET, key="other"))
    mine, plain = Request("a", TICKET), Request("c", None)
    readouts = followed(worker, mine, other, plain)
    assert rows_on(readouts, mine.chose(), plain.chose(), other.chose()) == [
        [0, 1, 2],
        None,
        [0, 1, 2],
    ]
    assert rows_on(readouts, mine.chose(), other.chose(3)) == [[3], [3, 4, 5]]
    assert rows_on(readouts, plain.chose()) == [None]
    assert [len(call) for call in worker.calls] == [2, 2]


def test_the_last_output_says_that_nobody_asks_again() -> None:
    worker, mine = Worker(), Request("a", TICKET)
    readouts = followed(worker, mine)
    rows_on(readouts, mine.chose())
    mine.why, output = "length", mine.chose()
    readouts.note(mine)
    assert rows_on(readouts, output) == [[3]]
    assert [last for call in worker.calls for _, _, last in call] == [False, True]
    assert rows_on(readouts, mine.chose()) == [None]


@pytest.mark.parametrize("stop", [None, ["."]])
def test_an_answer_that_is_sent_whole_brings_all_at_its_end(stop: Any) -> None:
    """Where its front end may end it, each output brings its own."""
    worker, mine = Worker(), Request("a", TICKET, "FINAL_ONLY", stop)
    readouts = followed(worker, mine)
    assert rows_on(readouts, mine.chose()) == [[0, 1, 2] if stop else None]
    mine.why, output = "length", mine.chose()
    readouts.note(mine)
    assert rows_on(readouts, output) == [[3] if stop else [0, 1, 2, 3]]
    assert len(worker.calls) == (2 if stop else 1)


def test_workers_forget_what_nobody_waits_for() -> None:
    """With the next call; what they keep for a twin is not meant."""
    worker, left = Worker(), Request("a", TICKET)
    stays = Request("b", replace(TICKET, key="other"))
    readouts = followed(worker, left, stays)
    left.why = "abort"
    readouts.note(left)
    rows_on(readouts, stays.chose())
    rows_on(readouts, stays.chose())
    assert worker.calls == [
        [("other", {0: 3}, False), ("key", {0: 0}, True)],
        [("other", {0: 4}, False)],
    ]


@pytest.mark.parametrize(
    "ticket",
    [
        None,
        Ticket("key"),
        Ticket("key", readouts=replace(ORDER, attached=False)),
        replace(TICKET, n=2),
    ],
    ids=["plain", "reads nothing", "asks later", "choices"],
)
def test_the_others_are_left_to_their_front_end(ticket: Ticket | None) -> None:
    worker, request = Worker(), Request("a", ticket)
    assert rows_on(followed(worker, request), request.chose()) == [None]
    assert worker.calls == []


def test_an_output_without_tokens_brings_nothing() -> None:
    worker, request = Worker(), Request("a", TICKET)
    assert rows_on(followed(worker, request), request.chose(0)) == [None]


@pytest.mark.parametrize("worker", [None, Worker(RuntimeError("gone"))], ids=["nobody", "fails"])
def test_numbers_that_cannot_be_had_end_their_answer(worker: Worker | None) -> None:
    request = Request("a", TICKET)
    with pytest.raises(EngineError, match="could not be asked what was read") as caught:
        rows_on(followed(worker, request), request.chose())
    assert caught.value.code == "readouts_missed"
