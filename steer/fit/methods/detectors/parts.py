"""Labelled texts cut into parts, so that nothing is measured on what it was made from."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass

from steer.errors import SteerError
from steer.fit.data.labels import LabelledSet
from steer.prompts import Prompt, prompt_json

LEAST = 2
"""Texts of each class that every part needs."""
_VALIDATION = 0.25
_CALIBRATION = 0.5


@dataclass(frozen=True)
class TextPart:
    """Texts, those that have what is to be detected first."""

    positive: tuple[Prompt, ...]
    negative: tuple[Prompt, ...]

    @property
    def prompts(self) -> tuple[Prompt, ...]:
        return self.positive + self.negative


@dataclass(frozen=True)
class DividedTexts:
    """Four parts without a text in common: the probes are fitted to `fitted`, the layer is chosen
    on `validation`, the threshold on `calibration`, harmless texts alone, and everything is
    reported of `held_out`."""

    fitted: TextPart
    validation: TextPart
    calibration: TextPart
    held_out: TextPart


def divided(texts: LabelledSet, held_out: float, seed: int) -> DividedTexts:
    """`held_out` of each class is held out, a quarter of the rest validates, and of the harmless
    texts half of what is left then calibrates.

    Of equal texts one is taken. Raises `SteerError` for labels that are not true and false
    (`invalid_labels`), and for too few texts (`too_few_texts`).
    """
    if set(texts.labels) != {"true", "false"}:
        raise SteerError(
            "a detector is fitted to texts labelled true and false, some of each; these are "
            f"labelled {', '.join(texts.labels)}",
            code="invalid_labels",
        )
    cut: dict[str, list[tuple[Prompt, ...]]] = {}
    for label in texts.labels:
        found = {_key(one.prompt): one.prompt for one in texts.items if one.label == label}
        mine = list(found.values())
        random.Random(f"{seed} {label}").shuffle(mine)
        shares = (held_out, _VALIDATION, _CALIBRATION if label == "false" else 0.0)
        cut[label] = _cut(mine, shares)
    (held, valid, _, fitted), (safe_held, safe_valid, safe, safe_fitted) = cut["true"], cut["false"]
    smallest = min(map(len, (held, valid, fitted, safe_held, safe_valid, safe, safe_fitted)))
    if smallest < LEAST:
        with_it, without = (sum(map(len, cut[label])) for label in ("true", "false"))
        raise SteerError(
            f"{with_it} different texts that are true and {without} that are false are too few to "
            f"fit on some and measure on others: give at least 16 of each, or another 'held_out' "
            f"than {held_out:g}",
            code="too_few_texts",
        )
    return DividedTexts(
        TextPart(fitted, safe_fitted),
        TextPart(valid, safe_valid),
        TextPart((), safe),
        TextPart(held, safe_held),
    )


def _key(prompt: Prompt) -> str:
    return json.dumps(prompt_json(prompt), sort_keys=True)


def _cut(items: Sequence[Prompt], shares: Sequence[float]) -> list[tuple[Prompt, ...]]:
    """Each share is of what those before it left; then the rest."""
    rest, found = list(items), []
    for share in shares:
        count = round(len(rest) * share)
        found.append(tuple(rest[:count]))
        rest = rest[count:]
    return [*found, tuple(rest)]
