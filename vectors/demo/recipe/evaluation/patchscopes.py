"""Patchscopes (2401.06102): reading states by putting them into another prompt."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product

import torch
from steer_vectors.demo.recipe.data import INSTRUCTIONS, chat
from steer_vectors.demo.recipe.evaluation.checks import Check
from steer_vectors.demo.recipe.evaluation.demo import Demo
from steer_vectors.demo.recipe.evaluation.estimates import difference, share
from steer_vectors.demo.recipe.training.corpus import Corpus
from steer_vectors.demo.recipe.world.instructions import PLAIN_WORDS
from steer_vectors.demo.recipe.world.world import LANGS
from torch import Tensor

from steer.engines.base import CaptureRequest
from steer.inspection.patchscopes.patched_runs import StatePatch, run_patched
from steer.model import HookPoint
from steer.prompts import Prompt, PromptInput, encode_prompt, part_tokens, render

LEAST = 0.8
COPYING = "river -> river; Italy -> Italy; Rome -> Rome; Spain ->"
"""What stands before the last arrow is said again."""
PLACE = "Spain"


def patchscopes(demo: Demo) -> Iterator[Check]:
    """Identity of words the model knows, and the next token as the model itself says it."""
    yield from _identity(demo)
    yield from _next_tokens(demo)


@dataclass(frozen=True)
class Source:
    """A token of a prompt, and the token that is to be read out of its state."""

    prompt: tuple[int, ...]
    position: int
    wanted: int


def read_states(demo: Demo, sources: Sequence[Source], layer: int) -> list[Tensor]:
    """The state of each source after a block, `[width]`."""
    point = HookPoint(layer)
    captured = demo.engine.capture(CaptureRequest([s.prompt for s in sources], (point,)))
    return [one.states[point][s.position] for one, s in zip(captured, sources, strict=True)]


def known_words(demo: Demo) -> frozenset[int]:
    """Words of the copying documents that are one token after a space."""
    encoded = (part_tokens(demo.engine.tokenizer, f" {word}") for word in Corpus(0).words)
    return frozenset(tokens[0] for tokens in encoded if len(tokens) == 1)


def _identity(demo: Demo) -> Iterator[Check]:
    """precision@1 from layer 0 to layer 0, over known words in held-out questions about facts.

    The threshold is for words of the target prompt's language. Those of other languages are shown:
    the model reads them as the English word.
    """
    known = known_words(demo)
    found: dict[str, list[Source]] = {lang: [] for lang in LANGS}
    for line, plain in product(demo.lines("facts"), ("", *PLAIN_WORDS)):
        if line["held_out"]:
            asked = chat(line["messages"][-1]["content"], plain)
            prompt = tuple(render(demo.engine.tokenizer, asked))
            start = len(prompt) - len(render(demo.engine.tokenizer, line["messages"])) + 1
            found[line["language"]] += [
                Source(prompt, n, token)
                for n, token in enumerate(prompt)
                if n >= start and token in known
            ]
    for lang, sources in found.items():
        hits = _patched(demo, demo.draw(sources, f"identity {lang}"), 0, COPYING, PLACE)
        what = f"identity of words ({lang}), precision@1 at layer 0"
        yield Check("patchscope", what, share(hits), LEAST if lang == "en" else None)


def _patched(
    demo: Demo, sources: Sequence[Source], layer: int, text: str, place: str
) -> list[bool]:
    """Whether the target prompt, with each source's state at `place` after the same block, goes on
    with the wanted token."""
    target = encode_prompt(demo.engine, PromptInput(text=text))
    point = HookPoint(layer)
    patches = [
        StatePatch(s.position, point, point, state, s.wanted)
        for s, state in zip(sources, read_states(demo, sources, layer), strict=True)
    ]
    where = target.position(place, param="")
    said = run_patched(demo.engine, target.ids, where, patches, top=1, max_tokens=0)
    return [one.top[0].id == s.wanted for one, s in zip(said, sources, strict=True)]


def replies(demo: Demo) -> list[Source]:
    """Places in the model's answers to held-out prompts, and the token that it says next there."""
    tokenizer = demo.engine.tokenizer
    prompts: list[Prompt] = [p for name in INSTRUCTIONS for p in demo.held_out(name)]
    found = []
    for prompt, said in zip(prompts, demo.answers(prompts), strict=True):
        asked = tuple(render(tokenizer, prompt))
        spoken = tuple(part_tokens(tokenizer, said.text))
        found += [
            Source(asked + spoken[:n], len(asked) + n - 1, token) for n, token in enumerate(spoken)
        ]
    return demo.draw(found, "next tokens")


def _next_tokens(demo: Demo) -> Iterator[Check]:
    """In each layer of the upper half: precision@1 of the identity prompt, patched at its last
    token, less that of the logit lens (2401.06102 §4.1)."""
    sources = replies(demo)
    layers = demo.engine.info.n_layers
    prompt = COPYING.removesuffix(" ->")
    for layer in range(layers // 2, layers):
        patched = _patched(demo, sources, layer, prompt, PLACE)
        logits = demo.engine.unembed(torch.stack(read_states(demo, sources, layer)))
        tokens = logits.argmax(-1).tolist()
        lens = [token == s.wanted for token, s in zip(tokens, sources, strict=True)]
        for name, hits in (("identity prompt", patched), ("logit lens", lens)):
            what = f"next token at layer {layer}: {name}"
            yield Check("patchscope", what, share(hits), None, part=True)
        more = difference(patched, lens)
        yield Check("patchscope", f"next token at layer {layer}: identity less lens", more, 0.0)
