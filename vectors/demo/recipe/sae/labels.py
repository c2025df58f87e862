"""Names latents by what they tell apart: AUROC against attributes that are known."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from steer_vectors.demo.recipe.sae.states import Example, States
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from steer.artefacts.sae import SAE, FeatureLabel

MIN_EXAMPLES = 25
"""Fewer positives or negatives than this say nothing about a class."""
NAMED_FROM = 0.8

Class = tuple[str, str]


@dataclass(frozen=True)
class Match:
    """What a latent tells apart best: chosen on one set of wordings, measured on the other."""

    attribute: str
    direction: str
    place: str
    auroc: float


@dataclass(frozen=True)
class Scores:
    """Activations `[N, n]` of N chats: at the last prompt token, and their mean over the reply."""

    prompt: Tensor
    reply: Tensor

    def at(self, place: str) -> Tensor:
        return self.prompt if place == "prompt" else self.reply


def scores(sae: SAE, last: Tensor, replies: Sequence[Tensor]) -> Scores:
    return Scores(sae.encode(last), torch.stack([sae.encode(rows).mean(0) for rows in replies]))


def auroc(values: Tensor, positive: Tensor) -> Tensor:
    """Of every column of `values` `[N, n]`: P(positive > negative) + ½ P(equal).

    Assumes: values are not negative, and only zeros are equal.
    """
    ranks = values.argsort(0).argsort(0).double() + 1
    zeros = values == 0
    ranks = torch.where(zeros, (zeros.sum(0) + 1) / 2, ranks)
    n_positive = int(positive.sum())
    n_negative = len(positive) - n_positive
    won = ranks[positive].sum(0) - n_positive * (n_positive + 1) / 2
    return won / (n_positive * n_negative)


def classes_of(chats: Sequence[Example]) -> dict[Class, tuple[Tensor, Tensor]]:
    """For each class that is common enough: which chats know the attribute, and which have it."""
    found = {}
    for attribute, direction in sorted({item for chat in chats for item in chat.classes.items()}):
        known = torch.tensor([attribute in chat.classes for chat in chats])
        has = torch.tensor([chat.classes.get(attribute) == direction for chat in chats])
        if min(int(has.sum()), int((known & ~has).sum())) >= MIN_EXAMPLES:
            found[attribute, direction] = known, has
    return found


def table(values: Scores, chats: Sequence[Example]) -> dict[tuple[Class, str], Tensor]:
    """AUROC of every latent for each class, at both places."""
    return {
        (name, place): auroc(values.at(place)[known], has[known])
        for name, (known, has) in classes_of(chats).items()
        for place in ("prompt", "reply")
    }


def matches(
    chosen_on: Mapping[tuple[Class, str], Tensor], measured_on: Mapping[tuple[Class, str], Tensor]
) -> list[Match]:
    """For each latent, the class that it tells apart best on the first set, and its AUROC on the
    second."""
    keys = [key for key in chosen_on if key in measured_on]
    best = torch.stack([chosen_on[key] for key in keys]).argmax(0)
    found = []
    for latent, place in enumerate(best.tolist()):
        (attribute, direction), where = keys[place]
        value = float(measured_on[keys[place]][latent])
        found.append(Match(attribute, direction, where, value))
    return found


def describe(
    sae: SAE, states: States, named: Sequence[Match], tok: PreTrainedTokenizerFast
) -> dict[int, FeatureLabel]:
    """A label for every latent that is ever active on `states`."""
    active = torch.cat(
        [sae.encode(rows).to_sparse() for rows in torch.split(states.rows, 8192)]
    ).coalesce()
    rows, latents = active.indices()
    values = active.values()
    labels = {}
    for latent in latents.unique().tolist():
        own = latents == latent
        strongest = values[own].topk(min(60, int(own.sum()))).indices
        words = Counter(tok.convert_ids_to_tokens(states.tokens[rows[own][strongest]].tolist()))
        tokens = tuple(_shown(word, tok) for word, _ in words.most_common(4))
        match = named[latent]
        good = match.auroc >= NAMED_FROM
        labels[latent] = FeatureLabel(
            text=_text(match) if good else f"tokens such as {', '.join(map(repr, tokens))}",
            attribute=match.attribute if good else None,
            direction=match.direction if good else None,
            auroc=round(match.auroc, 3) if good else None,
            density=round(float(own.sum()) / len(states.rows), 5),
            largest=round(float(values[own].max()), 3),
            tokens=tokens,
        )
    return labels


def _shown(word: str, tok: PreTrainedTokenizerFast) -> str:
    return tok.convert_tokens_to_string([word]).strip() or word


_NAMES = {"en": "English", "fr": "French", "de": "German"}


def _text(match: Match) -> str:
    what = _NAMES.get(match.direction, match.direction.replace("_", " "))
    where = "before the reply" if match.place == "prompt" else "in the reply"
    return f"{match.attribute}: {what}, {where}"
