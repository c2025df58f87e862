"""The plan cache of an engine: its tokenizer reads triggers, its model reads concepts' texts."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor

from steer.artefacts.library import Library
from steer.engines.base import CaptureRequest, Engine
from steer.model import HookPoint
from steer.plan.cache import PlanCache
from steer.prompts import text_tokens, trigger_tokens
from steer.prompts.vocabulary import vocabulary_of
from steer.registry.registry import Registry


def plans_of(engine: Engine, library: Library, **options: Any) -> PlanCache:
    """Compiles specs for `engine` with artefacts from `library`; `options` are `PlanCache`'s.

    A registry's names mean what they mean for the engine's model.
    """
    if isinstance(library, Registry):
        library = library.for_model(engine.info)
    tokenizer = engine.tokenizer

    def encode_text(text: str, point: HookPoint) -> Tensor:
        prompt = tuple(text_tokens(tokenizer, text))
        captured = engine.capture(CaptureRequest(prompts=[prompt], points=(point,)))
        return captured[0].states[point]

    return PlanCache(
        library,
        engine.info,
        engine.capabilities,
        tokenize=partial(trigger_tokens, tokenizer),
        vocabulary=partial(vocabulary_of, tokenizer, engine.info.vocab_size),
        encode_text=encode_text,
        **options,
    )
