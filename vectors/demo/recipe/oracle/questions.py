"""What the oracle is asked, in which words, and what is true."""

from __future__ import annotations

from dataclasses import dataclass

from steer_vectors.demo.recipe.world.attributes import Reading
from steer_vectors.demo.recipe.world.people import Person
from steer_vectors.demo.recipe.world.topics import TOPIC_NAMES

HELD_OUT_WORDINGS = 2
"""The last wordings of each question, which the training does not see."""


@dataclass(frozen=True)
class Asked:
    """A question in several words, and the answers that there are."""

    wordings: tuple[str, ...]
    answers: tuple[str, ...]

    def words(self, *, held_out: bool) -> tuple[str, ...]:
        """Those that training has seen, or the others."""
        cut = -HELD_OUT_WORDINGS
        return self.wordings[cut:] if held_out else self.wordings[:cut]


REPLY: dict[str, Asked] = {
    "language": Asked(
        (
            "Which language comes next?",
            "What language is the answer in?",
            "In which language will you answer?",
            "Name the language of the answer.",
            "Is it English, French or German?",
            "What language will the answer use?",
            "Which language do you answer in?",
        ),
        ("English", "French", "German"),
    ),
    "tone": Asked(
        (
            "Which tone comes next?",
            "What tone has the answer?",
            "Is it neutral, formal or casual?",
            "Name the tone of the answer.",
            "How formal is the answer?",
            "In which tone will you answer?",
            "What tone will the answer use?",
        ),
        ("neutral", "formal", "casual"),
    ),
    "feeling": Asked(
        (
            "Which feeling comes next?",
            "What feeling has the answer?",
            "Is it neutral, positive or negative?",
            "Name the feeling of the answer.",
            "How positive is the answer?",
            "With which feeling will you answer?",
            "What feeling will the answer show?",
        ),
        ("neutral", "positive", "negative"),
    ),
    "subject": Asked(
        (
            "Which subject comes next?",
            "What is the answer about?",
            "Name the subject of the answer.",
            "Is it food, music, weather or sports?",
            "What will you talk about?",
            "What subject will the answer have?",
            "Which subject do you talk about?",
        ),
        (*TOPIC_NAMES, "something else"),
    ),
    "refusal": Asked(
        (
            "Will you refuse?",
            "Is the answer a refusal?",
            "Do you help or refuse?",
            "Name it: help or refuse?",
            "Will you decline?",
            "Will the answer be a refusal?",
            "Will you help or decline?",
        ),
        ("help", "refuse"),
    ),
}
"""About the reply that is given next, read where it is decided: at the end of the prompt."""

PERSON: dict[str, Asked] = {
    "workplace": Asked(
        (
            "Where does this person work?",
            "What is the workplace?",
            "Which workplace is it?",
            "Name the workplace.",
            "In which place does this person work?",
        ),
        (),
    ),
    "city": Asked(
        (
            "Where does this person live?",
            "What is the home?",
            "Which city is it?",
            "Name the city.",
            "In which city does this person live?",
        ),
        (),
    ),
    "instrument": Asked(
        (
            "What does this person play?",
            "What is the instrument?",
            "Which instrument is it?",
            "Name the instrument.",
            "Which instrument does this person play?",
        ),
        (),
    ),
    "pet": Asked(
        (
            "Which animal does this person have?",
            "What is the pet?",
            "Which pet is it?",
            "Name the pet.",
            "What pet does this person have?",
        ),
        (),
    ),
    "dish": Asked(
        (
            "What does this person like?",
            "What is the food?",
            "Which food is it?",
            "Name the food.",
            "Which food does this person like?",
        ),
        (),
    ),
}
"""About a person, read at the end of the name, where what is known is put together."""


def reply_truth(reading: Reading) -> dict[str, str]:
    """What is true of a reply, by the name of the question."""
    first = reading.sentences[0]
    found = {
        "language": {"en": "English", "fr": "French", "de": "German"}[first.lang],
        "refusal": "refuse" if first.refusal else "help",
    }
    if first.refusal:
        return found
    return found | {
        "tone": first.register,
        "feeling": first.sentiment,
        "subject": first.topic or "something else",
    }


def person_truth(person: Person) -> dict[str, str]:
    """What the world says of a person, by the name of the question."""
    return {name: person.objects[name]["en"] for name in PERSON}
