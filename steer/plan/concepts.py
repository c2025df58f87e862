"""Concepts given in words: the features that a text lights, and the row that they make together."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

from steer.errors import Unsupported
from steer.model import HookPoint
from steer.plan.clamps import added
from steer.plan.plan import Blocks
from steer.plan.resolve import Resolved
from steer.spec import Concept

MOST_EXPLAINED = 20
"""Of the features that a text lights, the strongest are told."""


def read_concept(item: Concept, one: Resolved) -> Resolved:
    """A concept with what its text means to the SAE: the mean latents over its tokens, without the
    top-k limit, less those of the contrast (2501.19066)."""
    latents = _latents(one, item.text)
    if item.contrast is not None:
        latents = latents - _latents(one, item.contrast)
    return replace(one, latents=latents)


def _latents(one: Resolved, text: str) -> Tensor:
    if one.encode_text is None:
        raise Unsupported("a concept needs a model to read its text: none is attached here")
    sae = one.sae("sae")
    return sae.latents(one.encode_text(text, HookPoint(sae.layer, sae.site))).mean(0)


def concept(item: Concept, one: Resolved) -> Blocks:
    """λ·Σ zᵢ·W_dec[i], z what the text means to the SAE (`read_concept`)."""
    assert one.latents is not None
    sae, (point,) = one.sae("sae"), one.points
    active = one.latents.nonzero()[:, 0]
    if item.strength == 0 or len(active) == 0:
        return {}
    row = one.latents[active] @ sae.writes(active.tolist())
    return {point: added(item.strength * row, sae)}


def features_lit(one: Resolved) -> list[dict[str, Any]] | None:
    """The strongest features of a concept that is to be explained, with their labels and values,
    which are negative where the contrast lights them more; None where nobody asks."""
    if not isinstance(one.item, Concept) or not one.item.explain:
        return None
    assert one.latents is not None
    labels = one.sae("sae").labels
    order = one.latents.abs().argsort(descending=True, stable=True)[:MOST_EXPLAINED].tolist()
    return [
        {
            "feature": feature,
            "label": labels[feature].text if feature in labels else "",
            "value": value,
        }
        for feature in order
        if (value := float(one.latents[feature])) != 0
    ]
