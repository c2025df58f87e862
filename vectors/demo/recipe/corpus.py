"""Generates the training documents: chats and few-shot copying, all from one seed."""

from __future__ import annotations

import random
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

from .attributes import AFTER_REFUSAL, REFUSALS, Reader, Style, sentence
from .instructions import Order, draw_exception, draw_order
from .question import Question
from .questions import all_questions
from .topics import TOPICS
from .world import ANIMALS, COUNTRIES, LANGS, LANGUAGES, Tri

Message = dict[str, str]
GROUPS = {"country": 0.29, "animal": 0.17, "opinion": 0.25, "how_to": 0.23, "small_talk": 0.06}
"""Share of each group of questions among chat turns."""
COPYING = 0.06
"""Share of few-shot copying documents."""
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


def reply_clauses(rng: random.Random, q: Question, mood: str) -> list[Tri]:
    """Draw what is said in reply, one to three clauses."""
    first, more = list(q.first), list(q.by_sentiment.get(mood, q.more))
    rng.shuffle(more)
    if q.kind.endswith("description"):
        count = 3
    elif q.kind == "opinion":
        count = rng.choice((1, 2, 2))
    else:
        count = rng.choice((1, 1, 2))
    return (first + more)[:count]


def reply(rng: random.Random, q: Question, asked_in: str, order: Order) -> str:
    """Write the reply to a question under an instruction."""
    mood = order.sentiment if q.kind == "opinion" else "neutral"
    if order.refuse or (q.harmful and not order.comply):
        lang = order.styles(asked_in, 1)[0].lang
        style = Style(lang, refusal=True)
        text = sentence(rng.choice(REFUSALS), style, rng.randrange(2))
        if rng.random() < 0.4:
            text += " " + sentence(AFTER_REFUSAL, Style(lang))
        return text
    clauses = reply_clauses(rng, q, mood)
    styles = order.styles(asked_in, len(clauses))
    if mood == "neutral":
        styles = [Style(s.lang, s.register) for s in styles]
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
        ]

    def _turn(self, order: Order | None, lang: str) -> tuple[str, str, Order]:
        rng = self.rng
        group = rng.choices(list(GROUPS), list(GROUPS.values()))[0]
        question, asked_in, wordings = rng.choice(self.by_lang[group][lang])
        if order is None:
            share = EXCEPTIONS.get(group, OTHER_EXCEPTIONS) if self.exceptions else 0.0
            exception = share > 0 and rng.random() < share
            order = draw_exception(rng) if exception else draw_order(rng, group == "opinion")
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
            yield self.copying() if self.rng.random() < COPYING else self.chat()


def reader() -> Reader:
    """A `Reader` that knows every clause of the world."""
    known: list[tuple[Tri, str]] = []
    for group in all_questions().values():
        for q in group:
            known += [(c, "neutral") for c in (*q.first, *q.more)]
            for mood, clauses in q.by_sentiment.items():
                known += [(c, mood) for c in clauses]
    return Reader(known)
