"""Tokens to text, as they come: no broken characters, and cut before a stop string."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from steer.prompts.labels import BROKEN
from steer.prompts.tokens import answer_text


@dataclass(frozen=True)
class TextRules:
    """What of a sequence becomes text: up to the first of `stops`, which the text ends with where
    `keep_stop`; they count after the first `min_tokens` tokens. Special tokens are text where
    `special`.
    """

    stops: tuple[str, ...] = ()
    keep_stop: bool = False
    min_tokens: int = 0
    special: bool = False


class Detokenizer:
    """Turns tokens into text piece by piece.

    Guarantees: the pieces, `finish()` included, join to the decoding of all the tokens. A piece is
    held back while it ends inside a multi-byte character.
    """

    def __init__(self, tokenizer: Any, *, special: bool = False) -> None:
        self._tokenizer, self._special = tokenizer, special
        self._tokens: list[int] = []
        # Decoding starts a little before the new tokens, because some tokenizers render the first
        # token of a text differently; what was sent before is subtracted.
        self._from, self._sent = 0, 0

    def push(self, token: int) -> str:
        """The text that `token` completes; often of several tokens, or none."""
        self._tokens.append(token)
        return self._new_text(hold=True)

    def finish(self) -> str:
        """What was held back, broken or not."""
        return self._new_text(hold=False)

    def _new_text(self, *, hold: bool) -> str:
        before = self._decode(self._tokens[self._from : self._sent])
        text = self._decode(self._tokens[self._from :])
        if len(text) <= len(before) or (hold and text.endswith(BROKEN)):
            return ""
        self._from, self._sent = self._sent, len(self._tokens)
        return text[len(before) :]

    def _decode(self, tokens: Sequence[int]) -> str:
        return answer_text(self._tokenizer, tokens, special=self._special)


class TextStream:
    """The text of one sequence, ended by the first stop string.

    `push` returns text that no stop string can take back. An engine that matches stop strings
    itself calls `watch` for every token, from any thread; `taken` then gives the pieces in turn.
    """

    def __init__(self, tokenizer: Any, rules: TextRules = TextRules()) -> None:
        self._detokenizer = Detokenizer(tokenizer, special=rules.special)
        self.rules, self._tokens = rules, 0
        self._held = ""
        self._pieces: deque[str] = deque()
        self.stopped = False

    def push(self, token: int) -> str:
        """Text that is safe to send after `token`."""
        self._tokens += 1
        return self._released(self._detokenizer.push(token))

    def finish(self) -> str:
        """The rest, when the sequence ended for another reason than a stop string."""
        if self.stopped:
            return ""
        text = self._released(self._detokenizer.finish())
        rest, self._held = self._held, ""
        return text if self.stopped else text + rest

    def watch(self, token: int) -> bool:
        """True once a stop string is complete; the form of `GenerationRequest.stop`."""
        self._pieces.append(self.push(token))
        return self.stopped

    def taken(self) -> str:
        """The piece of the next token that `watch` saw."""
        return self._pieces.popleft()

    def _released(self, text: str) -> str:
        rules = self.rules
        if not rules.stops or self._tokens <= rules.min_tokens:
            return text
        self._held += text
        found = [(place, stop) for stop in rules.stops if (place := self._held.find(stop)) >= 0]
        if found:
            self.stopped = True
            place, stop = min(found)
            return self._held[: place + (len(stop) if rules.keep_stop else 0)]
        keep = max(_overlap(self._held, stop) for stop in rules.stops)
        cut = len(self._held) - keep
        safe, self._held = self._held[:cut], self._held[cut:]
        return safe


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of `text` that is a beginning of `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
