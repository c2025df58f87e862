"""Answers that are JSON of a given schema: llguidance says which tokens may come next.

Without llguidance, or with a tokenizer that it cannot read, nothing here is offered and requests
for it are refused by name.
"""

from __future__ import annotations

import importlib.util
import threading
from collections.abc import Collection
from typing import Any, cast

import torch
from torch import Tensor
from transformers import LogitsProcessor, PreTrainedTokenizerFast

from steer.errors import EngineError, SteerError, Unsupported

MAX_SCHEMA = 1 << 16
"""Characters of the longest schema."""

_COMPACT = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""One line: a model that may write white space may do so for ever."""


class Grammars:
    """Makes the masks of one model's requests.

    Guarantees: the vocabulary is read once, when it is first needed (about a second).
    """

    def __init__(self, tokenizer: Any, *, vocab_size: int, ends: Collection[int]) -> None:
        self._tokenizer, self._vocab_size, self._ends = tokenizer, vocab_size, sorted(ends)
        self._vocabulary: Any = None
        self._reading = threading.Lock()

    @property
    def offered(self) -> bool:
        """Whether answers can be bound to a schema here."""
        readable = isinstance(self._tokenizer, PreTrainedTokenizerFast) and bool(self._ends)
        return readable and importlib.util.find_spec("llguidance") is not None

    def check(self, schema: str) -> None:
        """Raises `SteerError` (`invalid_schema`) where no answer can be bound to `schema`."""
        self._matcher(schema)

    def mask(self, schema: str, *, prompt_length: int) -> GrammarMask:
        """The mask of one sequence."""
        return GrammarMask(self._matcher(schema), self._vocab_size, prompt_length=prompt_length)

    def _matcher(self, schema: str) -> Any:
        if not self.offered:
            raise Unsupported(
                "answers cannot be bound to a JSON schema here: the server needs llguidance "
                "(pip install 'steer-llm[json]') and a fast tokenizer with an end token",
                code="unsupported_parameter",
            )
        if len(schema) > MAX_SCHEMA:
            raise SteerError(
                f"the schema has {len(schema)} characters and at most {MAX_SCHEMA} are read: "
                "send a smaller one",
                code="invalid_schema",
            )
        from llguidance import LLMatcher  # noqa: PLC0415 (an extra)

        try:
            grammar = LLMatcher.grammar_from_json_schema(schema, overrides=cast(Any, _COMPACT))
            matcher = LLMatcher(self._read(), grammar, log_level=0)
        except ValueError as error:
            raise _invalid(str(error)) from error
        if matcher.is_error():
            raise _invalid(matcher.get_error())
        return matcher

    def _read(self) -> Any:
        from llguidance.hf import from_tokenizer  # noqa: PLC0415 (an extra)

        with self._reading:
            if self._vocabulary is None:
                self._vocabulary = from_tokenizer(
                    self._tokenizer, n_vocab=self._vocab_size, eos_token=self._ends
                )
            return self._vocabulary


class GrammarMask(LogitsProcessor):
    """Forbids the tokens by which the answer would leave its grammar.

    Assumes: called once for every token of one sequence.
    """

    def __init__(self, matcher: Any, vocab_size: int, *, prompt_length: int) -> None:
        self._matcher, self._read = matcher, prompt_length
        self._bits = torch.zeros((vocab_size + 31) // 32, dtype=torch.int32)
        self._places = torch.arange(32, dtype=torch.int32)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        new = input_ids[0, self._read :].tolist()
        self._read += len(new)
        if new and not self._matcher.consume_tokens(new):
            raise EngineError(f"the answer left its schema: {self._matcher.get_error()}")
        bits = self._bits
        self._matcher.unsafe_compute_mask_ptr(bits.data_ptr(), bits.numel() * bits.element_size())
        if self._matcher.is_error():
            raise EngineError(f"the schema cannot be followed: {self._matcher.get_error()}")
        allowed = ((bits[:, None] >> self._places) & 1).flatten()[: scores.shape[-1]].bool()
        return scores.masked_fill(~allowed.to(scores.device), -torch.inf)


def _invalid(reason: str) -> SteerError:
    lines = reason.strip().splitlines() or [reason]
    return SteerError(
        f"no answer can be bound to this schema: {lines[0][:300]}; change the schema",
        code="invalid_schema",
    )
