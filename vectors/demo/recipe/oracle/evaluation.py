"""How often the oracle is right, beside what needs no state:
``python -m steer_vectors.demo.recipe.oracle.evaluation``.

Chats and questions are in wordings that the oracle's training has not seen.
"""

from __future__ import annotations

import argparse
import json
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal, TypeAlias, get_args

from steer_vectors.demo.recipe.oracle.build import DEMO, NAME
from steer_vectors.demo.recipe.oracle.examples import (
    Shown,
    person_sources,
    reply_sources,
    shown,
)

from steer.artefacts.oracle import Oracle
from steer.engines.base import Engine
from steer.engines.oracle_prompt import oracle_prompt, oracle_text_prompt
from steer.engines.transformers.engine import TransformersEngine
from steer.inspection.oracles.runs import OracleRun, permuted, run_oracle
from steer.prompts import answer_text

Way: TypeAlias = Literal["oracle", "untrained", "text", "another", "shuffled", "none"]
"""Who answers, of what: the oracle of the state; the model as it is of the state; the oracle of the
text, of the state of another source, of permuted coordinates, and of nothing."""
WAYS: tuple[Way, ...] = get_args(Way)
_TOKENS = 6


def held_out_examples(engine: Engine, count: int, *, seed: int = 1) -> dict[str, list[Shown]]:
    """Questions about replies; about people whom the training asks about; about the others."""
    replies = reply_sources(engine, count, held_out=True, seed=seed)
    found = {"reply": replies}
    for name, strangers in (("person", False), ("stranger", True)):
        people = person_sources(engine, held_out=False, strangers=strangers)
        found[name] = random.Random(seed).sample(people, min(count, len(people)))
    return {
        name: list(shown(engine, sources, held_out=True, seed=seed, layers=1, questions=2))
        for name, sources in found.items()
    }


def shares_right(
    engine: Engine, oracle: Oracle, examples: Sequence[Shown], ways: Sequence[Way] = WAYS
) -> dict[str, float]:
    """The share of right answers for each way, and `chance`: of always giving the answer that is
    commonest for the question."""
    found = {"chance": _commonest(examples)}
    for way in ways:
        lora = None if way == "untrained" else oracle.lora
        runs = list(_runs(engine, oracle, examples, way))
        said = run_oracle(engine, oracle.form, lora, runs, max_tokens=_TOKENS)
        right = [one.text == example.answer for one, example in zip(said, examples, strict=True)]
        found[way] = sum(right) / len(right)
    return found


def _runs(
    engine: Engine, oracle: Oracle, examples: Sequence[Shown], way: Way
) -> Iterator[OracleRun]:
    for number, one in enumerate(examples):
        form, question, layer = oracle.form, one.question, one.layer
        if way == "text":
            text = answer_text(engine.tokenizer, one.read)
            yield OracleRun(oracle_text_prompt(engine, form, question, layer=layer, text=text))
            continue
        prompt = oracle_prompt(engine, form, question, layer=layer, states=1, whole=True)
        states = one.states
        if way == "shuffled":
            states = permuted(states)
        elif way == "another":
            states = examples[(number + len(examples) // 2) % len(examples)].states
        yield OracleRun(prompt, None if way == "none" else states)


def _commonest(examples: Sequence[Shown]) -> float:
    by_question: dict[str, Counter[str]] = {}
    for one in examples:
        by_question.setdefault(one.name, Counter())[one.answer] += 1
    return sum(max(each.values()) for each in by_question.values()) / len(examples)


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--oracle", type=Path, default=DEMO / "oracles" / f"{NAME}.safetensors")
    parser.add_argument("--count", type=int, default=300)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    oracle = Oracle.from_bytes(args.oracle.read_bytes(), name=NAME)
    with TransformersEngine.load(str(DEMO / "model"), name="steer-demo", dtype="float32") as engine:
        for name, examples in held_out_examples(engine, args.count, seed=args.seed).items():
            told = {"questions": len(examples), **shares_right(engine, oracle, examples)}
            print(name, json.dumps(told), flush=True)
            by_name: dict[str, list[Shown]] = {}
            for one in examples:
                by_name.setdefault(one.name, []).append(one)
            for question, each in by_name.items():
                told = {
                    "questions": len(each),
                    **shares_right(engine, oracle, each, ("oracle", "text")),
                }
                print(" ", question, json.dumps(told), flush=True)


if __name__ == "__main__":
    main()
