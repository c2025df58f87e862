"""Every question one can ask the demo model, grouped the way the corpus draws them."""

from __future__ import annotations

from collections.abc import Iterator

from steer_vectors.demo.recipe.world.actions import ACTIONS, STEPS, Action
from steer_vectors.demo.recipe.world.facts import animal_questions, country_questions
from steer_vectors.demo.recipe.world.open_talk import open_question
from steer_vectors.demo.recipe.world.people import PEOPLE, person_questions
from steer_vectors.demo.recipe.world.question import Question, asks
from steer_vectors.demo.recipe.world.small_talk import small_talk
from steer_vectors.demo.recipe.world.topics import TOPICS, Topic
from steer_vectors.demo.recipe.world.world import ANIMALS, COUNTRIES, LANGS, french_de, tri


def opinion_question(t: Topic) -> Question:
    """An opinion on a topic; neutral unless told otherwise."""
    n = t.name
    by = {
        "neutral": tuple(t.neutral()),
        "positive": tuple(t.opinions("positive")),
        "negative": tuple(t.opinions("negative")),
    }
    return Question(
        "opinion",
        n["en"],
        asks(
            [
                f"What do you think of {n['en']}?",
                f"Do you like {n['en']}?",
                f"What is your opinion of {n['en']}?",
                f"How do you feel about {n['en']}?",
                f"Tell me about {n['en']}.",
                f"What about {n['en']}?",
            ],
            [
                f"Que pensez-vous {french_de(n['fr'])} ?",
                f"Aimez-vous {n['fr']} ?",
                f"Parlez-moi {french_de(n['fr'])}.",
            ],
            [
                f"Was denken Sie über {n['de']}?",
                f"Mögen Sie {n['de']}?",
                f"Was halten Sie von {n['de']}?",
            ],
        ),
        (),
        by["neutral"],
        by_sentiment=by,
        topic=t.domain,
    )


def how_to_question(a: Action) -> Question:
    """Help with an action; harmful ones are refused."""
    p = a.phrase
    steps = tuple(
        tri(
            f"first you should {s['en']}",
            f"d'abord il faut {s['fr']}",
            f"zuerst sollten Sie {s['de']}",
        )
        for s in STEPS
    )
    return Question(
        "how_to",
        p["en"],
        asks(
            [
                f"How do I {p['en']}?",
                f"How can I {p['en']}?",
                f"Tell me how to {p['en']}.",
                f"Explain how to {p['en']}.",
                f"Help me to {p['en']}.",
            ],
            [
                f"Comment {p['fr']} ?",
                f"Expliquez-moi comment {p['fr']}.",
                f"Aidez-moi à {p['fr']}.",
            ],
            [
                f"Wie kann ich {p['de']}?",
                f"Erklären Sie mir, wie ich {p['de']} kann.",
                f"Ich will {p['de']}. Wie geht das?",
            ],
        ),
        (tri(f"here is how to {p['en']}", f"voici comment {p['fr']}", f"so kann man {p['de']}"),),
        steps,
        harmful=a.harmful,
    )


def small_talk_questions() -> Iterator[Question]:
    """Greetings, thanks, and questions about the model itself."""
    for wordings, clauses in small_talk():
        yield Question(
            "small_talk",
            wordings[0]["en"],
            {lang: [w[lang] for w in wordings] for lang in LANGS},
            (clauses[0],),
            tuple(clauses[1:]),
        )


def all_questions() -> dict[str, list[Question]]:
    """Every question, grouped the way the corpus draws them."""
    return {
        "country": [q for c in COUNTRIES for q in country_questions(c)],
        "animal": [q for a in ANIMALS for q in animal_questions(a)],
        "opinion": [opinion_question(t) for t in TOPICS],
        "how_to": [how_to_question(a) for a in ACTIONS],
        "small_talk": list(small_talk_questions()),
        "person": [q for p in PEOPLE for q in person_questions(p)],
        "open": [open_question()],
    }
