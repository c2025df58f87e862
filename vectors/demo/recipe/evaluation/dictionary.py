"""The shipped SAEs. Of the plain one: how well it rebuilds the model's states, what its latents
tell apart, and what clamping single latents does. Of the guided one: whether its taught latents
tell what they were taught."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from steer_vectors.demo.recipe.data import asked_of
from steer_vectors.demo.recipe.evaluation.checks import Check, count
from steer_vectors.demo.recipe.evaluation.demo import Demo
from steer_vectors.demo.recipe.evaluation.estimates import Estimate, Z, bootstrap, difference, share
from steer_vectors.demo.recipe.sae import guided
from steer_vectors.demo.recipe.sae.effects import clamp_spec, effects_on
from steer_vectors.demo.recipe.sae.labels import auroc, classes_of, matches, scores, table
from steer_vectors.demo.recipe.sae.states import Example, corpus_states, examples, reply_states
from steer_vectors.demo.recipe.training.batches import collate, encode
from steer_vectors.demo.recipe.training.corpus import Corpus
from torch import Tensor
from transformers import AutoModelForCausalLM

from steer.artefacts.sae import SAE
from steer.engines.base import CaptureRequest
from steer.model import HookPoint
from steer.prompts import render

VARIANCE, RECOVERED = 0.9, 0.97
AUROC, LATENTS = 0.9, 20
MOVED, VALID, ATTRIBUTES = 0.4, 0.8, 3
TAUGHT = 11
"""Of thirteen: what a guided latent was taught, it tells with the AUROC above."""
PLAIN = "resid-3"
SEED = 900_000_023
"""Its documents are neither the model's nor the SAE's own."""
TOKENS, DOCUMENTS, CHATS = 40_000, 640, 3000
BLOCKS = 100


def dictionary(demo: Demo) -> Iterator[Check]:
    """All rows."""
    model = AutoModelForCausalLM.from_pretrained(demo.folder / "model", dtype=torch.float32)
    scale = min(1.0, demo.count / 200)
    plain = demo.saes[PLAIN]
    yield _explained(demo, model, plain, int(TOKENS * scale))
    yield _recovered(demo, model, plain, int(DOCUMENTS * scale))
    yield _detectors(demo, model, plain, int(CHATS * scale))
    yield from _clamps(demo, PLAIN, plain)
    yield from _taught(demo, demo.saes[guided.NAME])


def _explained(demo: Demo, model: Any, sae: SAE, tokens: int) -> Check:
    """1 − Σ‖x − x̂‖² / Σ‖x − mean‖²; the interval is over stretches of tokens."""
    rows = corpus_states(model, demo.engine.tokenizer, sae.layer, tokens=tokens, seed=SEED).rows
    mean = rows.mean(0)
    sums = [
        ((part - sae.decode(sae.encode(part))).square().sum(), (part - mean).square().sum())
        for part in rows.chunk(BLOCKS)
    ]
    both = torch.tensor(sums, dtype=torch.float64).numpy()

    def variance(some: Any) -> float:
        error, total = both[some].sum(0)
        return float(1 - error / total)

    value = bootstrap(variance, len(both), n=len(rows))
    return Check("sae", "explained variance (n: tokens)", value, VARIANCE)


def _recovered(demo: Demo, model: Any, sae: SAE, documents: int) -> Check:
    """(L₀ − L_sae) / (L₀ − L) on replies, as in training; the interval is over documents."""
    tok = demo.engine.tokenizer
    rows = sorted((encode(tok, one) for one in Corpus(SEED).documents(documents)), key=_length)
    edits: list[Callable[[Tensor], Tensor] | None] = [
        None,
        lambda x: sae.decode(sae.encode(x)),
        torch.zeros_like,
    ]
    plain, rebuilt, without = (_losses(model, sae.layer, rows, tok.pad_token_id, e) for e in edits)

    def recovered(some: Any) -> float:
        one, two, three = (
            float(part[some, 0].sum() / part[some, 1].sum()) for part in (plain, rebuilt, without)
        )
        return (three - two) / (three - one)

    value = bootstrap(recovered, documents)
    return Check("sae", "loss recovered (n: documents)", value, RECOVERED)


def _length(row: tuple[list[int], list[bool]]) -> int:
    return len(row[0])


@torch.no_grad()
def _losses(
    model: Any,
    layer: int,
    rows: Sequence[tuple[list[int], list[bool]]],
    pad: int,
    edit: Callable[[Tensor], Tensor] | None,
) -> Any:
    """Summed loss and number of learned tokens of each document `[documents, 2]`, with one block's
    output edited. The first token keeps its state."""

    def hook(_module: Any, _inputs: Any, output: Tensor) -> Tensor:
        if edit is None:
            return output
        changed = edit(output)
        changed[:, 0] = output[:, 0]
        return changed

    handle = model.model.layers[layer].register_forward_hook(hook)
    found = []
    try:
        for start in range(0, len(rows), 32):
            batch = collate(list(rows[start : start + 32]), pad)
            logits = model(batch.ids).logits.transpose(1, 2)
            loss = torch.nn.functional.cross_entropy(logits, batch.targets, reduction="none")
            found.append(torch.stack([loss.sum(1), (batch.targets != -100).sum(1)], dim=1))
    finally:
        handle.remove()
    return torch.cat(found).double().numpy()


def _detectors(demo: Demo, model: Any, sae: SAE, chats: int) -> Check:
    """Latents whose AUROC, for the class that suits them best on wordings of the training, is high
    on held-out wordings. The ends of the interval count the latents whose own interval
    (Hanley and McNeil 1982) lies above the threshold, and those where it reaches it.
    """
    tok, tables, seen = demo.engine.tokenizer, [], []
    for held_out in (False, True):
        drawn = list(examples(chats, held_out=held_out, seed=SEED + held_out))
        tables.append(table(scores(sae, *reply_states(model, tok, sae.layer, drawn)), drawn))
        seen = drawn
    named = matches(*tables)
    sizes = _sizes(seen)
    errors = [_error(one.auroc, *sizes[one.attribute, one.direction]) for one in named]
    number, surely, perhaps = (
        float(
            sum(
                one.auroc + sign * Z * error >= AUROC
                for one, error in zip(named, errors, strict=True)
            )
        )
        for sign in (0, -1, 1)
    )
    value = Estimate(number, surely, perhaps, len(named))
    return Check("sae", f"latents with held-out AUROC ≥ {AUROC:g} (n: latents)", value, LATENTS)


def _sizes(chats: Sequence[Example]) -> Mapping[tuple[str, str], tuple[int, int]]:
    return {
        name: (int(has.sum()), int((known & ~has).sum()))
        for name, (known, has) in classes_of(chats).items()
    }


def _error(auroc: float, positives: int, negatives: int) -> float:
    """Standard error of an AUROC."""
    one, two = auroc / (2 - auroc), 2 * auroc**2 / (1 + auroc)
    spread = auroc * (1 - auroc)
    spread += (positives - 1) * (one - auroc**2) + (negatives - 1) * (two - auroc**2)
    return math.sqrt(max(spread, 0.0) / (positives * negatives))


def _clamps(demo: Demo, name: str, sae: SAE) -> Iterator[Check]:
    """The clamps on the card, measured anew: first sentences with the attribute, and validity."""
    good = []
    for clamp in effects_on(sae):
        attribute = clamp.attribute
        spec = clamp_spec(clamp.latent, clamp.value, sae=name)
        prompts = demo.held_out(asked_of(attribute))
        before, after = demo.answers(prompts), demo.answers(prompts, demo.plan(spec))
        rates = [
            [float(r.reading.first(attribute)) for r in replies] for replies in (after, before)
        ]
        moved = difference(*rates)
        valid = share([r.reading.valid for r in after])
        shown = f"{attribute}: latent {clamp.latent} at {clamp.value:g}"
        rows = [
            Check("sae", f"{shown}: change", moved, MOVED, part=True),
            Check("sae", f"{attribute}: valid", valid, VALID, part=True),
        ]
        yield from rows
        good.append(all(row.met for row in rows))
    yield count("sae", "attributes that a clamp of one latent moves", good, ATTRIBUTES)


def _taught(demo: Demo, sae: SAE) -> Iterator[Check]:
    """Each taught latent, by the chats of its attribute that the training did not see."""
    point, good = HookPoint(sae.layer, sae.site), []
    for latent, attribute in enumerate(guided.ATTRIBUTES):
        pairs = guided.unseen_pairs(attribute)
        sides = [
            _last_states(demo, point, [pair[side] for pair in pairs])
            for side in ("positive", "negative")
        ]
        asked = torch.arange(2 * len(pairs)) < len(pairs)
        value = float(auroc(sae.encode(torch.cat(sides))[:, latent : latent + 1], asked))
        reach = Z * _error(value, len(pairs), len(pairs))
        estimate = Estimate(value, value - reach, value + reach, 2 * len(pairs))
        row = Check("sae", f"taught latent {latent}: {attribute}", estimate, AUROC, part=True)
        yield row
        good.append(row.met)
    yield count("sae", f"taught latents with held-out AUROC ≥ {AUROC:g}", good, TAUGHT)


def _last_states(demo: Demo, point: HookPoint, chats: Sequence[Any]) -> Tensor:
    """The states `[N, d]` of the last tokens of rendered prompts."""
    prompts = [render(demo.engine.tokenizer, chat) for chat in chats]
    found = demo.engine.capture(CaptureRequest(prompts, (point,), positions=(-1,)))
    return torch.cat([one.states[point] for one in found])
