"""The next token, by layer: the identity prompt against the lenses (2401.06102 §4.1)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from benchmarks.inspection.readings import (
    Curve,
    Reader,
    Share,
    Tokens,
    last_states,
    patched,
    said_of,
    shifted,
)
from steer.artefacts.lens import Lens
from steer.engines.base import Engine
from steer.inspection.controls import text_target
from steer.inspection.patchscopes.target import encode_target
from steer.prompts import PromptInput, encode_prompt

PATCHED, LOGIT, TUNED = "patchscope", "logit lens", "tuned lens"
TEXT, SHUFFLED, NOTHING = "text only", "shuffled state", "no state"
ROWS = 64


def measure(
    engine: Engine, contexts: Sequence[Tokens], lens: Lens, layers: Sequence[int]
) -> tuple[list[Curve], dict[int, Share]]:
    """A curve of each reading and control, and for each layer the patchscope's precision@1 less
    that of the tuned lens.

    What is wanted is the token that the model itself says next.
    """
    states, wanted = last_states(engine, contexts, layers)
    found = Reader(wanted)
    found.add(LOGIT, layers, *_lens(engine, states, wanted, layers, None))
    found.add(TUNED, layers, *_lens(engine, states, wanted, layers, lens))
    target, place = encode_target(engine, "identity", None)
    for name, given in ((PATCHED, states), (SHUFFLED, shifted(states))):
        said = patched(engine, target.ids, place, given, wanted, {n: n for n in layers})
        found.add_answers(name, layers, said)
    texts = []
    for context in contexts:
        source = encode_prompt(engine, PromptInput(tokens=context))
        texts.append(text_target(engine, target, place, source, len(context) - 1))
    found.add_answers(TEXT, [0], said_of(engine, texts, wanted))
    found.add_answers(NOTHING, [0], said_of(engine, [target.ids] * len(contexts), wanted))
    gains = {layer: found.difference(PATCHED, TUNED, n) for n, layer in enumerate(layers)}
    return found.curves, gains


def _lens(
    engine: Engine,
    states: Tensor,
    wanted: Sequence[int],
    layers: Sequence[int],
    lens: Lens | None,
) -> tuple[Tensor, Tensor]:
    """Hits and chances `[layers, contexts]` of what each layer says by the lens."""
    hits, chances = [], []
    tokens = torch.tensor(wanted)
    for n, layer in enumerate(layers):
        read = states[:, n]
        if lens is not None:
            read = lens.translated(read, layer, "resid_post")
        logits = torch.cat([engine.unembed(part).cpu() for part in torch.split(read, ROWS)])
        hits.append(logits.argmax(-1) == tokens)
        chances.append(logits.softmax(-1).gather(1, tokens[:, None])[:, 0].double())
    return torch.stack(hits), torch.stack(chances)
