"""What a route knows about the steered requests that it sent to vLLM's engine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from steer.engines.base import Receipt
from steer.engines.vllm.ticket import EXTRA_ARG, Ticket
from steer.errors import SteerError
from steer.readouts.answer import Entry
from steer.readouts.plan import ReadoutPlan
from steer.readouts.watching import WatchPlan


@dataclass(eq=False)
class PendingReceipts:
    """A ticket, and what became of the engine's requests that came with it: one for each prompt.

    A ticket without a plan steers nothing: this only takes note of the prompts.
    """

    ticket: Ticket
    inspects: bool = False
    """Whether the model is to read the prompts' tokens again when they are answered."""
    silent: bool = False
    """Whether the answer is its prompt alone: `"max_tokens": 0`."""
    prompts: dict[int, tuple[int, ...]] = field(default_factory=dict)
    """The tokens of each prompt, once the engine has begun with it."""
    watch: WatchPlan = field(default_factory=WatchPlan)
    """What is read of the tokens, and the detectors that watch them, where the request asks."""
    detections: list[Entry] = field(default_factory=list)
    """What the detectors say of sequences that have ended."""
    stopped: bool = False
    """Whether a detector has ended one."""
    unsent: list[Entry] = field(default_factory=list)
    """What was read and is in no answer yet."""
    refused: SteerError | None = None
    """What the client is told where its steering left nothing to answer from."""
    _receipts: dict[int, list[Receipt] | None] = field(default_factory=dict)

    @cached_property
    def extra_args(self) -> dict[str, str]:
        """What requests to the engine carry: the ticket, written once."""
        return self.ticket.as_extra_args()

    @property
    def readouts(self) -> ReadoutPlan | None:
        """All that is read."""
        return self.watch.readouts

    def told(self) -> list[Entry]:
        """What the detectors say of all sequences, by choice."""
        return sorted(self.detections, key=lambda entry: int(entry["choice"]))

    @property
    def reads_passes(self) -> bool:
        """Whether numbers are read in the passes of its tokens."""
        return self.readouts is not None and bool(self.readouts.readers)

    @property
    def compares(self) -> bool:
        """Whether its answers are compared with what their unsteered twins would choose from."""
        return self.readouts is not None and self.readouts.kl

    @property
    def reads_tokens_alone(self) -> bool:
        """Whether its prompts are computed again from their tokens, which then must be all."""
        return self.inspects or self.compares

    def sent(self) -> list[Entry]:
        """The entries that go into the answer, or its next chunk."""
        entries, self.unsent = self.unsent, []
        return entries

    def begin(self) -> int:
        """A new request of the engine; its number, in the order of the prompts."""
        number = len(self._receipts)
        self._receipts[number] = None
        return number

    def close(self, number: int, receipts: list[Receipt]) -> None:
        """The request has ended, with a receipt for each of its choices."""
        self._receipts[number] = receipts

    @property
    def complete(self) -> bool:
        """Whether every request has ended with its receipts."""
        return bool(self._receipts) and None not in self._receipts.values()

    @property
    def receipts(self) -> list[Receipt]:
        """In the order of the prompts and their choices."""
        return [one for found in self._receipts.values() for one in found or ()]


class Count:
    """Counts the tokens that each choice of one request fed, from vLLM's outputs."""

    def __init__(self, *, delta: bool, keep: bool = False) -> None:
        """`delta`: outputs hold the new tokens alone, otherwise all of a choice's so far. `keep`:
        what tokens they are is kept in `tokens`."""
        self._delta, self._keep = delta, keep
        self.prompt: tuple[int, ...] = ()
        self.generated: dict[int, int] = {}
        self.tokens: dict[int, list[int]] = {}
        self.failed = False

    def take(self, output: Any) -> None:
        """Takes in one of vLLM's `RequestOutput`s."""
        if output.prompt_token_ids is not None and not self.prompt:
            self.prompt = tuple(output.prompt_token_ids)
        for choice in output.outputs:
            before = self.generated.get(choice.index, 0) if self._delta else 0
            self.generated[choice.index] = before + len(choice.token_ids)
            if self._keep:
                kept = self.tokens.setdefault(choice.index, [])
                kept[before:] = choice.token_ids
            # vLLM ended it for reasons of its own, and its routes say so.
            self.failed |= choice.finish_reason in ("abort", "error")

    def token(self, choice: int, position: int) -> int:
        """The token that stands there in a choice's sequence."""
        behind = position - len(self.prompt)
        return self.prompt[position] if behind < 0 else self.tokens[choice][behind]

    @property
    def fed(self) -> dict[int, int]:
        """By choice: the prompt and all generated tokens but the last, which is never fed back."""
        return {
            choice: len(self.prompt) + generated - 1 for choice, generated in self.generated.items()
        }


def with_ticket(params: Any, ticket: Mapping[str, str] | None, without: str = EXTRA_ARG) -> Any:
    """A copy of vLLM's `SamplingParams` that carries `ticket`, as in `Ticket.as_extra_args`, in the
    place of `without`."""
    extra = {name: value for name, value in params.extra_args.items() if name != without}
    extra |= ticket or {}
    copied = params.clone()
    copied.extra_args = extra or None
    return copied


def renewed(ticket: Ticket, key: str, n: int) -> Ticket:
    """The ticket of one of the engine's requests: prompts of one request have keys of their own."""
    return replace(ticket, key=key, n=n)
