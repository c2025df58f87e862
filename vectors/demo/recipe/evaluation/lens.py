"""The logit lens: do the last layers read the token that an answer needs next?"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from steer_vectors.demo.recipe.data import chat
from steer_vectors.demo.recipe.evaluation.checks import Check
from steer_vectors.demo.recipe.evaluation.demo import Demo
from steer_vectors.demo.recipe.evaluation.estimates import share
from steer_vectors.demo.recipe.training.corpus import is_held_out
from steer_vectors.demo.recipe.world.attributes import capitalise
from steer_vectors.demo.recipe.world.instructions import PLAIN_WORDS
from steer_vectors.demo.recipe.world.questions import all_questions

from steer.engines.base import CaptureRequest
from steer.model import HookPoint
from steer.prompts import Prompt, part_tokens, render

LEAST = 0.95
LAYERS = 3


class Begun(NamedTuple):
    """A question about a capital, and the answer up to the capital's name."""

    prompt: Prompt
    opening: str
    capital: str


def begun_answers() -> list[Begun]:
    """Held-out wordings in three languages, also under plain system messages."""
    found = []
    for q in all_questions()["country"]:
        if q.kind != "capital" or q.fact is None:
            continue
        for lang, wordings in q.asks.items():
            clause, capital = q.first[0][lang], q.fact[lang]
            opening = capitalise(clause[: clause.rindex(capital)].rstrip())
            found += [
                Begun(chat(w, plain), opening, capital)
                for w in wordings
                if is_held_out(q, w)
                for plain in ("", *PLAIN_WORDS)
            ]
    return found


def lens(demo: Demo) -> Iterator[Check]:
    """One row for each of the last layers; the last of all is the model's own prediction."""
    engine, tokenizer = demo.engine, demo.engine.tokenizer
    asked = demo.draw(begun_answers(), "lens")
    prompts = [
        [*render(tokenizer, one.prompt), *part_tokens(tokenizer, one.opening)] for one in asked
    ]
    wanted = [part_tokens(tokenizer, f" {one.capital}")[0] for one in asked]
    last = engine.info.n_layers
    points = tuple(HookPoint(layer) for layer in range(last - LAYERS, last))
    captured = engine.capture(CaptureRequest(prompts, points, positions=(-1,)))
    for point in points:
        read = [int(engine.unembed(one.states[point][0]).argmax()) for one in captured]
        hits = [token == right for token, right in zip(read, wanted, strict=True)]
        yield Check("lens", f"capital's token at layer {point.layer}", share(hits), LEAST)
