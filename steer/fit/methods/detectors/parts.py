"""Labelled texts cut into parts, so that nothing is measured on what it was made from."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass

from steer.errors import SteerError, quoted
from steer.fit.data.labels import LabelledSet
from steer.prompts import Prompt, prompt_json

LEAST = 2
"""Texts of each class that every part needs."""
_MEANINGS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
"""What labels of two classes are called in the data that people have, in small letters."""
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

    Labels are true and false, 1 and 0, or yes and no. Of equal texts one is taken. Raises
    `SteerError` for other labels, and for a text with both (`invalid_labels`), and for too few
    texts (`too_few_texts`).
    """
    found = _by_meaning(texts)
    cut: dict[bool, list[tuple[Prompt, ...]]] = {}
    for has_it in (False, True):
        mine = list(found[has_it].values())
        random.Random(f"{seed} {has_it}".lower()).shuffle(mine)
        cut[has_it] = _cut(mine, (held_out, _VALIDATION, 0.0 if has_it else _CALIBRATION))
    (held, valid, _, fitted), (safe_held, safe_valid, safe, safe_fitted) = cut[True], cut[False]
    smallest = min(map(len, (held, valid, fitted, safe_held, safe_valid, safe, safe_fitted)))
    if smallest < LEAST:
        with_it, without = (sum(map(len, cut[label])) for label in (True, False))
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


def _by_meaning(texts: LabelledSet) -> dict[bool, dict[str, Prompt]]:
    """Different texts by whether they have what is to be detected, each under its JSON."""
    found: dict[bool, dict[str, Prompt]] = {True: {}, False: {}}
    for one in texts.items:
        has_it = _MEANINGS.get(one.label.lower())
        if has_it is None:
            break
        found[has_it].setdefault(_key(one.prompt), one.prompt)
    else:
        both = found[True].keys() & found[False].keys()
        if both:
            text = quoted(prompt_json(found[True][min(both)]))
            more = f", and so are {len(both) - 1} more texts" if len(both) > 1 else ""
            raise SteerError(
                f"{text} is labelled true in one place and false in another{more}: a detector "
                "cannot tell a text from itself; leave one of the labels",
                code="invalid_labels",
            )
        if found[True] and found[False]:
            return found
    named = ", ".join(map(quoted, texts.labels[:8])) + (", …" if len(texts.labels) > 8 else "")
    raise SteerError(
        "a detector is fitted to texts labelled true and false (or 1 and 0, yes and no), some of "
        f"each; these are labelled {named}: write true for those that have what is to be found",
        code="invalid_labels",
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
