"""A tokenizer as jobs use it: one text at a time, with a rest after each."""

from __future__ import annotations

import copy
from typing import Any

from steer.jobs.pace import Pace


class PacedTokenizer:
    """A copy of a tokenizer whose work counts against the job's share.

    Rendering and encoding hold Python's interpreter, which the engine's thread needs at every
    operation of the model: many prompts in a row would hold up each step many times. It is a copy
    because tokenizers of Hugging Face may not be used by two threads at once.
    """

    def __init__(self, tokenizer: Any, pace: Pace) -> None:
        self._tokenizer, self._pace = copy.deepcopy(tokenizer), pace

    def __call__(self, *args: Any, **named: Any) -> Any:
        return self._rested(self._tokenizer(*args, **named))

    def encode(self, *args: Any, **named: Any) -> Any:
        return self._rested(self._tokenizer.encode(*args, **named))

    def decode(self, *args: Any, **named: Any) -> Any:
        return self._rested(self._tokenizer.decode(*args, **named))

    def apply_chat_template(self, *args: Any, **named: Any) -> Any:
        return self._rested(self._tokenizer.apply_chat_template(*args, **named))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def _rested(self, result: Any) -> Any:
        self._pace.rest(0.0)
        return result
