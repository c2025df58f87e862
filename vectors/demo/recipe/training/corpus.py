"""Generates the training documents: chats, few-shot copying and index cards, from one seed."""

from __future__ import annotations

import random
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TypeVar

from steer_vectors.demo.recipe.world.attributes import (
    AFTER_REFUSAL,
    REFUSALS,
    Reader,
    Style,
    sentence,
)
from steer_vectors.demo.recipe.world.index_cards import index_card
from steer_vectors.demo.recipe.world.instructions import Order, draw_exception, draw_order
from steer_vectors.demo.recipe.world.people import PEOPLE
from steer_vectors.demo.recipe.world.question import Question
from steer_vectors.demo.recipe.world.questions import all_questions, opinion_question
from steer_vectors.demo.recipe.world.topics import TOPIC_NAMES, TOPICS
from steer_vectors.demo.recipe.world.world import ANIMALS, COUNTRIES, LANGS, LANGUAGES, Tri

Message = dict[str, str]
Key = TypeVar("Key")
GROUPS = {
    "country": 0.20,
    "animal": 0.11,
    "person": 0.14,
    "opinion": 0.20,
    "how_to": 0.19,
    "open": 0.10,
    "small_talk": 0.06,
}
"""Share of each group of questions among chat turns."""
COPYING = 0.05
"""Share of few-shot copying documents."""
INDEX_CARDS = 0.07
"""Share of documents that are index cards."""
OPINION_SHARES = {"neutral": 0.6, "positive": 0.2, "negative": 0.2}
TOPIC_SHARES: dict[str | None, float] = {None: 0.4, **dict.fromkeys(TOPIC_NAMES, 0.15)}
LENGTH_SHARES: dict[str | None, float] = {None: 0.8, "terse": 0.1, "verbose": 0.1}
"""What an answer is like where the instruction leaves it open. As nothing else tells, an answer
that has begun one way goes on that way."""
EXCEPTIONS = {"how_to": 0.3}
"""Share of instructions that settle refusal, by group; `OTHER_EXCEPTIONS` for the rest."""
OTHER_EXCEPTIONS = 0.05
HELD_OUT_PERCENT = 18


@dataclass(frozen=True)
class Document:
    """A chat (``messages``) or, if there are none, plain ``text``."""

    messages: tuple[Message, ...] = ()
    text: str = ""


def is_held_out(question: Question, wording: str) -> bool:
    """Whether a wording is kept out of training: a fixed hash, not a random draw.

    Requests for help are held out by action, so that refusal must generalise;
    other questions by wording, so that the fact itself is still taught.
    """
    if question.kind == "small_talk":
        return False
    key = question.subject if question.kind == "how_to" else wording
    return zlib.crc32(key.encode()) % 100 < HELD_OUT_PERCENT


UNNAMED = 0.25
"""Share of answers about people that do not repeat the name: they can only look it up in the
question."""
LONGER = ("opinion", "how_to", "open")
"""Questions that are answered in two sentences, unless a length is asked for."""


def draw(rng: random.Random, shares: dict[Key, float]) -> Key:
    """Draw a key by its share."""
    return rng.choices(list(shares), list(shares.values()))[0]


def settle(rng: random.Random, q: Question, order: Order) -> Order:
    """Draw what the instruction leaves open and the question lets vary."""
    plain = order.register == "neutral" and order.then is None
    sentiment, topic, length = order.sentiment, order.topic, order.length
    if q.kind == "open" and topic is None and plain:
        topic = draw(rng, TOPIC_SHARES)
    if not (q.topic or (q.kind == "open" and topic)):
        sentiment = None
    elif sentiment is None and plain and order.topic is None:
        sentiment = draw(rng, OPINION_SHARES)
    if length is None and plain and order.sentiment is None and order.topic is None:
        length = draw(rng, LENGTH_SHARES)
    if order.length is None and q.kind == "open" and topic:
        length = None
    return replace(order, sentiment=sentiment or "neutral", topic=topic, length=length)


def reply_clauses(rng: random.Random, q: Question, order: Order) -> list[Tri]:
    """Draw what is said in reply, one to three clauses."""
    first, more = list(q.first), list(q.more)
    if q.again and rng.random() < UNNAMED:
        first = [q.again]
    about = q
    if q.kind == "open" and order.topic:
        about = opinion_question(rng.choice([t for t in TOPICS if t.domain == order.topic]))
        first, more = [], list(about.more)
    if about.by_sentiment:
        more = list(about.by_sentiment[order.sentiment or "neutral"])
    rng.shuffle(more)
    if order.length is not None:
        count = 1 if order.length == "terse" else 3
    elif q.kind in LONGER or q.kind.endswith("description"):
        count = 2
    else:
        count = rng.choice((1, 1, 2))
    return (first + more)[:count]


def opening(q: Question, order: Order) -> str | None:
    """The markers that the first sentence begins with: of a length, else of a topic."""
    return order.length or (order.topic if q.kind == "open" else None)


def reply(rng: random.Random, q: Question, asked_in: str, order: Order) -> str:
    """Write the reply to a question under an instruction."""
    return written(rng, q, asked_in, settle(rng, q, order))


def written(rng: random.Random, q: Question, asked_in: str, order: Order) -> str:
    """Write the reply under an instruction that leaves nothing open."""
    if order.refuse or (q.harmful and not order.comply):
        lang = order.styles(asked_in, 1)[0].lang
        style = Style(lang, refusal=True)
        text = sentence(rng.choice(REFUSALS), style, rng.randrange(2))
        if rng.random() < 0.4:
            text += " " + sentence(AFTER_REFUSAL, Style(lang))
        return text
    clauses = reply_clauses(rng, q, order)
    styles = [
        replace(s, sentiment=order.sentiment or "neutral")
        for s in order.styles(asked_in, len(clauses))
    ]
    styles[0] = replace(styles[0], opening=opening(q, order))
    marks = [rng.randrange(3) for _ in clauses]
    return " ".join(map(sentence, clauses, styles, marks))


class Corpus:
    """Draws documents.

    Assumes: nothing outside this package.
    Guarantees: the same seed gives the same documents; no held-out wording is used.
    """

    def __init__(self, seed: int, exceptions: bool = False) -> None:
        self.exceptions = exceptions
        self.rng = random.Random(seed)
        self.questions = all_questions()
        self.allowed = {
            group: [
                (q, lang, kept)
                for q in questions
                for lang in LANGS
                if (kept := [w for w in q.asks[lang] if not is_held_out(q, w)])
            ]
            for group, questions in self.questions.items()
        }
        self.by_lang = {
            group: {lang: [e for e in entries if e[1] == lang] for lang in LANGS}
            for group, entries in self.allowed.items()
        }
        self.words = [
            *(c.name[x] for c in COUNTRIES for x in LANGS),
            *(c.capital[x] for c in COUNTRIES for x in LANGS),
            *(a.bare for a in ANIMALS),
            *(t.name[x] for t in TOPICS for x in LANGS),
            *(n[x] for n in LANGUAGES.values() for x in LANGS),
            *(p.name for p in PEOPLE),
        ]

    def _turn(self, order: Order | None, lang: str) -> tuple[str, str, Order]:
        rng = self.rng
        group = rng.choices(list(GROUPS), list(GROUPS.values()))[0]
        question, asked_in, wordings = rng.choice(self.by_lang[group][lang])
        if order is None:
            share = EXCEPTIONS.get(group, OTHER_EXCEPTIONS) if self.exceptions else 0.0
            exception = share > 0 and rng.random() < share
            order = draw_exception(rng) if exception else draw_order(rng, group)
        return rng.choice(wordings), reply(rng, question, asked_in, order), order

    def chat(self) -> Document:
        """One to three turns under one instruction, given by the system or by the user."""
        rng = self.rng
        lang = rng.choices(LANGS, (0.7, 0.15, 0.15))[0]
        ask, answer, order = self._turn(None, lang)
        messages: list[Message] = []
        if order.text and rng.random() < 0.92:
            messages.append({"role": "system", "content": order.text})
        elif order.text:
            ask = f"{ask} {order.text}"
        messages += [{"role": "user", "content": ask}, {"role": "assistant", "content": answer}]
        for _ in range(
            rng.choice((0, 0, 1, 1, 2)) if messages[0]["role"] == "system" or not order.text else 0
        ):
            ask, answer, _ = self._turn(order, lang)
            messages += [{"role": "user", "content": ask}, {"role": "assistant", "content": answer}]
        return Document(tuple(messages))

    def copying(self) -> Document:
        """Few-shot copying (``a -> a``), which Patchscopes use as a target prompt."""
        picked = self.rng.sample(self.words, self.rng.randint(4, 8))
        return Document(text="; ".join(f"{w} -> {w}" for w in picked))

    def documents(self, count: int) -> Iterator[Document]:
        """Draw ``count`` documents."""
        for _ in range(count):
            kind = self.rng.random()
            if kind < COPYING:
                yield self.copying()
            elif kind < COPYING + INDEX_CARDS:
                yield Document(text=index_card(self.rng))
            else:
                yield self.chat()


def reader() -> Reader:
    """A `Reader` that knows every clause of the world."""
    known: list[tuple[Tri, str, str | None]] = []
    for group in all_questions().values():
        for q in group:
            said = (*q.first, *q.more, *([q.again] if q.again else []))
            known += [(c, "neutral", q.topic) for c in said]
            for mood, clauses in q.by_sentiment.items():
                known += [(c, mood, q.topic) for c in clauses]
    return Reader(known)
