"""From vLLM's outputs to the engine's events, for one sequence."""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from steer.engines.base import (
    FinishReason,
    GenerationRequest,
    Receipt,
    TokenEvent,
    TokenLogprob,
    TokenReadout,
)
from steer.engines.listeners import Listener
from steer.engines.readouts import joined
from steer.engines.vllm.messages import read_readouts, read_receipt
from steer.engines.vllm.ticket import Ticket
from steer.errors import EngineError, SteerError


class RunningSequence:
    """A request on its way through vLLM.

    Assumes: `take` is called with every output of the request, in order, by one thread.
    Guarantees: the last event carries the reason and the receipt, and comes once.
    """

    def __init__(
        self,
        request: GenerationRequest,
        ticket: Ticket | None,
        listener: Listener,
        eos: frozenset[int],
        *,
        quiet: bool = False,
        lora: Any = None,
    ) -> None:
        """A `quiet` sequence asks for no receipt: what its ticket leaves is fetched otherwise.
        `lora` is its adapter, as vLLM's `LoRARequest`."""
        self.adapter = {} if lora is None else {"lora_request": lora}
        """What vLLM is told of it beside prompt and sampling."""
        self.request, self.ticket, self.listener = request, ticket, listener
        self.key = f"steer-{uuid.uuid4().hex}"
        """vLLM's id of the request: callers' ids need not be unique."""
        self.finish: FinishReason | None = None
        self.ends = request.sampling.stop_token_ids
        """The tokens that end it."""
        if not request.sampling.ignore_eos:
            self.ends |= eos
        self._quiet = quiet
        self._said: list[int] = []
        self._last: TokenEvent | None = None

    @property
    def wants_receipt(self) -> bool:
        return not self._quiet and self.ticket is not None and self.ticket.plan is not None

    @property
    def wants_readouts(self) -> bool:
        """Whether numbers are read in its passes."""
        plan = self.request.readouts
        return plan is not None and bool(plan.readers) and self.ticket is not None

    @property
    def wants_twin(self) -> bool:
        """Whether it is to be compared with its unsteered twin when it has ended."""
        plan = self.request.readouts
        return plan is not None and plan.kl and self.ticket is not None

    @property
    def leaves_readouts(self) -> bool:
        """Whether workers keep something of it until it is fetched."""
        return self.wants_readouts or self.wants_twin

    @property
    def said(self) -> tuple[int, ...]:
        """The tokens that it has generated so far."""
        return tuple(self._said)

    @property
    def asked(self) -> tuple[str, dict[int, int]]:
        """What `steer_receipts` is asked: all but the last token generated were fed."""
        key = "" if self.ticket is None else self.ticket.key
        return key, {0: len(self.request.prompt) + len(self._said) - 1}

    @property
    def asked_readouts(self) -> tuple[str, dict[int, int], bool]:
        """What `steer_readouts` is asked after an output."""
        return *self.asked, self.finish is not None

    @property
    def dropped_readouts(self) -> tuple[str, dict[int, int], bool]:
        """What `steer_readouts` is asked where nobody waits for them any more."""
        return self.asked[0], {}, True

    def take(self, output: Any) -> None:
        """Passes on the new tokens of a `RequestOutput` of kind DELTA; keeps back the last one of
        the sequence, which waits for its receipt. Sets `finish`."""
        made = output.outputs[0]
        logprobs = made.logprobs or [None] * len(made.token_ids)
        for token, places in zip(made.token_ids, logprobs, strict=True):
            if self.finish is not None:
                return
            self._flush_last()
            self._said.append(token)
            self._last = TokenEvent(token, _logprob(token, places, self.request.sampling.logprobs))
            if token in self.ends or (self.request.stop is not None and self.request.stop(token)):
                self.finish = "stop"
        if made.finish_reason is not None and self.finish is None:
            self.finish = "stop" if made.finish_reason == "stop" else "length"

    def read(self, answers: Iterable[Mapping[str, Any]]) -> None:
        """Takes in what workers have read since they were last asked; it goes with the token that
        is kept back. Raises `EngineError`."""
        plan, prompt = self.request.readouts, self.request.prompt
        if plan is None or self._last is None:
            return
        found = tuple(
            TokenReadout(
                position,
                prompt[position] if position < len(prompt) else self._said[position - len(prompt)],
                numbers,
            )
            for position, numbers in read_readouts(answers, plan.width)
        )
        self._last = replace(self._last, readouts=self._last.readouts + found)

    def compare(self, found: Iterable[TokenReadout]) -> None:
        """Takes in how far each of its tokens was chosen from its twin's distribution."""
        if self._last is not None:
            self._last = replace(self._last, readouts=joined((*self._last.readouts, *found)))

    def close(self, answer: Mapping[str, Any] | None) -> None:
        """Ends the sequence with a worker's answer about its receipt; without one it fails."""
        if not self.wants_receipt:
            self._close(None)
            return
        try:
            self._close(read_receipt(answer or {"error": "no worker answered"}))
        except SteerError as error:
            self.fail(error)

    def fail(self, error: Exception) -> None:
        """Ends the sequence with an error; vLLM's own become `EngineError`."""
        if not isinstance(error, SteerError):
            error = EngineError(f"vLLM refused or failed: {error}")
        self.listener.fail(error)
        self.listener.flush()

    def _close(self, receipt: Receipt | None) -> None:
        if self._last is not None:
            ended = replace(self._last, finish=self.finish or "length", receipt=receipt)
            self.listener.put(ended)
            self._last = None
        self.listener.flush()

    def _flush_last(self) -> None:
        if self._last is not None:
            self.listener.put(self._last)
            self._last = None


def _logprob(
    token: int, places: Mapping[int, Any] | None, asked: int | None
) -> TokenLogprob | None:
    """vLLM lists the alternatives asked for and, where it is none of them, the chosen token."""
    if places is None or asked is None:
        return None
    ranked = sorted(places.items(), key=lambda item: -item[1].logprob)[:asked]
    top = tuple((other, float(found.logprob)) for other, found in ranked)
    return TokenLogprob(float(places[token].logprob), top)


def vllm_sampling(sequence: RunningSequence) -> Any:
    """How `sequence` is sampled, in vLLM's form; outputs come as deltas, text is left to the
    caller."""
    from vllm import SamplingParams as VllmParams  # noqa: PLC0415
    from vllm.sampling_params import RequestOutputKind  # noqa: PLC0415

    params, ticket = sequence.request.sampling, sequence.ticket
    return VllmParams(
        max_tokens=params.max_tokens,
        temperature=params.temperature,
        top_p=params.top_p,
        top_k=params.top_k or 0,
        min_p=params.min_p,
        presence_penalty=params.presence_penalty,
        frequency_penalty=params.frequency_penalty,
        repetition_penalty=params.repetition_penalty,
        logit_bias=dict(params.logit_bias) or None,
        min_tokens=params.min_tokens,
        seed=params.seed,
        logprobs=params.logprobs,
        ignore_eos=params.ignore_eos,
        stop_token_ids=sorted(sequence.ends),
        detokenize=False,
        output_kind=RequestOutputKind.DELTA,
        skip_reading_prefix_cache=True if ticket is not None and ticket.computes_prompt else None,
        extra_args=None if ticket is None else ticket.as_extra_args(),
    )
