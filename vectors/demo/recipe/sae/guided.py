"""The guided SAE of the demo model: ``python -m steer_vectors.demo.recipe.sae.guided``.

G-SAE (2506.19382): the first latents are taught one attribute each, from chats that ask for it and
chats that do not, and what the model answers. Trained as anybody would, with `steer sae train`'s
request.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

import torch
from tqdm import tqdm

from steer.artefacts.sae import save_directory
from steer.engines.transformers.engine import TransformersEngine
from steer.fit.requests.saes.training import SAETrainingRequest

DEMO = Path(__file__).resolve().parents[2]
ATTRIBUTES = (
    "casual",
    "food",
    "formal",
    "french",
    "german",
    "music",
    "negative",
    "positive",
    "refusal",
    "sports",
    "terse",
    "verbose",
    "weather",
)
NAME = "guided-3"
TRAINED = 0.75
"""The share of each attribute's pairs that is trained on; the others show what was learnt."""


def pairs_of(attribute: str) -> list[dict[str, object]]:
    """Chats that ask for the attribute, each with one that does not."""
    with (DEMO / "data" / f"{attribute}.jsonl").open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def unseen_pairs(attribute: str) -> list[dict[str, object]]:
    """Those of `pairs_of` that the training did not see."""
    pairs = pairs_of(attribute)
    return pairs[_trained(pairs) :]


def _trained(pairs: list[dict[str, object]]) -> int:
    return int(TRAINED * len(pairs))


def request(*, guided: bool, seed: int = 0) -> SAETrainingRequest:
    """The training; without `guided` the same one without labels, to compare with."""
    prompts: list[object] = []
    labels: dict[str, list[bool | None]] = {name: [] for name in ATTRIBUTES}
    for attribute in ATTRIBUTES:
        pairs = pairs_of(attribute)
        for pair in pairs[: _trained(pairs)]:
            for side in ("positive", "negative"):
                prompts.append(pair[side])
                for name in ATTRIBUTES:
                    known = side == "positive" if name == attribute else None
                    labels[name].append(known)
    return SAETrainingRequest.model_validate(
        {
            "name": NAME if guided else "plain-3",
            "prompts": prompts,
            "labels": labels if guided else None,
            "layer": 3,
            "answer_tokens": 32,
            "architecture": "topk",
            "latents": 512,
            "k": 16,
            "epochs": 12.0,
            "rows": 1024,
            "rate": 2e-3,
            "batch": 64,
            "seed": seed,
            "licence": "Apache-2.0",
            "description": "A guided SAE of the demo model: its first features are "
            + ", ".join(f"{n} {name}" for n, name in enumerate(ATTRIBUTES))
            + "."
            if guided
            else "The same without labels.",
        }
    )


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=DEMO / "saes")
    parser.add_argument("--plain", action="store_true", help="without labels, to compare with")
    args = parser.parse_args()
    asked = request(guided=not args.plain)
    with TransformersEngine.load(str(DEMO / "model"), dtype="float32") as engine:
        asked.check(engine)
        found = asked.run(engine, lambda total, what: tqdm(total=total, desc=what).update)
        asked.forget(engine)
    card = found.sae.card
    made = {
        **card.provenance,
        "recipe": "steer_vectors.demo.recipe.sae.guided",
        "figures": found.measures.model_dump(),
    }
    fields = card.model_dump() | {"tags": ("demo",), "provenance": made}
    sae = replace(found.sae, card=type(card).model_validate(fields))
    save_directory(sae, args.out / asked.name, dtype=torch.bfloat16)
    print(found.measures, made.get("loss"))


if __name__ == "__main__":
    main()
