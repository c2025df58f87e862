"""A model's first blocks, computed once for rows that are the same as far as these go.

One text under many plans, as where strengths of equal KL are looked for, is the same in every row
up to the first block that a plan reaches. The blocks below that run for one row, and are stood in
for in the pass of all rows. Models whose later blocks see more of earlier ones than the stream (the
keys that layers share, say) are found out by a trial, and run whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor, nn

from steer.engines.transformers.structure.calls import Call, returning, standing_in
from steer.engines.transformers.structure.head import close


class Stem:
    """Assumes: nobody else calls the model meanwhile."""

    def __init__(self, blocks: Mapping[int, nn.Module], seen: Mapping[nn.Module, Call]) -> None:
        """`blocks` are those that run, by layer; `seen` is a plain pass."""
        self._returned = {
            layer: (block, seen[block].returned) for layer, block in blocks.items() if block in seen
        }
        self._proven: dict[int, bool] = {}

    @contextmanager
    def given(self, depth: int, states: Tensor) -> Iterator[None]:
        """Inside the `with` block the first `depth` blocks compute nothing, and the next is given
        `states` `[rows, columns, d_model]`."""
        with standing_in(
            {
                block: returning(value, states)
                for layer, (block, value) in self._returned.items()
                if layer < depth
            }
        ):
            yield

    def serves(self, depth: int, whole: Callable[[], Tensor], parted: Callable[[], Tensor]) -> bool:
        """Whether nothing above block `depth` sees what lies below but by the stream: found out
        once, by the logits of some tokens, `whole` and with `given` states."""
        if not any(layer < depth for layer in self._returned):
            return False
        if depth not in self._proven:
            self._proven[depth] = self._agree(whole, parted)
        return self._proven[depth]

    def _agree(self, whole: Callable[[], Tensor], parted: Callable[[], Tensor]) -> bool:
        wanted = whole()
        try:
            found = parted()
        except Exception:
            return False  # whatever a model fails with when blocks do not run, it runs without this
        return found.shape == wanted.shape and close(found.float(), wanted.float(), wanted.dtype)
