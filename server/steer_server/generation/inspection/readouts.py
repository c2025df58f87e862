"""The read-outs of a request: made ready with it, and written into its answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from steer.engines.base import TokenReadout
from steer.errors import SteerError, TooLarge
from steer.plan.plan import SteeringPlan
from steer.readouts.answer import Entry, ReadoutWriter
from steer.readouts.compiler import ReadoutLimits, compile_readouts
from steer.readouts.plan import ReadoutPlan
from steer.readouts.spec import ReadoutSpec
from steer_server.metrics import Metrics
from steer_server.state import Serving


def planned_readouts(
    serving: Serving, spec: ReadoutSpec | None, plan: SteeringPlan | None
) -> ReadoutPlan | None:
    """The plan of what `inspect` asks for; its errors point into the request."""
    if spec is None:
        return None
    settings = serving.settings
    limits = ReadoutLimits(settings.readout_layers, settings.readout_numbers)
    engine = serving.engine
    try:
        return compile_readouts(
            spec,
            serving.registry.for_model(engine.info),
            engine.info,
            engine.capabilities,
            plan,
            limits,
        )
    except SteerError as error:
        error.param = "/inspect" + (error.param or "")
        raise


def check_amount(
    most: int, plan: ReadoutPlan | None, prompt: int, generated: int, kept: int = 0
) -> None:
    """Raises `TooLarge` for more than `most` numbers of one sequence, of so many tokens. Where its
    `kl` waits for a twin, the states that are `kept` of a token are such numbers."""
    if plan is None:
        return
    if plan.kl and kept * generated > most:
        raise TooLarge(
            f"the states of {generated} tokens, {kept} numbers each, which 'kl' is made of when "
            f"they are complete, are more than the {most} that one sequence may be asked for: "
            "lower 'max_tokens', or leave 'kl' out",
            code="too_many_readouts",
            param="/inspect/kl",
        )
    first, end = plan.wanted(prompt)
    tokens = max(0, min(end, prompt + generated) - first)
    if tokens * max(plan.width, 1) > most:
        raise TooLarge(
            f"{plan.width} numbers for each of {tokens} tokens are more than the {most} that one "
            "sequence may be asked for: read fewer numbers, ask for 'generated' tokens alone, or "
            "lower 'max_tokens'",
            code="too_many_readouts",
            param="/inspect/tokens",
        )


class ReadoutFeed:
    """What was read of one sequence, of choice `index`, as entries of the answer; a `silent` one
    shows no token behind its prompt."""

    def __init__(
        self,
        metrics: Metrics,
        tokenizer: Any,
        plan: ReadoutPlan | None,
        prompt_length: int,
        index: int,
        *,
        silent: bool = False,
    ) -> None:
        self._metrics, self._index, self._prompt_length = metrics, index, prompt_length
        self._silent = silent
        self._writer = None
        if plan is not None:
            self._writer = ReadoutWriter(plan, prompt_length, tokenizer)

    def entries(self, found: Sequence[TokenReadout]) -> tuple[Entry, ...]:
        """The entries of what was read for the client, each with its choice; counted."""
        writer = self._writer
        if writer is None or not found:
            return ()
        found = self._own(writer.plan, found)
        read = sum(bool(one.numbers) for one in found)
        for field, count in writer.counts.items():
            self._metrics.readout_values.labels(field).inc(count * read)
        return tuple(
            {"choice": self._index, **writer.entry(one.position, one.token, one.numbers, one.kl)}
            for one in found
        )

    def _own(self, plan: ReadoutPlan, found: Sequence[TokenReadout]) -> list[TokenReadout]:
        """Without what is read for detectors."""
        length = self._prompt_length
        kept = [replace(one, numbers=plan.own(one.position, one.numbers, length)) for one in found]
        if self._silent:
            kept = [one for one in kept if one.position < self._prompt_length]
        return [one for one in kept if one.numbers or one.kl is not None]


def with_readouts(fields: dict[str, Any], entries: list[Entry]) -> dict[str, Any]:
    """`fields` of an answer or a chunk, the entries in `steering` beside a receipt, one for each
    token; of a request that asks for none, as they are."""
    if not entries:
        return fields
    tokens: dict[tuple[int, int], Entry] = {}
    for one in entries:  # a `kl` may come long after the rest
        tokens.setdefault((one["choice"], one["position"]), {}).update(one)
    found = list(tokens.values())
    return {**fields, "steering": {**fields.get("steering", {}), "readouts": found}}
