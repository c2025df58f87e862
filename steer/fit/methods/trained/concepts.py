"""Vector-symbolic probes (2509.25045), taught on texts whose roles and fillers are known.

A network, once with the texts' own pairs and once with others', which is the control. What was read
and both trainings are bookmarked. Memory: a state of each text, and the networks with their
optimiser.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from steer.artefacts.concepts.codebook import Codebook
from steer.artefacts.concepts.form import DIMENSIONS, LEAST_EXAMPLES, ProbeForm
from steer.artefacts.concepts.lesson import ProbeLesson
from steer.artefacts.concepts.network import STEPS, CodeNetwork, CodeTraining, summed_centroids
from steer.artefacts.concepts.probe import SITE, ConceptProbe
from steer.engines.base import CaptureRequest, Engine
from steer.errors import SteerError, Unsupported, pointer
from steer.fit.data.concepts import SaidText, SaidTexts
from steer.fit.methods.bookmark import Bookmark, resume_training, training_state
from steer.fit.methods.card import made_on
from steer.fit.states import Progress
from steer.model import HookPoint
from steer.prompts import Place, encode_prompt


def fit_concepts(
    engine: Engine,
    examples: SaidTexts,
    *,
    name: str,
    layers: Sequence[int] | None = None,
    position: Place = -1,
    clusters: int = 5,
    dimensions: int = DIMENSIONS,
    held_out: float = 0.2,
    seed: int = 0,
    batch: int = 16,
    description: str = "",
    licence: str = "",
    progress: Progress | None = None,
) -> ConceptProbe:
    """A probe that reads which filler each role has, off the states of the token at `position`
    after `layers` (by default the upper half of the model).

    The share `held_out` of the examples, drawn by `seed` and at least one, tries it; what it finds
    there, beside a probe that was taught others' pairs, is on the card. `progress` is told of every
    text that was read and every step.

    Raises `SteerError` that points at the field.
    """
    check_examples(engine, examples, held_out, dimensions, seed)
    chosen = tuple(sorted(set(layers or range(engine.info.n_layers // 2, engine.info.n_layers))))
    points = tuple(HookPoint(layer, SITE) for layer in chosen)
    for place, layer in enumerate(layers or ()):
        engine.info.check_point(HookPoint(layer, SITE), param=pointer("layers", place))
    lesson = _lesson(examples, held_out, dimensions, seed)
    inputs = _inputs(engine, examples.items, points, position, clusters, seed, batch, progress)
    taught, shuffled = (
        _trained(engine, inputs[list(lesson.taught)], codes, seed, progress)
        for codes in (lesson.codes(), lesson.shuffled_codes())
    )
    form = ProbeForm(
        roles=lesson.roles,
        fillers=lesson.fillers,
        dimensions=dimensions,
        clusters=clusters,
        position=position,
        seed=seed,
        measures=lesson.measured(inputs, taught, shuffled),
    )
    return ConceptProbe.of(
        taught,
        form=form,
        layers=chosen,
        name=name,
        model=engine.info.own_name,
        description=description,
        licence=licence,
        provenance={
            "method": "concepts",
            "data_sha256": examples.sha256,
            "held_out": held_out,
            **made_on(engine),
        },
    )


def check_examples(
    engine: Engine, examples: SaidTexts, held_out: float, dimensions: int, seed: int
) -> None:
    """Raises `SteerError` for examples that teach nothing, and `Unsupported` for an engine that
    does not show what layers give."""
    if SITE not in engine.capabilities.captures:
        raise Unsupported(
            f"this engine does not capture {SITE}, which a probe reads", code="unsupported_site"
        )
    if len(examples) < LEAST_EXAMPLES:
        raise SteerError(
            f"{len(examples)} examples do not teach and try a probe: give at least "
            f"{LEAST_EXAMPLES}",
            code="no_examples",
            param="/examples",
        )
    _lesson(examples, held_out, dimensions, seed)


def work_of(count: int) -> int:
    """What `progress` is told of: texts, and the steps of both trainings."""
    return count + 2 * STEPS


def _lesson(examples: SaidTexts, held_out: float, dimensions: int, seed: int) -> ProbeLesson:
    pairs = [dict(one.pairs) for one in examples.items]
    return ProbeLesson.of(pairs, round(len(pairs) * held_out), Codebook(dimensions, seed))


def _inputs(
    engine: Engine,
    examples: Sequence[SaidText],
    points: Sequence[HookPoint],
    position: Place,
    clusters: int,
    seed: int,
    batch: int,
    progress: Progress | None,
) -> Float[Tensor, "N width"]:
    """What the network is given of each example, by batches that are kept."""
    prompts = [
        encode_prompt(engine, one, at=pointer("examples", n)) for n, one in enumerate(examples)
    ]
    places = [one.position(position, param="/position") for one in prompts]
    read = [(prompt.ids[: place + 1], place) for prompt, place in zip(prompts, places, strict=True)]
    layers = [point.layer for point in points]
    bookmark = Bookmark(engine, ["concepts", read, layers, clusters, seed, batch])
    kept = bookmark.read()
    found = kept["found"] if kept else torch.zeros(len(read), engine.info.d_model)
    done = int(kept["done"]) if kept else 0
    if progress is not None and done:
        progress(done)
    for first in range(done, len(read), batch):
        group = read[first : first + batch]
        # A token's state is of what stands before it: prompts end with the token that is read.
        request = CaptureRequest([ids for ids, _ in group], tuple(points), (-1,))
        for place, one in enumerate(engine.capture(request), start=first):
            states = torch.stack([one.states[point][0] for point in points])
            found[place] = summed_centroids(states, clusters, seed)
        bookmark.write(partial(_kept_inputs, found, first + len(group)))
        if progress is not None:
            progress(len(group))
    return found


def _kept_inputs(found: Tensor, done: int) -> dict[str, Tensor]:
    return {"found": found, "done": torch.tensor(done)}


def _trained(
    engine: Engine,
    inputs: Float[Tensor, "N width"],
    codes: Float[Tensor, "N dimensions"],
    seed: int,
    progress: Progress | None,
) -> CodeNetwork:
    training = CodeTraining(inputs, codes, seed)
    taught = [hashlib.sha256(one.numpy().tobytes()).hexdigest() for one in (inputs, codes)]
    bookmark = Bookmark(engine, ["concepts", taught, seed])
    kept = bookmark.read()
    begun = int(kept.pop("done")) if kept else 0
    if kept:
        resume_training(training.optimiser, kept)
    if progress is not None and begun:
        progress(begun)
    for step in range(begun, STEPS):
        training.step()
        bookmark.write(partial(_kept_training, training, step + 1))
        if progress is not None:
            progress(1)
    return training.network()


def _kept_training(training: CodeTraining, done: int) -> dict[str, Tensor]:
    return {**training_state(training.optimiser), "done": torch.tensor(done)}
