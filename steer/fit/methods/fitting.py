"""From contrastive prompts to a control vector with its card.

Two passes over the data, each in batches through `engine.capture`: one that fits a direction per
layer, one over held-out pairs that measures it. Memory is bounded by one batch of states,
2 · batch · tokens · layers · d floats (tokens is 1 for the last token or an index, else the longest
prompt's length), plus what the method holds per layer: 2·d numbers for `diffmean`,
min(pairs, 3d)·d for `pca`, min(pairs, 4096)·d for `logistic`; refined by an SAE, d_sae for d.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import Tensor

from steer.artefacts.control_vector import ControlVector, LayerMeasure
from steer.artefacts.library import Library
from steer.artefacts.sae.base import SAE
from steer.engines.base import Engine
from steer.errors import SpecError, SteerError
from steer.fit.data.pairs import Pair, PairSet
from steer.fit.data.prompt import Positions, positions_json
from steer.fit.data.where import WhereName, where_named
from steer.fit.methods.card import best_layers, cosines, made_on, split
from steer.fit.methods.linearity import Parallelism
from steer.fit.methods.method import METHODS, MakeMethod, Method
from steer.fit.methods.sae_refined import SAERefined
from steer.fit.methods.separation import Separation
from steer.fit.states import Progress, Reading, make_reading, read_rows
from steer.spec import Site

PairStates: TypeAlias = Mapping[int, tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Split:
    """Pairs to fit on, and pairs to measure on: the same ones where there are too few."""

    fitted: tuple[Pair, ...]
    measured: tuple[Pair, ...]

    @property
    def held_out(self) -> int:
        return 0 if self.measured == self.fitted else len(self.measured)


@dataclass(frozen=True)
class Measures:
    """What the measuring pass found, by layer."""

    separation: dict[int, LayerMeasure]
    linearity: dict[int, float | None]


def fit(
    engine: Engine,
    pairs: PairSet,
    *,
    name: str,
    method: str = "diffmean",
    refine: Mapping[str, str] | None = None,
    library: Library | None = None,
    site: Site = "resid_post",
    layers: Sequence[int] | None = None,
    positions: Positions = "last",
    where: WhereName | None = None,
    held_out: float = 0.2,
    seed: int = 0,
    best: int | None = None,
    batch: int = 16,
    description: str = "",
    licence: str = "",
    beside: Mapping[str, ControlVector] | None = None,
    progress: Progress | None = None,
) -> ControlVector:
    """A vector that points from the negative prompts' states to the positive ones'.

    `positions` says which token's state is read (`steer.fit.data.prompt`). `refine={"sae": NAME}`
    fits among the latents of an SAE of `library`, on its layer and site. A share `held_out` of the
    pairs, drawn with `seed`, only measures; the `best` layers by separation on them (None: one)
    become the card's default layers, and `where` (None: the last prompt token) its default place.
    The card records the cosine to every vector of `beside`, and how parallel
    the pairs' differences are. `progress` is told of every pair that was read.

    Raises `SteerError` for unusable arguments and where no layer tells the prompts apart.
    """
    make = _method(method)
    best = 1 if best is None else best
    _check(pairs, best)
    sae = _refining(refine, library)
    if sae is not None:
        site, layers = _sae_point(sae, site, layers)
        make = _refined(sae, method)
    reading = make_reading(engine, site=site, layers=layers, positions=positions, batch=batch)
    default_where = where_named(where or "last")
    parts = split_pairs(pairs.items, held_out, seed)
    directions = _directions(engine, reading, parts.fitted, make, progress)
    measures = _measures(engine, reading, parts.measured, directions, progress)
    extras: dict[str, Any] = {"linearity": {str(n): c for n, c in measures.linearity.items()}}
    if sae is not None:
        extras["refined_by"] = {"sae": sae.card.name, "sha256": sae.sha256}
    if beside:
        extras["cosines"] = cosines(directions, site, beside)
    return ControlVector.of(
        directions,
        name=name,
        model=engine.info.own_name,
        site=site,
        default_layers=best_layers(measures.separation, best),
        default_where=default_where,
        description=description,
        licence=licence,
        measures=measures.separation,
        provenance={
            "method": method,
            "data_sha256": pairs.sha256,
            "pairs": len(pairs),
            "held_out_pairs": parts.held_out,
            "positions": positions_json(positions),
            "seed": seed,
            **made_on(engine),
            **extras,
        },
    )


def split_pairs(pairs: Sequence[Pair], share: float, seed: int) -> Split:
    """Draws `share` of the pairs for measuring, in a seeded order; all of them if they are few."""
    fitted, measured = split(pairs, share, seed)
    return Split(tuple(fitted), tuple(measured))


def usable_directions(methods: Mapping[int, Method]) -> dict[int, Tensor]:
    """The layers that have a direction; raises `SteerError` (`no_difference`) if none has.

    Before the first attention the last token knows nothing of the prompt: no direction there.
    """
    found = {layer: one.direction() for layer, one in methods.items()}
    usable = {layer: row for layer, row in found.items() if bool(row.any())}
    if not usable:
        raise SteerError(
            "the positive and the negative prompts have the same states on every layer asked for: "
            "check that the pairs differ, and read a later layer or site",
            code="no_difference",
        )
    return usable


def _directions(
    engine: Engine,
    reading: Reading,
    pairs: Sequence[Pair],
    make: MakeMethod,
    progress: Progress | None,
) -> dict[int, Tensor]:
    width = engine.info.width(reading.site)
    methods = {layer: make(width) for layer in reading.layers}
    for states in read_states(engine, reading, pairs, progress):
        for layer, (positive, negative) in states.items():
            methods[layer].add(positive, negative)
    return usable_directions(methods)


def _measures(
    engine: Engine,
    reading: Reading,
    pairs: Sequence[Pair],
    directions: Mapping[int, Tensor],
    progress: Progress | None,
) -> Measures:
    separations = {layer: Separation(row) for layer, row in directions.items()}
    parallel = {layer: Parallelism(row.numel()) for layer, row in directions.items()}
    for states in read_states(engine, reading, pairs, progress):
        for layer in directions:
            separations[layer].add(*states[layer])
            parallel[layer].add(*states[layer])
    linearity = {layer: _rounded(one.mean_cosine()) for layer, one in parallel.items()}
    return Measures({layer: one.measure() for layer, one in separations.items()}, linearity)


def read_states(
    engine: Engine, reading: Reading, pairs: Sequence[Pair], progress: Progress | None
) -> Iterator[PairStates]:
    """For each batch of pairs and each layer, the positive and negative states `[n, d]`."""
    for first in range(0, len(pairs), reading.batch):
        group = pairs[first : first + reading.batch]
        prompts = [pair.positive for pair in group] + [pair.negative for pair in group]
        stacked = read_rows(engine, prompts, reading)
        yield {n: (rows[: len(group)], rows[len(group) :]) for n, rows in stacked.items()}
        if progress is not None:
            progress(len(group))


def _method(method: str) -> MakeMethod:
    if method not in METHODS:
        raise SteerError(
            f"there is no method {method!r}: use one of {', '.join(METHODS)}",
            code="unknown_method",
        )
    return METHODS[method]


def _refining(refine: Mapping[str, str] | None, library: Library | None) -> SAE | None:
    if refine is None:
        return None
    if set(refine) != {"sae"} or not isinstance(refine["sae"], str):
        raise SteerError(
            f"'refine' is {{\"sae\": NAME}}; got {dict(refine)!r}", code="invalid_option"
        )
    if library is None:
        raise SteerError(
            "'refine' names an SAE and no library was given to find it in", code="no_library"
        )
    return library.sae(refine["sae"])


def _refined(sae: SAE, method: str) -> Callable[[int], Method]:
    SAERefined(sae, method)  # what cannot be refined is refused before the data is read
    return lambda _: SAERefined(sae, method)


def _sae_point(sae: SAE, site: Site, layers: Sequence[int] | None) -> tuple[Site, tuple[int, ...]]:
    if (layers is not None and set(layers) != {sae.layer}) or site not in ("resid_post", sae.site):
        raise SpecError(
            f"the SAE {sae.card.name!r} reads {sae.site} of layer {sae.layer} and refines only "
            "there: leave out 'layers' and 'site'",
            code="not_the_saes_layer",
        )
    return sae.site, (sae.layer,)


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)


def _check(pairs: PairSet, best: int) -> None:
    if len(pairs) < 2:
        raise SteerError(
            f"{len(pairs)} pairs cannot be told from chance: give at least 2", code="no_pairs"
        )
    if best < 1:
        raise SteerError(f"best ({best!r}) must be at least 1", code="invalid_option")
