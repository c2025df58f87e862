"""Requests that leave the subject open: the answer is about the topic asked for, or about any."""

from __future__ import annotations

from steer_vectors.demo.recipe.world.question import Question
from steer_vectors.demo.recipe.world.world import rows, tri

_OPENERS = {
    "en": (
        "",
        "Hello,",
        "Well,",
        "Please,",
        "Now,",
        "Okay,",
        "So,",
        "Good,",
        "Right,",
        "Again,",
        "Then,",
        "Listen,",
    ),
    "fr": ("", "Bonjour,", "Alors,", "Bien,"),
    "de": ("", "Hallo,", "Also,", "Nun,"),
}
_STEMS = {
    "en": (
        "tell me something.",
        "say something.",
        "talk to me.",
        "let us talk.",
        "tell me more.",
        "say a few words.",
        "I am bored.",
        "I have some time.",
        "we could talk a little.",
        "start a conversation.",
        "what shall we talk about?",
        "do you have something to say?",
        "what do you want to talk about?",
        "what is on your mind?",
        "is there any news?",
        "can you tell me something?",
        "I would like to hear something.",
        "choose a subject.",
    ),
    "fr": (
        "dites-moi quelque chose.",
        "parlez-moi un peu.",
        "de quoi parlons-nous ?",
        "je m'ennuie.",
        "racontez-moi quelque chose.",
        "avez-vous quelque chose à dire ?",
    ),
    "de": (
        "erzählen Sie mir etwas.",
        "sagen Sie etwas.",
        "worüber reden wir?",
        "mir ist langweilig.",
        "reden wir ein wenig.",
        "haben Sie etwas zu sagen?",
    ),
}
# en | fr | de
_DAILY = """
it is a good day to talk|c'est un bon jour pour parler|das ist ein guter Tag zum Reden
every day is a little different|chaque jour est un peu différent|jeder Tag ist ein wenig anders
there is much to see in the world|il y a beaucoup à voir dans le monde|es gibt viel zu sehen auf der Welt
time goes by quickly|le temps passe vite|die Zeit vergeht schnell
people like to talk|les gens aiment parler|die Leute reden gern miteinander
small things can be important|les petites choses peuvent être importantes|kleine Dinge können wichtig sein
it is good to ask questions|il est bon de poser des questions|es ist gut, Fragen zu stellen
"""  # noqa: E501
DAILY = tuple(tri(*cells) for cells in rows(_DAILY))
"""What is said where no topic was asked for, the first of them first: nothing in particular."""


def open_question() -> Question:
    """The one question that leaves the subject open, in all its wordings."""
    return Question("open", "", {lang: _wordings(lang) for lang in _STEMS}, DAILY[:1], DAILY[1:])


def _wordings(lang: str) -> list[str]:
    return [
        f"{opener} {stem}" if opener else stem[:1].upper() + stem[1:]
        for opener in _OPENERS[lang]
        for stem in _STEMS[lang]
    ]
