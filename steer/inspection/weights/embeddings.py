"""What the residual stream begins with for each token of the vocabulary, some at a time.

Each token is read as the first of a sequence, so that a model which adds positions to its
embeddings adds its first, and one that scales or norms them does.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from steer.engines.base import CaptureRequest, Engine
from steer.model import HookPoint

_TOKENS_AT_ONCE = 1024
_KEPT = 1 << 28
"""So many numbers (1 GiB) are kept for the next reader; larger embeddings are read again."""


class Embeddings:
    """Assumes: the engine captures `resid_pre`.

    Guarantees: pieces come in the order of the tokens, and are the same each time.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        numbers = engine.info.vocab_size * engine.info.d_model
        self._kept: list[Tensor] | None = [] if numbers <= _KEPT else None

    def pieces(self) -> Iterator[tuple[slice, Float[Tensor, "n d_model"]]]:
        """All tokens, float32."""
        for place, start in enumerate(range(0, self._engine.info.vocab_size, _TOKENS_AT_ONCE)):
            end = min(start + _TOKENS_AT_ONCE, self._engine.info.vocab_size)
            if self._kept is not None and place < len(self._kept):
                rows = self._kept[place]
            else:
                rows = self.of(range(start, end))
                if self._kept is not None:
                    self._kept.append(rows)
            yield slice(start, end), rows

    def of(self, tokens: Sequence[int]) -> Float[Tensor, "n d_model"]:
        """Those of `tokens`."""
        point = HookPoint(0, "resid_pre")
        prompts = [(token,) for token in tokens]
        captured = self._engine.capture(CaptureRequest(prompts, (point,)))
        return torch.cat([one.states[point] for one in captured])
