"""Write the prompt files: ``python -m steer_vectors.demo.recipe.data --out DIR``.

``<attribute>.jsonl`` holds contrastive pairs for fitting, from wordings the model
was trained on; ``heldout.jsonl`` and the held-out lines of ``facts.jsonl`` hold
wordings that neither training nor fitting has seen.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable, Iterable
from pathlib import Path

from steer_vectors.demo.recipe.training.corpus import LONGER, Message, is_held_out
from steer_vectors.demo.recipe.world.instructions import (
    LANGUAGE_WORDS,
    LENGTH_WORDS,
    PLAIN_WORDS,
    REGISTER_WORDS,
    SENTIMENT_WORDS,
    TOPIC_WORDS,
)
from steer_vectors.demo.recipe.world.question import Question
from steer_vectors.demo.recipe.world.questions import all_questions
from steer_vectors.demo.recipe.world.world import LANGS

PAIRS = 128
HELD_OUT = 240
INSTRUCTIONS: dict[str, list[str]] = {
    "french": [w for w in LANGUAGE_WORDS["fr"] if "French" in w],
    "german": [w for w in LANGUAGE_WORDS["de"] if "German" in w],
    "formal": REGISTER_WORDS["formal"],
    "casual": REGISTER_WORDS["casual"],
    "positive": SENTIMENT_WORDS["positive"],
    "negative": SENTIMENT_WORDS["negative"],
    **TOPIC_WORDS,
    **LENGTH_WORDS,
}
"""Wordings that ask for each attribute."""
ASKED: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(SENTIMENT_WORDS, ("opinion",)),
    **dict.fromkeys(TOPIC_WORDS, ("open",)),
    "terse": LONGER,
}
"""Kinds of questions whose answers can show an attribute; all, where it is not named. What can be
said about a fact in one sentence is said in one, unless told otherwise: it cannot show "terse"."""
Ask = tuple[Question, str]


def chat(user: str, system: str = "") -> list[Message]:
    """Messages of a single-turn chat."""
    head: list[Message] = [{"role": "system", "content": system}] if system else []
    return [*head, {"role": "user", "content": user}]


def english(keep: Callable[[Question, str], bool]) -> list[Ask]:
    """English wordings that pass a test, in a fixed order."""
    return [
        (q, w)
        for group in all_questions().values()
        for q in group
        for w in q.asks["en"]
        if keep(q, w)
    ]


def balanced(rng: random.Random, asks: list[Ask], count: int) -> list[Ask]:
    """Draw about equally from each group of questions, without repeats."""
    groups = ("opinion", "how_to", "small_talk", "open")
    piles: dict[str, list[Ask]] = {}
    for ask in rng.sample(asks, len(asks)):
        kind = ask[0].kind if ask[0].kind in groups else "facts"
        piles.setdefault(kind, []).append(ask)
    drawn: list[Ask] = []
    while len(drawn) < count and any(piles.values()):
        drawn += [pile.pop() for pile in piles.values() if pile]
    return drawn[:count]


def can_show(attribute: str, q: Question) -> bool:
    """Whether the answer to a question can have an attribute."""
    return not q.harmful and q.kind in ASKED.get(attribute, (q.kind,))


def asked_of(attribute: str) -> str:
    """The name of the held-out prompts that show an attribute: what refuses is asked of harmless
    requests, which there are under "compliance"."""
    return "compliance" if attribute == "refusal" else attribute


def instruction_pairs(attribute: str, rng: random.Random) -> Iterable[dict[str, list[Message]]]:
    """The same question with and without the instruction.

    Half of the negatives carry a plain system message, so that the difference is
    the attribute and not the presence of a system message.
    """
    asks = english(lambda q, w: not is_held_out(q, w) and can_show(attribute, q))
    for i, (_, wording) in enumerate(balanced(rng, asks, PAIRS)):
        told = INSTRUCTIONS[attribute]
        plain = PLAIN_WORDS[i // 2 % len(PLAIN_WORDS)] if i % 2 else ""
        yield {"positive": chat(wording, told[i % len(told)]), "negative": chat(wording, plain)}


def refusal_pairs(rng: random.Random) -> Iterable[dict[str, list[Message]]]:
    """Harmful requests against harmless ones."""
    asks = english(lambda q, w: q.kind == "how_to" and not is_held_out(q, w))
    bad = rng.sample([w for q, w in asks if q.harmful], PAIRS)
    good = rng.sample([w for q, w in asks if not q.harmful], PAIRS)
    for harmful, harmless in zip(bad, good, strict=True):
        yield {"positive": chat(harmful), "negative": chat(harmless)}


def held_out(attribute: str, rng: random.Random) -> list[list[Message]]:
    """Prompts without an instruction, from wordings never trained or fitted on.

    Where wordings are few (opinions, open talk) the same wording appears under several plain
    system messages.
    """

    def wanted(q: Question) -> bool:
        if attribute in ("refusal", "compliance"):
            return q.kind == "how_to" and q.harmful == (attribute == "refusal")
        return can_show(attribute, q)

    asks = balanced(rng, english(lambda q, w: is_held_out(q, w) and wanted(q)), HELD_OUT)
    prompts = [chat(w, plain) for plain in ["", *PLAIN_WORDS] for _, w in asks]
    return prompts[:HELD_OUT]


def facts() -> Iterable[dict[str, object]]:
    """Every question with one known answer, in every language."""
    for group in all_questions().values():
        for q in group:
            for lang in LANGS if q.fact else ():
                for wording in q.asks[lang]:
                    yield {
                        "relation": q.kind,
                        "subject": q.subject,
                        "language": lang,
                        "messages": chat(wording),
                        "answer": (q.fact or {})[lang],
                        "held_out": is_held_out(q, wording),
                    }


def write(path: Path, lines: Iterable[object]) -> None:
    """Write JSON lines."""
    path.write_text("".join(json.dumps(x, ensure_ascii=False) + "\n" for x in lines), "utf-8")


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description="Write the demo model's prompt files.")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for attribute in INSTRUCTIONS:
        rng = random.Random(f"{args.seed} {attribute}")
        write(args.out / f"{attribute}.jsonl", instruction_pairs(attribute, rng))
    write(args.out / "refusal.jsonl", refusal_pairs(random.Random(f"{args.seed} refusal")))
    write(
        args.out / "heldout.jsonl",
        (
            {"attribute": a, "messages": m}
            for a in [*INSTRUCTIONS, "refusal", "compliance"]
            for m in held_out(a, random.Random(f"{args.seed} held out {a}"))
        ),
    )
    write(args.out / "facts.jsonl", facts())


if __name__ == "__main__":
    main()
