"""Detectors over vLLM's outputs: each of the engine's requests has a watch for each choice, and an
output behind the token on which one stops is cut there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from steer.readouts.watching import Watch, WatchPlan
from steer_server.generation.inspection.detectors import Entry, told
from steer_server.generation.text import Detokenizer
from steer_server.metrics import Metrics


class WatchedOutputs:
    """The watches of one of the engine's requests, whose outputs come in turn.

    Assumes: outputs hold the tokens that are new (`delta`), or all of a choice's so far; where a
    detector may stop there is one choice, and no output before the end is left out.
    Guarantees: no output that was `cut` shows a token behind the one on which a detector stopped,
    and none before it is missing.
    """

    def __init__(self, plan: WatchPlan, tokenizer: Any, params: Any, *, delta: bool) -> None:
        self._plan, self._tokenizer, self._delta = plan, tokenizer, delta
        self._special = not params.skip_special_tokens
        self._written: bool = params.detokenize
        self._watches: dict[int, Watch] = {}
        self._sent = ""

    def see(
        self, choice: int, prompt_length: int, rows: Sequence[tuple[int, Sequence[float]]]
    ) -> int | None:
        """Takes what is new of a choice; how many of its tokens are shown where it ends there."""
        watch = self._watches.get(choice) or self._plan.watch(prompt_length)
        if watch is None:
            return None
        self._watches[choice] = watch
        if not watch.see(rows):
            return None
        assert watch.stopped_at is not None, "it ends"
        return max(watch.stopped_at + 1 - prompt_length, 0)

    def passed(self, output: Any) -> None:
        """An output that is handed on as it came."""
        if self._delta and self._plan.stops:
            self._sent += output.outputs[0].text

    def cut(self, output: Any, tokens: Sequence[int], shown: int) -> None:
        """Ends `output` with the first `shown` of the choice's `tokens` so far."""
        made = output.outputs[0]
        # What holds all tokens so far is vLLM's own list, to which others may have come since.
        start = len(tokens) - len(made.token_ids) if self._delta else 0
        kept = max(shown - start, 0)
        made.token_ids = made.token_ids[:kept]
        if made.logprobs is not None:
            made.logprobs = made.logprobs[:kept]
        text = self._text(tokens[:shown])
        if not self._delta:
            made.text = text
        else:
            made.text = text[len(self._sent) :] if text.startswith(self._sent) else ""
        made.finish_reason, made.stop_reason = "content_filter", None
        output.finished = True

    def told(self, metrics: Metrics, first: int, name: str) -> list[Entry]:
        """The entries of the request's choices, the first of which is number `first`."""
        found = sorted(self._watches.items())
        return [entry for n, watch in found for entry in told(metrics, watch, first + n, name)]

    def _text(self, tokens: Sequence[int]) -> str:
        if not self._written:
            return ""
        writer = Detokenizer(self._tokenizer, special=self._special)
        return "".join([*map(writer.push, tokens), writer.finish()])
