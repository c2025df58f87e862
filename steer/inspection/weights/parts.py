"""What heads and neurons write into the stream, and what they make of a token's embedding.

What is written is a column of the output projection behind `head_out` or `mlp_act`; a norm between
projection and stream, as in models with sandwich norms, is held at a projection's output of size 1,
as the final norm is at a state of size 1. What is read is what the block itself makes of the
embedding: with its norm, its biases and, of a neuron, its activation function.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from steer.engines.base import Engine
from steer.errors import Unsupported
from steer.inspection.attribution.parts import ADDED, projected, weight_of_norm
from steer.inspection.weights.embeddings import Embeddings
from steer.inspection.weights.vocabulary import Vocabulary
from steer.model import HookPoint
from steer.spec import Site

_DRAWS = 8
_TOLERANCE = 1e-3
_TOLERANCE_HALF = 3e-2


def written(
    engine: Engine, point: HookPoint, channels: range, *, param: str
) -> Float[Tensor, "channels d_model"]:
    """What each of `channels` of the states at `point`, at 1, adds to the stream, float64.

    Raises `Unsupported` (`unsupported_inspection`) at `param` where that is no column of a
    projection.
    """
    weight = _weight_behind(engine, point, param)
    units = torch.zeros(len(channels) + 1, engine.info.width(point.site)).double()
    units[torch.arange(len(channels)), torch.tensor(channels)] = 1.0
    made = projected(engine, point, units)
    return weight * (made[:-1] - made[-1])


def values_read(
    engine: Engine, embeddings: Embeddings, layer: int, heads: range
) -> Float[Tensor, "vocab heads head_dim"]:
    """What each of `heads` passes on of each token that it attends to, were the token's embedding
    all that the stream holds there; float32."""
    width = engine.info.head_dim or 0
    read = torch.empty(engine.info.vocab_size, len(heads), width)
    start, end = HookPoint(layer, "resid_pre"), HookPoint(layer, "head_out")
    channels = range(heads.start * width, heads.stop * width)
    for tokens, rows in embeddings.pieces():
        passed = engine.carry(start, end, rows, channels).cpu()
        read[tokens] = passed.reshape(len(rows), len(heads), width)
    return read


def values_written(
    engine: Engine, vocabulary: Vocabulary, layer: int, head: int
) -> Float[Tensor, "vocab head_dim"]:
    """What each channel of a head's values gives to every token's score; float32."""
    width = engine.info.head_dim or 0
    channels = range(head * width, (head + 1) * width)
    vectors = written(engine, HookPoint(layer, "head_out"), channels, param="/head")
    scores = torch.empty(engine.info.vocab_size, width)
    for part, some in vocabulary.pieces(vectors):
        scores[:, part] = some.T.float()
    return scores


def activations_of(
    engine: Engine, embeddings: Embeddings, layer: int, neuron: int
) -> tuple[Site, Float[Tensor, " vocab"]]:
    """A neuron's activation by each token's embedding, float32, and where that is put: at
    `resid_mid`, or in a model without one at `resid_pre`."""
    site: Site = "resid_mid" if "resid_mid" in engine.info.sites else "resid_pre"
    start, end = HookPoint(layer, site), HookPoint(layer, "mlp_act")
    channels = range(neuron, neuron + 1)
    found = [
        engine.carry(start, end, rows, channels)[:, 0].cpu() for _, rows in embeddings.pieces()
    ]
    return site, torch.cat(found)


def _weight_behind(engine: Engine, point: HookPoint, param: str) -> Float[Tensor, " d_model"]:
    """What a norm behind the projection multiplies each channel by; ones where there is none."""
    out = HookPoint(point.layer, ADDED[point.site])
    engine.info.check_point(out, param=param)
    generator = torch.Generator().manual_seed(point.layer)
    states = torch.randn(_DRAWS, engine.info.width(point.site), generator=generator)
    made = projected(engine, point, states)
    added = engine.carry(point, out, states).double().cpu()
    single = engine.info.dtype in ("float32", "float64")
    near = (_TOLERANCE if single else _TOLERANCE_HALF) * added.norm()
    if (made - added).norm() <= near:
        return torch.ones_like(made[0])
    weight = weight_of_norm(made, added)
    size = made.pow(2).mean(-1, keepdim=True).sqrt().clamp_min(1e-30)
    if (weight * made / size - added).norm() <= near:
        return weight
    raise Unsupported(
        f"what layer {point.layer} adds at {out.site!r} is no norm of what its output projection "
        f"makes, so that the channels of {point.site!r} write no vector of their own: read a "
        "registered vector instead",
        code="unsupported_inspection",
        param=param,
    )
