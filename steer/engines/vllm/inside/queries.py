"""What the attention of a layer is handed of states that are put before the layer, between two
steps. The layer is left as soon as its attention is called."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from steer.engines.base import QueriesKeys
from steer.engines.vllm.inside.alone import HandedRows, LayersAlone, ReachedError
from steer.errors import Unsupported

_CODE = "no_attention"


def queries_and_keys(
    alone: LayersAlone, layer: int, states: Float[Tensor, "N d_model"]
) -> QueriesKeys | None:
    """Of the heads that this worker has; None where another has the layer. Raises `Unsupported`
    (`no_attention`) where the layer's attention is not handed them."""
    if layer not in alone.attention.owned:
        return None
    if layer not in alone.attention.layers:
        raise Unsupported(
            f"the attention of layer {layer} is not one of vLLM's that is handed queries, keys "
            "and values, so these are not told",
            code=_CODE,
        )
    parts = [_handed(alone, layer, rows) for rows in alone.pieces(states)]
    queries, keys = (torch.cat(list(one)) for one in zip(*parts, strict=True))
    return QueriesKeys(queries, keys.repeat_interleave(queries.shape[1] // keys.shape[1], 1))


def _handed(alone: LayersAlone, layer: int, states: Tensor) -> tuple[Tensor, Tensor]:
    scale = float(alone.attention.layers[layer].impl.scale)
    seen: list[tuple[Tensor, Tensor]] = []

    def take(rows: HandedRows) -> None:
        query, key = rows["query"], rows["key"]
        if query is None or key is None:
            raise Unsupported(
                f"the attention of layer {layer} is handed no key of its own, so its queries "
                "and keys are not told",
                code=_CODE,
            )
        seen.append((scale * query.float().cpu(), key.float().cpu()))
        raise ReachedError

    alone.run(layer, states, take, what="the queries and keys of its heads are", code=_CODE)
    return seen[0]
