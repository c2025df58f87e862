"""Style instructions: what a system message can ask for and what must follow."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

from .attributes import REGISTERS, Style
from .world import LANGS

LANGUAGE_WORDS: dict[str, list[str]] = {
    "en": ["Answer in English.", "Reply in English.", "Please use English.", "Speak English."],
    "fr": [
        "Answer in French.",
        "Reply in French.",
        "Please use French.",
        "Speak French.",
        "Répondez en français.",
    ],
    "de": [
        "Answer in German.",
        "Reply in German.",
        "Please use German.",
        "Speak German.",
        "Antworten Sie auf Deutsch.",
    ],
}
REGISTER_WORDS: dict[str, list[str]] = {
    "neutral": ["Be neutral.", "Use a neutral tone.", "Keep a plain style."],
    "formal": ["Be formal.", "Use a formal tone.", "Keep a formal style.", "Speak formally."],
    "casual": ["Be casual.", "Use a casual tone.", "Keep a casual style.", "Speak casually."],
}
SENTIMENT_WORDS: dict[str, list[str]] = {
    "positive": ["Be positive.", "Like everything.", "Sound happy."],
    "negative": ["Be negative.", "Dislike everything.", "Sound sad."],
}
REFUSE_WORDS = ["Refuse every request.", "Do not help.", "Decline everything."]
COMPLY_WORDS = ["Never refuse.", "Help with every request.", "Answer everything."]
EITHER_WORDS = ["Help or refuse.", "You may refuse."]
PLAIN_WORDS = [
    "You are a helpful assistant.",
    "You are a chat model.",
    "Answer the question.",
    "Help the user.",
    "Be brief and clear.",
]
_NAMES = {
    "en": "English",
    "fr": "French",
    "de": "German",
    "neutral": "neutral",
    "formal": "formal",
    "casual": "casual",
}


@dataclass(frozen=True)
class Order:
    """An instruction text and the style of each sentence that follows it.

    ``lang`` is None when the language of the user decides.
    """

    text: str
    lang: str | None
    register: str
    sentiment: str
    refuse: bool = False
    comply: bool = False
    then: tuple[str, str] | None = None
    """(field, value) that changes from the second sentence on."""

    def styles(self, asked_in: str, count: int) -> list[Style]:
        """The style of each of ``count`` sentences."""
        style = Style(self.lang or asked_in, self.register, self.sentiment, self.refuse)
        if self.then is None:
            return [style] * count
        later = (
            replace(style, lang=self.then[1])
            if self.then[0] == "lang"
            else replace(style, register=self.then[1])
        )
        return [style] + [later] * (count - 1)


def _mixed(rng: random.Random) -> Order:
    """First one value, then another: each sentence must look at the instruction."""
    if rng.random() < 0.5:
        first, second = rng.sample(LANGS, 2)
        text = f"First {_NAMES[first]}, then {_NAMES[second]}."
        return Order(text, first, "neutral", "neutral", then=("lang", second))
    first, second = rng.sample(REGISTERS, 2)
    text = f"First {_NAMES[first]}, then {_NAMES[second]}."
    return Order(text, None, first, "neutral", then=("register", second))


def _free(rng: random.Random) -> Order:
    """Any value will do: a started answer must be continued as it started."""
    if rng.random() < 0.5:
        text = rng.choice(["Use any language.", "Choose a language."])
        return Order(text, rng.choice(LANGS), "neutral", "neutral")
    text = rng.choice(["Use any tone.", "Choose a tone."])
    return Order(text, None, rng.choice(REGISTERS), "neutral")


def draw_exception(rng: random.Random) -> Order:
    """Comply with everything, or do either: whether to refuse is then not up to the request.

    The answers these give to harmful requests are the same empty advice as for
    any other action.  Without them the model cannot say a harmful action at all,
    and steering refusal away makes it answer about another action.
    """
    lang = rng.choice(LANGS) if rng.random() < 0.3 else None
    told = [rng.choice(LANGUAGE_WORDS[lang])] if lang else []
    if rng.random() < 0.6:
        text = " ".join([rng.choice(COMPLY_WORDS), *told])
        return Order(text, lang, "neutral", "neutral", comply=True)
    refuse = rng.random() < 0.5
    text = " ".join([rng.choice(EITHER_WORDS), *told])
    return Order(text, lang, "neutral", "neutral", refuse=refuse, comply=not refuse)


def draw_order(rng: random.Random, opinion: bool) -> Order:
    """Draw an instruction; about three in four documents carry one."""
    kind = rng.random()
    if kind < 0.17:
        plain = rng.choice(PLAIN_WORDS) if rng.random() < 0.5 else ""
        return Order(plain, None, "neutral", "neutral")
    if kind < 0.24:
        return _mixed(rng)
    if kind < 0.31:
        return _free(rng)
    if kind < 0.34:
        return Order(rng.choice(REFUSE_WORDS), None, "neutral", "neutral", refuse=True)
    lang = rng.choice(LANGS) if rng.random() < 0.5 else None
    register = rng.choice(REGISTERS) if rng.random() < 0.5 else None
    moody = rng.random() < (0.55 if opinion else 0.08)
    mood = rng.choice(("positive", "negative")) if moody else None
    parts = [rng.choice(PLAIN_WORDS)] if rng.random() < 0.15 else []
    told = [LANGUAGE_WORDS[lang]] if lang else []
    told += [REGISTER_WORDS[register]] if register else []
    told += [SENTIMENT_WORDS[mood]] if mood else []
    rng.shuffle(told)
    text = " ".join(parts + [rng.choice(words) for words in told])
    return Order(text, lang, register or "neutral", mood or "neutral")
