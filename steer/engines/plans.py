"""The plan cache of an engine: its tokenizer reads triggers, its model reads concepts' texts
and has the rows of tokens."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from steer.artefacts.library import Library
from steer.engines.base import CaptureRequest, Engine
from steer.engines.selecting import reader_of
from steer.engines.token_rows import token_reader
from steer.model import HookPoint
from steer.plan.cache import PlanCache
from steer.prompts import text_tokens
from steer.registry.registry import Registry


def plans_of(engine: Engine, library: Library, **options: Any) -> PlanCache:
    """Compiles specs for `engine` with artefacts from `library`; `options` are `PlanCache`'s.

    A registry's names mean what they mean for the engine's model.
    """
    if isinstance(library, Registry):
        library = library.for_model(engine.info)
    tokenizer, reader = engine.tokenizer, reader_of(engine)

    def encode_text(text: str, point: HookPoint) -> Tensor:
        prompt = tuple(text_tokens(tokenizer, text))
        captured = engine.capture(CaptureRequest(prompts=[prompt], points=(point,)))
        return captured[0].states[point]

    return PlanCache(
        library,
        engine.info,
        engine.capabilities,
        tokenize=reader.tokenize,
        vocabulary=reader.vocabulary,
        encode_text=encode_text,
        read_token=token_reader(engine, tokenizer),
        **options,
    )
