"""Dictionaries: many directions at once, found in activations without labels.

Each component is a direction with the tokens that have most of it, so that a person can name it,
and becomes a control vector by `Dictionary.vector`. Two fits make one: `snmf` and `nmf`.

Memory: one batch of states, batch · tokens · width, plus what is factored:
(2·width + 4·components)·`sample` floats in float64 for at most `sample` activations, drawn
uniformly from all that were read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import Tensor

from steer.artefacts.control_vector import ControlVector
from steer.engines.base import Engine
from steer.errors import SteerError
from steer.fit.data.jsonl import sha256_of
from steer.fit.data.prompt import Positions, Prompt, positions_json, prompt_json
from steer.fit.data.where import WhereName, where_named
from steer.fit.methods.card import made_on
from steer.fit.methods.dictionaries.reservoir import Reservoir
from steer.fit.methods.dictionaries.semi_nmf import Factors
from steer.fit.states import Progress, make_reading, read_rows, read_tokens
from steer.model import HookPoint
from steer.spec import Where

CONTEXT_TOKENS = 12
Factorise: TypeAlias = Callable[[Tensor], Factors]


@dataclass(frozen=True)
class Example:
    """A place that has much of a component: the text up to the token that was read, and how
    much."""

    text: str
    weight: float


@dataclass(frozen=True)
class Dictionary:
    """Components `[k, width]` of unit length at one hook point.

    `scales` `[k]` is each component's weight in the tenth of the activations that have most of it;
    `examples` are those that have most, best first; `explained` is the share of the activations'
    squared length that the dictionary reproduces.
    """

    components: Tensor
    scales: Tensor
    examples: tuple[tuple[Example, ...], ...]
    explained: float
    point: HookPoint
    provenance: Mapping[str, Any]

    def __len__(self) -> int:
        return len(self.components)

    def vector(
        self, index: int, *, name: str, where: WhereName = "last", description: str = ""
    ) -> ControlVector:
        """Component `index` as a control vector: strength 1 adds as much of it as its strongest
        tenth has. Raises `SteerError`."""
        if not 0 <= index < len(self):
            raise SteerError(
                f"component {index} is out of range: the dictionary has 0 to {len(self) - 1}",
                code="component_out_of_range",
            )
        return ControlVector.of(
            {self.point.layer: self.components[index] * self.scales[index]},
            name=name,
            model=str(self.provenance["model"]),
            site=self.point.site,
            default_where=where_named(where),
            description=description,
            provenance={
                **self.provenance,
                "component": index,
                "examples": [one.text for one in self.examples[index][:5]],
            },
        )


def fit_dictionary(
    engine: Engine,
    prompts: Sequence[Prompt],
    factorise: Factorise,
    *,
    point: HookPoint,
    positions: Positions,
    sample: int,
    seed: int,
    batch: int,
    parameters: Mapping[str, Any],
    progress: Progress | None,
) -> Dictionary:
    """Reads the activations of `prompts` at `point`, each token of "mean", "response" and
    a selection by itself, and factors a sample of them. `progress` is told of every prompt read.
    Raises `SteerError`."""
    if not prompts:
        raise SteerError("there are no prompts to read", code="no_prompts")
    if sample < 1:
        raise SteerError(f"sample ({sample!r}) must be at least 1", code="invalid_option")
    reading = make_reading(
        engine, site=point.site, layers=(point.layer,), positions=positions, batch=batch
    )
    kept = Reservoir(engine.info.width(point.site), sample, seed)
    if positions in ("mean", "response") or isinstance(positions, Where):
        for tokens, states in read_tokens(engine, prompts, reading):
            kept.add(states[point.layer], [tokens[: n + 1] for n in range(len(tokens))])
            if progress is not None:
                progress(1)
    else:
        for first in range(0, len(prompts), batch):
            group = prompts[first : first + batch]
            kept.add(read_rows(engine, group, reading)[point.layer], list(group))
            if progress is not None:
                progress(len(group))
    found = factorise(kept.rows)
    top = found.weights.quantile(0.9, dim=0, keepdim=True)
    strongest = (found.weights * (found.weights >= top)).sum(0) / (found.weights >= top).sum(0)
    return Dictionary(
        components=found.components.float(),
        scales=strongest.float(),
        examples=_examples(engine, kept, found),
        explained=found.explained,
        point=point,
        provenance={
            "data_sha256": sha256_of([prompt_json(prompt) for prompt in prompts]),
            "prompts": len(prompts),
            "activations": kept.seen,
            "sampled": len(kept.rows),
            "explained": round(found.explained, 4),
            "positions": positions_json(positions),
            "seed": seed,
            **parameters,
            **made_on(engine),
        },
    )


def _examples(
    engine: Engine, kept: Reservoir, found: Factors, count: int = 8
) -> tuple[tuple[Example, ...], ...]:
    best = found.weights.topk(min(count, len(found.weights)), dim=0)
    return tuple(
        tuple(
            Example(_text(engine, kept.notes[int(place)]), float(weight))
            for weight, place in zip(best.values[:, k], best.indices[:, k], strict=True)
            if weight > 0
        )
        for k in range(found.weights.shape[1])
    )


def _text(engine: Engine, note: Any) -> str:
    if isinstance(note, list) and note and isinstance(note[0], int):
        return str(engine.tokenizer.decode(note[-CONTEXT_TOKENS:]))
    if isinstance(note, str):
        return note
    value = prompt_json(note)
    messages = value["prompt"] if isinstance(value, dict) else value
    return messages if isinstance(messages, str) else " / ".join(m["content"] for m in messages)
