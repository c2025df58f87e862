"""Tuned lenses (2303.08112): for each layer, the affine map after which the model's own norm and
output matrix say what the model says in the end.

Each translator begins as the closed form: the ridge regression of the last block's output on the
layer's state. Then it is trained, by the divergence of the model's own distribution from its own,
on some of the tokens. Of both, and of several ridges, the one with the least divergence on texts
that neither saw is kept; and where that is no better than the plain logit lens on further texts,
the layer keeps the plain lens, so that the lens is never the worse of the two there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from steer.artefacts.lens import Lens
from steer.engines.base import Engine
from steer.errors import SteerError, Unsupported
from steer.fit.data.answering import with_own_answers
from steer.fit.data.jsonl import sha256_of
from steer.fit.data.prompt import Prompt, prompt_json
from steer.fit.methods.bookmark import Bookmark
from steer.fit.methods.card import made_on, split
from steer.fit.methods.lenses.regression import Regression, Translator
from steer.fit.methods.lenses.sample import Tokens, draw_places, layer_points, read_layers
from steer.fit.methods.lenses.training import Training, train
from steer.fit.methods.lenses.yardstick import Yardstick
from steer.fit.states import Progress, prompt_tokens

PENALTIES = (1e-3, 1e-2, 1e-1, 1.0)
LEAST_PROMPTS = 8
CHOOSING, MEASURING = 128, 512
"""Tokens on which a layer's translator is chosen, and on which it is measured."""


@dataclass(frozen=True)
class _Best:
    """A layer's best translator so far, W and b, and how it came about."""

    divergence: float
    weight: Tensor
    bias: Tensor
    origin: str


def fit_tuned_lens(
    engine: Engine,
    prompts: Sequence[Prompt],
    *,
    name: str,
    answer_tokens: int = 0,
    held_out: float = 0.2,
    steps: int = 16,
    rows: int = 64,
    rate: float = 3e-4,
    seed: int = 0,
    batch: int = 8,
    description: str = "",
    licence: str = "",
    progress: Progress | None = None,
) -> Lens:
    """A lens for the model of `engine`, fitted on every token of `prompts`.

    With `answer_tokens` the model first answers each prompt, at temperature 1, with up to so many
    tokens, which are read too. `steps` of training on `rows` tokens each follow the closed form;
    they need derivatives, and 0 leaves them out. Of the share `held_out` of the prompts, half
    choose and half measure. `progress` is told of every prompt answered and read, and every step.

    The card's `provenance["kl"]` holds, for what goes into each block, the mean divergence in nats
    on the texts that measure, of the plain logit lens and of the tuned one, and what the translator
    is `from`. Raises `SteerError`. Memory: 2·d² floats in float64 for each layer, then four lenses
    and the states of steps · rows tokens.
    """
    _check(engine, len(prompts), steps)
    texts = [tuple(prompt_tokens(engine, prompt)) for prompt in prompts]
    if answer_tokens:
        texts = _answered(engine, texts, answer_tokens, seed, batch, progress)
    fitted, tried = split(texts, held_out, seed)
    if len(tried) == len(texts):  # so small a share that it was not kept apart
        fitted, tried = texts[4:], texts[:4]
    layers, seen = _regress(engine, fitted, steps * rows, seed, batch, progress)
    choosing = Yardstick.read(engine, tried[::2], CHOOSING, seed, batch, progress)
    measuring = Yardstick.read(engine, tried[1::2], MEASURING, seed, batch, progress)
    bases, best = _solved(layers, choosing, progress)
    if steps:
        training = Training(steps, rows, rate, seed)
        what = [texts, held_out, seed, batch]
        for block, (weight, bias) in train(engine, bases, seen, training, what, progress).items():
            one = _tried(choosing, block, weight, bias, "training")
            best[block] = min(best[block], one, key=lambda this: this.divergence)
    readings = {}
    for block, one in best.items():
        best[block], readings[str(block)] = _measured(measuring, block, one)
        _tell(progress)
    return Lens.of(
        {block: (one.weight, one.bias) for block, one in best.items()},
        name=name,
        model=engine.info.own_name,
        description=description,
        licence=licence,
        provenance={
            "method": "tuned-lens",
            "data_sha256": sha256_of([prompt_json(prompt) for prompt in prompts]),
            "prompts": len(prompts),
            "answer_tokens": answer_tokens,
            "tokens": sum(map(len, fitted)),
            "held_out_tokens": measuring.states.shape[1],
            "steps": steps,
            "rows": rows,
            "rate": rate,
            "seed": seed,
            "kl": readings,
            **made_on(engine),
        },
    )


def _check(engine: Engine, prompts: int, steps: int) -> None:
    if prompts < LEAST_PROMPTS:
        raise SteerError(
            f"{prompts} prompts are too few to fit a lens on some and measure it on others: give "
            f"at least {LEAST_PROMPTS}, of a few thousand tokens together",
            code="no_prompts",
        )
    check_engine(engine, steps)


def check_engine(engine: Engine, steps: int) -> None:
    """Raises `Unsupported` where `engine` cannot read states as logits, or cannot train."""
    if engine.capabilities.no_unembedding is not None:
        raise Unsupported(engine.capabilities.no_unembedding, code="no_unembedding")
    if steps and not engine.capabilities.gradients:
        raise Unsupported(
            f"the {engine.capabilities.engine} engine cannot differentiate its model, which "
            f"training asks for; got {steps} steps: set them to 0, for the closed form alone, or "
            "fit on the transformers engine; the result serves on every engine",
            param="/steps",
            code="no_gradients",
        )


def _answered(
    engine: Engine,
    prompts: Sequence[Tokens],
    count: int,
    seed: int,
    batch: int,
    progress: Progress | None,
) -> list[Tokens]:
    """Each prompt with an answer of the model's own."""
    found: list[Tokens] = []
    for first in range(0, len(prompts), batch):
        group = prompts[first : first + batch]
        found += with_own_answers(engine, group, count, seed=seed, first=first)
        if progress is not None:
            progress(len(group))
    return found


def _regress(
    engine: Engine,
    texts: Sequence[Tokens],
    kept: int,
    seed: int,
    batch: int,
    progress: Progress | None,
) -> tuple[list[Regression], Float[Tensor, "points n d_model"]]:
    """A regression for each block's input over every token, and the states of `kept` tokens."""
    width, points = engine.info.d_model, len(layer_points(engine))
    bookmark = Bookmark(engine, ["tuned-lens sums", texts, kept, seed, batch])
    held = bookmark.read()
    begun = int(held["done"]) if held else 0
    layers = [Regression.of(_below(held, block), width) for block in range(points - 1)]
    found = [held["found"] if held else torch.zeros(points, 0, width)]
    places = draw_places(texts, kept, seed)

    def state() -> dict[str, Tensor]:
        found[:] = [torch.cat(found, dim=1)]
        sums = {
            f"{block}.{name}": value
            for block, layer in enumerate(layers)
            for name, value in layer.state().items()
        }
        return {"done": torch.tensor(done), "found": found[0], **sums}

    done = begun
    if begun and progress is not None:
        progress(begun)
    for first in range(begun, len(texts), batch):
        group = texts[first : first + batch]
        done = first + len(group)
        chosen = places[first:done]
        for states, those in zip(read_layers(engine, group, batch, progress), chosen, strict=True):
            for block, layer in enumerate(layers):
                layer.add(states[block], states[-1])
            found.append(states[:, those])
        bookmark.write(state)
    return layers, torch.cat(found, dim=1)


def _below(held: Mapping[str, Tensor], block: int) -> dict[str, Tensor]:
    """What a bookmark holds of a block's regression."""
    start = f"{block}."
    return {key[len(start) :]: one for key, one in held.items() if key.startswith(start)}


def _solved(
    layers: Sequence[Regression], choosing: Yardstick, progress: Progress | None
) -> tuple[dict[int, Translator], dict[int, _Best]]:
    """For each block the closed form under the ridge that reads best."""
    bases: dict[int, Translator] = {}
    best: dict[int, _Best] = {}
    for block, layer in enumerate(layers):
        for penalty in PENALTIES:
            base = layer.solve(penalty)
            one = _tried(choosing, block, base.weight, base.bias, f"ridge {penalty:g}")
            if block not in best or one.divergence < best[block].divergence:
                bases[block], best[block] = base, one
        _tell(progress)
    return bases, best


def _tried(on: Yardstick, block: int, weight: Tensor, bias: Tensor, origin: str) -> _Best:
    return _Best(on.divergence(_read(on.states[block], weight, bias)), weight, bias, origin)


def _read(x: Float[Tensor, "n d"], weight: Tensor, bias: Tensor) -> Float[Tensor, "n d"]:
    return x + functional.linear(x, weight, bias)


def _measured(on: Yardstick, block: int, one: _Best) -> tuple[_Best, dict[str, float | str]]:
    """The translator to keep, and what the card says: where the plain lens reads no worse on the
    texts that measure, the layer keeps the plain one."""
    plain = on.divergence(on.states[block])
    tuned = on.divergence(_read(on.states[block], one.weight, one.bias))
    if not tuned < plain:
        nothing = torch.zeros_like(one.weight), torch.zeros_like(one.bias)
        one, tuned = _Best(plain, *nothing, "plain lens"), plain
    return one, {"plain": round(plain, 4), "tuned": round(tuned, 4), "from": one.origin}


def _tell(progress: Progress | None) -> None:
    """Nothing is done that is counted; but a job that was cancelled stops here."""
    if progress is not None:
        progress(0)
