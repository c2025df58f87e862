"""What goes onto a trained SAE's card besides its training: loss recovered, and taught latents."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from steer.artefacts.sae.labels import FeatureLabel
from steer.engines.base import Engine
from steer.fit.bulk.shards import CapturedStates
from steer.fit.data.texts import Tokens
from steer.fit.saes.measures import loss_recovered
from steer.fit.saes.rows import held_out_texts
from steer.fit.saes.training import TrainedSAE


class TextApart(NamedTuple):
    """A text, with the model's answer where it gave one, and the first token whose loss counts:
    the answer's, or the first that follows a state which is replaced."""

    tokens: Tokens
    counted: int


def texts_apart(
    captures: Sequence[CapturedStates],
    texts: Sequence[Sequence[Tokens]],
    *,
    held_out: float,
    seed: int,
    most: int = 64,
) -> list[TextApart]:
    """At most `most` of the texts that training with this share and seed left out, where `texts`
    are those that each capture was asked to read."""
    found: list[TextApart] = []
    for place, (capture, own) in enumerate(zip(captures, texts, strict=True)):
        numbers = held_out_texts(capture, place, held_out, seed)
        for n in numbers[: max(1, most // len(captures))]:
            # Its own tokens as far as they were skipped, then those that were read.
            read = tuple(capture.tokens[capture.texts == n].tolist())
            whole = own[n][: capture.card.skip] + read
            answered = bool(capture.card.answer_tokens)
            found.append(TextApart(whole, len(own[n]) if answered else capture.card.skip + 1))
    return found


def with_worth(
    engine: Engine,
    trained: TrainedSAE,
    apart: Sequence[TextApart] | None,
    *,
    skip: int,
    classes: Sequence[str] = (),
) -> TrainedSAE:
    """The SAE with the loss that it recovers on the texts `apart` (where there are some
    and the engine has derivatives), and with `classes` as the labels of its first latents."""
    card = trained.sae.card
    made = dict(card.provenance)
    if apart is not None and engine.capabilities.gradients:
        mean = trained.sample.mean(0)
        texts, counted = [one.tokens for one in apart], [one.counted for one in apart]
        found = loss_recovered(engine, trained.sae, texts, mean, skip=skip, counted=counted)
        made["loss"] = {name: round(one, 4) for name, one in found.as_json().items()}
    labels = {n: FeatureLabel(text=name) for n, name in enumerate(classes)}
    card = type(card).model_validate(card.model_dump() | {"provenance": made})
    return replace(trained, sae=replace(trained.sae, card=card, labels=labels))
