"""A survey of an SAE's features: texts through the serving engine, their states into a `Tally`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from steer.artefacts.sae.base import SAE
from steer.engines.base import Engine
from steer.errors import IncompatibleArtefact, SpecError, SteerError
from steer.fit.data.prompt import Prompt
from steer.fit.features.tally import Tally
from steer.fit.states import Progress, make_reading, prompt_tokens, read_places
from steer.model import HookPoint
from steer.prompts import begins, token_texts
from steer.registry.features.store import SurveyStore
from steer.registry.features.survey import Survey, SurveyCard
from steer.spec import Where

CHECKPOINT_TOKENS = 1 << 16
"""Tokens between two checkpoints."""


@dataclass(frozen=True)
class SurveyPlace:
    """Where a survey is kept, and its checkpoints while it is made: `scratch` is a folder for
    files that are being written."""

    store: SurveyStore
    scratch: Path


def survey(
    engine: Engine,
    sae: SAE,
    sha256: str,
    prompts: Sequence[Prompt],
    place: SurveyPlace,
    *,
    where: Where | None = None,
    batch: int = 16,
    checkpoint_tokens: int = CHECKPOINT_TOKENS,
    progress: Progress | None = None,
) -> Survey:
    """Surveys the SAE with this hash on `prompts`, and keeps what is found beside it.

    Every token counts, or those of `where`, but a beginning that the tokenizer puts before a text,
    where most models keep what belongs to no word. `progress` is told of texts. A survey that was
    ended goes on from its last checkpoint. Raises `SteerError`; `nothing_selected` where no text
    has a token to count.
    """
    check_fits(engine, sae)
    tokens = [prompt_tokens(engine, prompt) for prompt in prompts]
    card = survey_card(engine, sae, sha256, tokens, where)
    tally = Tally(sae.encode, sae.d_in, sae.d_sae)
    # Another order or layout of the sums would not go on from here.
    key = f"{sha256}-{card.data[:16]}-{tally.block_size}"
    saved = place.store.checkpoint(key)
    done = 0
    if saved is not None:
        done = int(saved["texts_done"][0])
        tally.restore(saved)
        _told(progress, done)
    reading = make_reading(
        engine,
        site=sae.site,
        layers=[sae.layer],
        positions="mean" if where is None else where,
        batch=batch,
        at="/where",
    )
    unsaved = 0
    unread = read_places(engine, prompts[done:], reading, none=True, known=tokens[done:])
    for ids, places, rows in unread:
        first = int(begins(engine.tokenizer, ids) and 0 in places)
        tally.add(rows[sae.layer][first:], done, positions=places[first:])
        done += 1
        _told(progress, 1)
        unsaved += len(ids)
        if unsaved >= checkpoint_tokens:
            state = {**tally.state(), "texts_done": np.array([done])}
            place.store.keep_checkpoint(key, state, place.scratch)
            unsaved = 0
    arrays = tally.arrays()
    if tally.tokens == 0 and where is not None:
        raise SpecError(
            f"'where' selects no token of the {len(prompts)} texts that could be counted",
            param="/where",
            code="nothing_selected",
        )
    if tally.tokens == 0:
        raise SteerError("the texts have no token to survey", code="no_prompts")
    arrays["tokens"] = np.array([token for row in tokens for token in row], np.int32)
    arrays["text_start"] = np.cumsum([0, *map(len, tokens)])
    card = card.model_copy(update={"tokens": tally.tokens})
    place.store.keep(card, arrays, place.scratch)
    place.store.drop_checkpoint(key)
    return place.store.of(sha256, sae.card.name)


def check_fits(engine: Engine, sae: SAE, param: str = "/sae") -> None:
    """Raises `SteerError` unless the engine's model has the SAE's hook point and width."""
    try:
        engine.info.check_point(HookPoint(sae.layer, sae.site))
    except SteerError as error:
        raise error.at(param) from None
    width = engine.info.width(sae.site)
    if sae.d_in != width:
        raise IncompatibleArtefact(
            f"the SAE {sae.card.name!r} has width {sae.d_in}; {sae.site} of "
            f"{engine.info.name!r} has width {width}",
            param=param,
            code="wrong_width",
        )


def survey_card(
    engine: Engine,
    sae: SAE,
    sha256: str,
    tokens: Sequence[Sequence[int]],
    where: Where | None = None,
) -> SurveyCard:
    """The card of a survey of texts with these tokens, none of them counted yet."""
    chosen = [] if where is None else [where.model_dump(mode="json", exclude_none=True)]
    data = json.dumps([engine.info.name, list(tokens), *chosen])
    ids = sorted({token for row in tokens for token in row})
    return SurveyCard(
        sae=sha256,
        model=engine.info.name,
        layer=sae.layer,
        site=sae.site,
        d_sae=sae.d_sae,
        texts=len(tokens),
        tokens=0,
        data=hashlib.sha256(data.encode()).hexdigest(),
        where=where,
        vocabulary=dict(zip(ids, token_texts(engine.tokenizer, ids), strict=True)),
    )


def _told(progress: Callable[[int], None] | None, done: int) -> None:
    if progress is not None:
        progress(done)
