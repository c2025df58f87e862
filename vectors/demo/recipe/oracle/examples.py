"""States of the demo model with questions about them, whose true answers are known."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from steer_vectors.demo.recipe.oracle.questions import (
    PERSON,
    REPLY,
    person_truth,
    reply_truth,
)
from steer_vectors.demo.recipe.sae.states import examples
from steer_vectors.demo.recipe.training.corpus import is_held_out, reader
from steer_vectors.demo.recipe.world.people import PEOPLE, Person, person_questions
from torch import Tensor

from steer.engines.base import CaptureRequest, Engine, GenerationRequest, SamplingParams
from steer.fit.methods.trained.oracle import OracleExample
from steer.model import HookPoint
from steer.prompts import Messages, PromptInput, answer_text, encode_prompt

LAYERS = (1, 2, 3, 4, 5)
"""After which blocks states are read."""
_SENTENCE = re.compile(r"[^.!]+[.!]")
_AT_ONCE = 64


@dataclass(frozen=True)
class Source:
    """A prompt, the token whose state is read, and what is true, by the name of the question."""

    ids: tuple[int, ...]
    position: int
    truth: dict[str, str]


@dataclass(frozen=True)
class Shown(OracleExample):
    """An example with the name of its question, and the tokens up to the state that is read."""

    name: str = ""
    read: tuple[int, ...] = ()


def unseen(person: Person) -> bool:
    """Whether the training asks nothing about a person: every sixth."""
    return PEOPLE.index(person) % 6 == 5


def reply_sources(engine: Engine, count: int, *, held_out: bool, seed: int) -> list[Source]:
    """Chats of one turn at the token that the reply follows; what is true is read off what the
    model really replies. Replies whose first sentence is none of the world are left out."""
    chats = [one.messages[:-1] for one in examples(count, held_out=held_out, seed=seed)]
    prompts = [_ids(engine, chat) for chat in chats]
    sampling = SamplingParams(max_tokens=24, temperature=0)
    asked = [GenerationRequest(str(n), ids, sampling) for n, ids in enumerate(prompts)]
    read, found = reader(), []
    for ids, done in zip(prompts, engine.complete(asked), strict=True):
        first = _SENTENCE.match(answer_text(engine.tokenizer, done.tokens))
        reading = read.parse(first[0]) if first else None
        if reading is not None and reading.valid:
            found.append(Source(ids, len(ids) - 1, reply_truth(reading)))
    return found


def person_sources(engine: Engine, *, held_out: bool, strangers: bool) -> list[Source]:
    """Questions about people at the end of the name: in wordings of one side of the split, about
    the people whom the training asks about, or the others."""
    found = []
    for person in PEOPLE:
        if unseen(person) != strangers:
            continue
        truth = person_truth(person)
        for question in person_questions(person):
            for wording in question.asks["en"]:
                if is_held_out(question, wording) != held_out:
                    continue
                prompt = encode_prompt(engine, _chat([{"role": "user", "content": wording}]))
                place = prompt.position(person.name, param="/name")
                found.append(Source(prompt.ids, place, truth))
    return found


def shown(
    engine: Engine,
    sources: Sequence[Source],
    *,
    held_out: bool,
    seed: int,
    layers: int = 2,
    questions: int = 3,
) -> Iterator[Shown]:
    """Of each source the states after `layers` blocks drawn by chance, and about each at most
    `questions` of its questions, in words of one side of the split."""
    draw = random.Random(seed)
    every = {**REPLY, **PERSON}
    points = tuple(HookPoint(layer) for layer in LAYERS)
    for first in range(0, len(sources), _AT_ONCE):
        part = sources[first : first + _AT_ONCE]
        captured = engine.capture(CaptureRequest([one.ids for one in part], points))
        for source, states in zip(part, captured, strict=True):
            for layer in draw.sample(LAYERS, layers):
                names = list(source.truth)
                row: Tensor = states.states[HookPoint(layer)][source.position].clone()
                for name in draw.sample(names, min(questions, len(names))):
                    words = draw.choice(every[name].words(held_out=held_out))
                    read = source.ids[: source.position + 1]
                    yield Shown(row[None], layer, words, source.truth[name], name, read)


def _ids(engine: Engine, chat: Messages) -> tuple[int, ...]:
    return encode_prompt(engine, _chat(chat)).ids


def _chat(messages: Messages) -> PromptInput:
    return PromptInput.model_validate({"messages": list(messages)})
