"""What goes onto a trained SAE's card besides its training: loss recovered, and taught latents."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from steer.artefacts.sae.labels import FeatureLabel
from steer.engines.base import Engine
from steer.fit.bulk.capturing import Tokens
from steer.fit.bulk.shards import CapturedStates
from steer.fit.saes.measures import loss_recovered
from steer.fit.saes.rows import held_out_texts
from steer.fit.saes.training import TrainedSAE


def texts_apart(
    captures: Sequence[CapturedStates],
    texts: Sequence[Sequence[Tokens]],
    *,
    held_out: float,
    seed: int,
    most: int = 64,
) -> list[Tokens]:
    """At most `most` of the `texts` of each capture that training with this share and seed left
    out."""
    found: list[Tokens] = []
    for place, (capture, own) in enumerate(zip(captures, texts, strict=True)):
        numbers = held_out_texts(capture, place, held_out, seed)
        found += [own[n] for n in numbers[: max(1, most // len(captures))]]
    return found


def with_worth(
    engine: Engine,
    trained: TrainedSAE,
    apart: Sequence[Tokens],
    *,
    skip: int,
    classes: Sequence[str] = (),
) -> TrainedSAE:
    """The SAE with the loss that it recovers on the texts `apart` (where the engine has
    derivatives), and with `classes` as the labels of its first latents."""
    card = trained.sae.card
    made = dict(card.provenance)
    if engine.capabilities.gradients:
        mean = trained.sample.mean(0)
        found = loss_recovered(engine, trained.sae, apart, mean, skip=skip)
        made["loss"] = {name: round(one, 4) for name, one in found.as_json().items()}
    labels = {n: FeatureLabel(text=name) for n, name in enumerate(classes)}
    card = type(card).model_validate(card.model_dump() | {"provenance": made})
    return replace(trained, sae=replace(trained.sae, card=card, labels=labels))
