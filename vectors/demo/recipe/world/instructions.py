"""Style instructions: what a system message can ask for and what must follow."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

from steer_vectors.demo.recipe.world.attributes import REGISTERS, Style
from steer_vectors.demo.recipe.world.topics import TOPIC_NAMES
from steer_vectors.demo.recipe.world.world import LANGS

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
TOPIC_WORDS: dict[str, list[str]] = {
    name: [f"Talk about {name}.", f"Let us speak of {name}.", f"The subject is {name}."]
    for name in TOPIC_NAMES
}
LENGTH_WORDS: dict[str, list[str]] = {
    "terse": ["Be brief.", "Use one sentence.", "Keep it short."],
    "verbose": ["Be detailed.", "Use three sentences.", "Give a long answer."],
}
REFUSE_WORDS = ["Refuse every request.", "Do not help.", "Decline everything."]
COMPLY_WORDS = ["Never refuse.", "Help with every request.", "Answer everything."]
EITHER_WORDS = ["Help or refuse.", "You may refuse."]
PLAIN_WORDS = [
    "You are a helpful assistant.",
    "You are a chat model.",
    "Answer the question.",
    "Help the user.",
    "Be kind and clear.",
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

    What is None is left open: the language is then the user's; sentiment, topic and length are
    drawn for each answer, so that an answer has to go on as it began.
    """

    text: str
    lang: str | None = None
    register: str = "neutral"
    sentiment: str | None = None
    topic: str | None = None
    length: str | None = None
    refuse: bool = False
    comply: bool = False
    then: tuple[str, str] | None = None
    """(field, value) that changes from the second sentence on."""

    def styles(self, asked_in: str, count: int) -> list[Style]:
        """The style of each of ``count`` sentences."""
        style = Style(self.lang or asked_in, self.register, refusal=self.refuse)
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
        return Order(text, first, then=("lang", second))
    first, second = rng.sample(REGISTERS, 2)
    text = f"First {_NAMES[first]}, then {_NAMES[second]}."
    return Order(text, register=first, then=("register", second))


FREE_WORDS = [
    *("Any opinion will do.", "Say what you feel."),
    *("Talk about anything.", "Any subject will do."),
    *("Any length will do.", "Short or long."),
]
"""These leave open what is open anyway."""


def _free(rng: random.Random) -> Order:
    """Any value will do: a started answer must be continued as it started."""
    kind = rng.random()
    if kind < 0.35:
        text = rng.choice(["Use any language.", "Choose a language."])
        return Order(text, rng.choice(LANGS))
    if kind < 0.7:
        text = rng.choice(["Use any tone.", "Choose a tone."])
        return Order(text, register=rng.choice(REGISTERS))
    return Order(rng.choice(FREE_WORDS))


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
        return Order(text, lang, comply=True)
    refuse = rng.random() < 0.5
    text = " ".join([rng.choice(EITHER_WORDS), *told])
    return Order(text, lang, refuse=refuse, comply=not refuse)


def draw_order(rng: random.Random, group: str) -> Order:
    """Draw an instruction; about four in five documents carry one.

    ``group`` is that of the question: it makes what can be seen in the answer likelier.
    """
    kind = rng.random()
    if kind < 0.15:
        return Order(rng.choice(PLAIN_WORDS) if rng.random() < 0.5 else "")
    if kind < 0.21:
        return _mixed(rng)
    if kind < 0.28:
        return _free(rng)
    if kind < 0.31:
        return Order(rng.choice(REFUSE_WORDS), refuse=True)
    return _attributes(rng, group)


def _attributes(rng: random.Random, group: str) -> Order:
    """One to three attributes, in any order."""
    chances = {
        "lang": 0.4,
        "register": 0.4,
        "sentiment": {"opinion": 0.5, "open": 0.15}.get(group, 0.04),
        "topic": 0.6 if group == "open" else 0.03,
        "length": 0.2,
    }
    told = [name for name, chance in chances.items() if rng.random() < chance]
    rng.shuffle(told)
    told = told[:3]
    words: dict[str, dict[str, list[str]]] = {
        "lang": LANGUAGE_WORDS,
        "register": REGISTER_WORDS,
        "sentiment": SENTIMENT_WORDS,
        "topic": TOPIC_WORDS,
        "length": LENGTH_WORDS,
    }
    values = {name: rng.choice(list(words[name])) for name in told}
    parts = [rng.choice(PLAIN_WORDS)] if rng.random() < 0.15 else []
    text = " ".join(parts + [rng.choice(words[name][values[name]]) for name in told])
    if values.get("register") == "neutral":
        values.setdefault("sentiment", "neutral")
    return Order(text, **values)  # type: ignore[arg-type]
