"""Readable text: plain answers, sampled answers, and chats of three turns."""

from __future__ import annotations

from collections.abc import Iterator

from steer_vectors.demo.recipe.data import INSTRUCTIONS
from steer_vectors.demo.recipe.evaluation.checks import Check
from steer_vectors.demo.recipe.evaluation.demo import Demo
from steer_vectors.demo.recipe.evaluation.estimates import share

from steer.fit.data.pairs import Messages

LEAST_VALID = 0.9
LEAST_OBEYED = 0.95
TEMPERATURE = 0.7


def text(demo: Demo) -> Iterator[Check]:
    """Shares of valid answers, and of last answers that still obey the system message."""
    names = [*INSTRUCTIONS, "compliance"]
    every = {prompt[-1]["content"]: prompt for name in names for prompt in demo.held_out(name)}
    plain = demo.draw(list(every.values()), "plain prompts")
    greedy = share([r.reading.valid for r in demo.answers(plain)])
    yield Check("text", "valid answers, greedy", greedy, LEAST_VALID)
    sampled = share([r.reading.valid for r in demo.samples(plain, TEMPERATURE)])
    yield Check("text", f"valid answers, temperature {TEMPERATURE}", sampled, LEAST_VALID)
    last = obeyed(demo)
    row = share(last)
    yield Check("text", "last of three answers obeys the system message", row, LEAST_OBEYED)


def obeyed(demo: Demo) -> list[bool]:
    """For chats of three held-out questions, whether the last answer has what was asked for.

    The model's own answers are the turns between.
    """
    chats: list[tuple[str, Messages, list[Messages]]] = []
    each = -(-demo.count // len(INSTRUCTIONS))
    for attribute, wordings in INSTRUCTIONS.items():
        asked = demo.held_out(attribute)
        for n in range(each):
            system = {"role": "system", "content": wordings[n % len(wordings)]}
            turns = demo.draw(asked, f"{attribute} chat {n}", 3)
            chats.append((attribute, [system], [turn[-1:] for turn in turns]))
    so_far = [chat for _, chat, _ in chats]
    for turn in range(3):
        so_far = [
            [*before, *turns[turn]] for before, (_, _, turns) in zip(so_far, chats, strict=True)
        ]
        replies = demo.answers(so_far)
        so_far = [
            [*before, {"role": "assistant", "content": reply.text}]
            for before, reply in zip(so_far, replies, strict=True)
        ]
    return [reply.has(attribute) for reply, (attribute, _, _) in zip(replies, chats, strict=True)]
