"""Jacobian lenses: the mean derivative of the last block's output with respect to each layer.

    J_l = mean over texts and source tokens t of Σ_{t' ≥ t} ∂h_final,t' / ∂h_l,t

with t and t' from `skip` to the last token but one, as the method's own code has it
(github.com/anthropics/jacobian-lens): the first tokens are attention sinks, and nothing is
predicted at the last. One backward pass from one coordinate of h_final, summed over t', gives that
row of J_l for all layers and all t at once. So rows are what costs, and with `average` each row is
a mean over so many of the texts, every row over equally many, instead of over all of them.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float
from pydantic import JsonValue
from torch import Tensor

from steer.artefacts.lens import Lens
from steer.engines.base import Engine
from steer.engines.gradients import DifferentiableModel, Edit, differentiable
from steer.errors import SteerError, Unsupported, pointer
from steer.fit.data.jsonl import sha256_of
from steer.fit.data.prompt import Prompt, prompt_json
from steer.fit.methods.bookmark import Bookmark
from steer.fit.methods.card import made_on, split
from steer.fit.methods.lenses.sample import Tokens, layer_points
from steer.fit.methods.lenses.yardstick import Yardstick
from steer.fit.states import Progress, prompt_tokens
from steer.model import HookPoint, ModelInfo

MEASURING = 512
"""Tokens on which the lens is measured."""
PARTS = 100
"""How many parts of the whole `progress` is told of."""
_ROWS_AT_ONCE = 4
"""Backward passes of one piece of work, between which no request goes on."""


@dataclass(frozen=True)
class _Share:
    """A text, and the coordinates of the last block's output that are differentiated on it."""

    text: Tokens
    coordinates: tuple[int, ...]


def fit_jacobian_lens(
    engine: Engine,
    prompts: Sequence[Prompt],
    *,
    name: str,
    average: int | None = 8,
    tokens: int = 128,
    skip: int = 16,
    held_out: float = 0.2,
    seed: int = 0,
    layers: Sequence[int] | None = None,
    batch: int = 4,
    description: str = "",
    licence: str = "",
    progress: Progress | None = None,
) -> Lens:
    """A Jacobian lens for the model of `engine`: for the outputs of `layers`, or for every layer's
    and the embeddings.

    Each text counts with its first `tokens` tokens; those with fewer than `skip` + 2 are left out.
    Every row of every J is the mean over `average` texts, or over all where it is None or there are
    no more. The share `held_out` of the texts measures: the card's `provenance["kl"]` holds, for
    what goes into each block, the mean divergence in nats of the model's own next-token
    distribution from that of the plain logit lens and of this one. `progress` is told of every
    hundredth of the rows.

    Raises `Unsupported` (`no_gradients`, `no_unembedding`), `SteerError` (`no_prompts`) where no
    text is long enough, and at `/layers` for one that has no map. Memory: d² floats for each layer,
    and the graph of `batch` texts from the first layer on.
    """
    check_engine(engine)
    blocks = blocks_read(engine.info, layers)
    texts = [tuple(prompt_tokens(engine, prompt)[:tokens]) for prompt in prompts]
    long = [text for text in texts if len(text) >= skip + 2]
    fitted, tried = split(long, held_out, seed)
    if not fitted:
        raise SteerError(
            f"none of the {len(texts)} prompts has the {skip + 2} tokens that a Jacobian lens "
            f"needs with a skip of {skip}: give longer texts, or a lower 'skip'",
            code="no_prompts",
        )
    each = len(fitted) if average is None else min(average, len(fitted))
    jacobians = mean_jacobians(engine, fitted, each, skip, seed, batch, progress, blocks)
    measuring = Yardstick.read(engine, tried, MEASURING, seed, batch, None)
    depth = engine.info.n_layers
    return Lens.of_jacobians(
        jacobians,
        depth=depth,
        name=name,
        model=engine.info.own_name,
        description=description,
        licence=licence,
        provenance={
            "method": "jacobian-lens",
            "data_sha256": sha256_of([prompt_json(prompt) for prompt in prompts]),
            "prompts": len(fitted),
            "average": each,
            "tokens": tokens,
            "skip": skip,
            "short": len(texts) - len(long),
            "held_out_tokens": measuring.states.shape[1],
            "seed": seed,
            "kl": _measured(measuring, Lens.of_jacobians(jacobians, depth=depth)),
            **made_on(engine),
        },
    )


def check_engine(engine: Engine) -> None:
    """Raises `Unsupported` where `engine` cannot differentiate, or read states as logits."""
    differentiable(engine)
    if engine.capabilities.no_unembedding is not None:
        raise Unsupported(engine.capabilities.no_unembedding, code="no_unembedding")


def blocks_read(model: ModelInfo, layers: Sequence[int] | None) -> tuple[int, ...]:
    """The blocks whose inputs the lens reads: those after `layers`, or all. Raises `SteerError` at
    `/layers`."""
    if layers is None:
        return tuple(range(model.n_layers))
    for place, layer in enumerate(layers):
        at = pointer("layers", place)
        model.check_point(HookPoint(layer), param=at)
        if layer == model.n_layers - 1:
            raise SteerError(
                f"layer {layer} is the last: a lens leads to its output, which needs no map; leave "
                "it out",
                code="invalid_option",
                param=at,
            )
    return tuple(sorted({layer + 1 for layer in layers}))


def mean_jacobians(
    engine: Engine,
    texts: Sequence[Tokens],
    each: int,
    skip: int,
    seed: int,
    batch: int,
    progress: Progress | None,
    blocks: Sequence[int] | None = None,
) -> dict[int, Float[Tensor, "d d"]]:
    """J by the block whose input it reads, float32, every row the mean over `each` of `texts`: of
    `blocks`, or of all. What was ended goes on from its bookmark, which holds the sums."""
    chosen_blocks = blocks_read(engine.info, None) if blocks is None else tuple(blocks)
    width, points = engine.info.d_model, [layer_points(engine)[block] for block in chosen_blocks]
    last = HookPoint(engine.info.n_layers - 1)
    bookmark = Bookmark(engine, ["jacobian-lens", texts, each, skip, seed, batch, chosen_blocks])
    kept = bookmark.read()
    found = kept["found"] if kept else torch.zeros(len(points), width, width)
    begun = int(kept["pieces"]) if kept else 0
    done, whole = 0, width * each
    for piece, (rows, coordinates) in enumerate(_all_pieces(texts, width, each, seed, batch)):
        before, done = done, done + sum(map(len, coordinates))
        if piece >= begun:
            work = _rows([one.text for one in rows], coordinates, points, last, skip)
            chosen, gradients = differentiable(engine).differentiate(work)
            found.index_add_(1, chosen, gradients)
            bookmark.write(partial(_kept_rows, found, piece + 1))
        if progress is not None and piece >= begun - 1:
            # What was done before is told of at once.
            before = 0 if piece == begun - 1 else before
            progress(PARTS * done // whole - PARTS * before // whole)
    return dict(zip(chosen_blocks, found / each, strict=True))


def _shares(texts: Sequence[Tokens], width: int, each: int, seed: int) -> list[_Share]:
    """The texts, longest first, with their coordinates: each coordinate `each` times, on as many
    texts."""
    order = list(range(len(texts)))
    random.Random(seed).shuffle(order)
    step = len(texts) // each
    mine: list[list[int]] = [[] for _ in texts]
    for coordinate in range(width):
        for turn in range(each):
            mine[order[(coordinate + turn * step) % len(texts)]].append(coordinate)
    shares = [_Share(text, tuple(own)) for text, own in zip(texts, mine, strict=True) if own]
    return sorted(shares, key=lambda share: -len(share.text))


def _groups(shares: Sequence[_Share], batch: int) -> Iterator[list[_Share]]:
    """Batches of texts; with fewer texts than that, a text stands in several rows."""
    for first in range(0, len(shares), batch):
        group = list(shares[first : first + batch])
        copies = max(1, batch // len(group))
        yield [
            _Share(one.text, one.coordinates[turn::copies])
            for one in group
            for turn in range(copies)
            if one.coordinates[turn::copies]
        ]


def _all_pieces(
    texts: Sequence[Tokens], width: int, each: int, seed: int, batch: int
) -> Iterator[tuple[list[_Share], list[tuple[int, ...]]]]:
    """The whole work in its order."""
    for group in _groups(_shares(texts, width, each, seed), batch):
        yield from _pieces(group)


def _kept_rows(found: Tensor, pieces: int) -> dict[str, Tensor]:
    return {"found": found, "pieces": torch.tensor(pieces)}


def _pieces(group: Sequence[_Share]) -> Iterator[tuple[list[_Share], list[tuple[int, ...]]]]:
    """The rows of a group that have something left to do, and their next coordinates."""
    for first in range(0, max(len(one.coordinates) for one in group), _ROWS_AT_ONCE):
        rows = [one for one in group if len(one.coordinates) > first]
        yield rows, [one.coordinates[first : first + _ROWS_AT_ONCE] for one in rows]


def _rows(
    texts: Sequence[Tokens],
    coordinates: Sequence[tuple[int, ...]],
    points: Sequence[HookPoint],
    last: HookPoint,
    skip: int,
) -> Callable[[DifferentiableModel], tuple[Tensor, Float[Tensor, "points rows d"]]]:
    """One forward pass, and one backward pass for each place in `coordinates`: these, and for each
    the row of every point's J on its own text."""

    def work(model: DifferentiableModel) -> tuple[Tensor, Tensor]:
        states: dict[HookPoint, Tensor] = {}
        edits = {point: _kept(states, point) for point in points}
        final = model.run(texts, edits=edits, capture=[last]).states[last]
        counted = torch.zeros(final.shape[:2], device=final.device)
        for row, text in enumerate(texts):
            counted[row, skip : len(text) - 1] = 1.0
        passes = max(map(len, coordinates))
        shares = counted / counted.sum(1, keepdim=True)
        done: list[int] = []
        found = []
        for turn in range(passes):
            rows = [row for row, own in enumerate(coordinates) if turn < len(own)]
            chosen = [coordinates[row][turn] for row in rows]
            wanted = (final[rows, :, chosen] * counted[rows]).sum()
            gradients = torch.autograd.grad(
                wanted, [states[point] for point in points], retain_graph=turn + 1 < passes
            )
            means = [torch.einsum("rtd,rt->rd", one.float(), shares)[rows] for one in gradients]
            found.append(torch.stack(means).cpu())
            done += chosen
        return torch.tensor(done), torch.cat(found, dim=1)

    return work


def _kept(states: dict[HookPoint, Tensor], point: HookPoint) -> Edit:
    """Changes nothing, and keeps the states that the derivatives are with respect to."""

    def edit(x: Tensor) -> Tensor:
        states[point] = x if x.requires_grad else x.detach().requires_grad_(True)
        return states[point]

    return edit


def _measured(on: Yardstick, lens: Lens) -> dict[str, JsonValue]:
    return {
        str(block): {
            "plain": round(on.divergence(states), 4),
            "jacobian": round(on.divergence(lens.translated(states, block, "resid_pre")), 4),
        }
        for block, states in enumerate(on.states[:-1])
        if block in lens.translators
    }
