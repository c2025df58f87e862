"""One vector per class from labelled texts: each class against all others.

Memory: one batch of states, batch · tokens · layers · d floats, plus for each class and layer what
the method holds (2·d for `diffmean`, 2·min(texts, 4096)·d for `logistic`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence

from torch import Tensor

from steer.artefacts.control_vector import ControlVector, LayerMeasure
from steer.engines.base import Engine
from steer.errors import SteerError
from steer.fit.data.labels import Labelled, LabelledSet
from steer.fit.data.prompt import Positions, positions_json
from steer.fit.data.where import WhereName, where_named
from steer.fit.methods.card import best_layers, cosines, made_on, split
from steer.fit.methods.fitting import usable_directions
from steer.fit.methods.method import METHODS, UNPAIRED, Method
from steer.fit.methods.separation import Separation
from steer.fit.states import Progress, Reading, make_reading, read_rows
from steer.spec import Site


def fit_labels(
    engine: Engine,
    texts: LabelledSet,
    *,
    name: str,
    labels: Sequence[str] | None = None,
    method: str = "diffmean",
    site: Site = "resid_post",
    layers: Sequence[int] | None = None,
    positions: Positions = "last",
    where: WhereName = "last",
    held_out: float = 0.2,
    seed: int = 0,
    best: int = 1,
    batch: int = 32,
    description: str = "",
    licence: str = "",
    beside: Mapping[str, ControlVector] | None = None,
    progress: Progress | None = None,
) -> dict[str, ControlVector]:
    """A vector for each of `labels` (None: all), called `NAME-LABEL`, towards that class.

    The share `held_out` is drawn within each class. Other arguments as for `fit`; `progress` is
    told of every text that was read. Raises `SteerError`.
    """
    wanted = tuple(labels) if labels is not None else texts.labels
    _check(texts, wanted, method, best)
    reading = make_reading(engine, site=site, layers=layers, positions=positions, batch=batch)
    default_where = where_named(where)
    fitted, measured = split_labels(texts, held_out, seed)
    directions = _directions(engine, reading, fitted, wanted, method, progress)
    measures = _measures(engine, reading, measured, directions, progress)
    counts = {label: sum(one.label == label for one in texts.items) for label in texts.labels}
    return {
        label: ControlVector.of(
            rows,
            name=f"{name}-{_slug(label)}",
            model=engine.info.own_name,
            site=site,
            default_layers=best_layers(measures[label], best),
            default_where=default_where,
            description=description,
            licence=licence,
            measures=measures[label],
            provenance={
                "method": method,
                "data_sha256": texts.sha256,
                "label": label,
                "texts": dict(counts),
                "held_out_texts": 0 if measured is fitted else len(measured),
                "positions": positions_json(positions),
                "seed": seed,
                **made_on(engine),
                **({"cosines": cosines(rows, site, beside)} if beside else {}),
            },
        )
        for label, rows in directions.items()
    }


def split_labels(
    texts: LabelledSet, share: float, seed: int
) -> tuple[list[Labelled], list[Labelled]]:
    """Texts to fit on and texts to measure on, `share` of every class; all of them do both where
    one class has too few."""
    fitted: list[Labelled] = []
    measured: list[Labelled] = []
    for label in texts.labels:
        mine = [one for one in texts.items if one.label == label]
        first, second = split(mine, share, seed)
        if len(first) == len(mine):  # too few of one class to hold any out: then none are
            return list(texts.items), list(texts.items)
        fitted += first
        measured += second
    return fitted, measured


def _directions(
    engine: Engine,
    reading: Reading,
    texts: Sequence[Labelled],
    wanted: Sequence[str],
    method: str,
    progress: Progress | None,
) -> dict[str, dict[int, Tensor]]:
    width = engine.info.width(reading.site)
    methods: dict[str, dict[int, Method]] = {
        label: {layer: UNPAIRED[method](width) for layer in reading.layers} for label in wanted
    }
    for labels, states in _read(engine, reading, texts, progress):
        for label, by_layer in methods.items():
            for layer, one in by_layer.items():
                one.add(*_sides(states[layer], labels, label))
    return {label: usable_directions(by_layer) for label, by_layer in methods.items()}


def _measures(
    engine: Engine,
    reading: Reading,
    texts: Sequence[Labelled],
    directions: Mapping[str, Mapping[int, Tensor]],
    progress: Progress | None,
) -> dict[str, dict[int, LayerMeasure]]:
    separations = {
        label: {layer: Separation(row) for layer, row in rows.items()}
        for label, rows in directions.items()
    }
    for labels, states in _read(engine, reading, texts, progress):
        for label, by_layer in separations.items():
            for layer, one in by_layer.items():
                one.add(*_sides(states[layer], labels, label))
    return {
        label: {layer: one.measure() for layer, one in by_layer.items()}
        for label, by_layer in separations.items()
    }


def _read(
    engine: Engine, reading: Reading, texts: Sequence[Labelled], progress: Progress | None
) -> Iterator[tuple[list[str], dict[int, Tensor]]]:
    for first in range(0, len(texts), reading.batch):
        group = texts[first : first + reading.batch]
        yield (
            [one.label for one in group],
            read_rows(engine, [one.prompt for one in group], reading),
        )
        if progress is not None:
            progress(len(group))


def _sides(states: Tensor, labels: Sequence[str], label: str) -> tuple[Tensor, Tensor]:
    mine = [n for n, one in enumerate(labels) if one == label]
    rest = [n for n, one in enumerate(labels) if one != label]
    return states[mine], states[rest]


def _slug(label: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", label).strip("-") or "label"


def _check(texts: LabelledSet, wanted: Sequence[str], method: str, best: int) -> None:
    if method not in UNPAIRED:
        reason = "needs pairs" if method in METHODS else "does not exist"
        raise SteerError(
            f"the method {method!r} {reason}: for labelled texts use one of {', '.join(UNPAIRED)}",
            code="unknown_method",
        )
    check_labels(texts, wanted)
    if best < 1:
        raise SteerError(f"best ({best!r}) must be at least 1", code="invalid_option")


def check_labels(texts: LabelledSet, wanted: Sequence[str]) -> None:
    """Raises `SteerError` unless the texts have several classes, `wanted` among them, whose names
    stay distinct."""
    unknown = [label for label in wanted if label not in texts.labels]
    if unknown or len(texts.labels) < 2:
        raise SteerError(
            f"the texts are labelled {', '.join(texts.labels) or 'not at all'}: give at least two "
            "classes, and ask only for labels among them",
            code="unknown_label",
        )
    slugs = [_slug(label) for label in wanted]
    if len(set(slugs)) != len(slugs):
        raise SteerError(
            f"the labels {list(wanted)!r} differ only in characters that names cannot have: "
            "rename them",
            code="invalid_labels",
        )
