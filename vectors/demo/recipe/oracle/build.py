"""Trains the oracle: ``python -m steer_vectors.demo.recipe.oracle --out DIR``."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from steer_vectors.demo.recipe.oracle.examples import (
    LAYERS,
    Shown,
    person_sources,
    reply_sources,
    shown,
)
from tqdm import tqdm

from steer.artefacts.lora import Lora, LoraPart
from steer.artefacts.oracle import Oracle
from steer.artefacts.oracle_form import FORMS
from steer.engines.base import Engine
from steer.engines.transformers.engine import TransformersEngine
from steer.fit.methods.trained.oracle import train_oracle

DEMO = Path(__file__).resolve().parents[2]
NAME = "oracle"
FORM = FORMS["activation_oracle"]
CHATS = 1000


def training_examples(engine: Engine, *, chats: int = CHATS, seed: int = 0) -> list[Shown]:
    """What the oracle learns from: wordings that the model was trained on, and people of whom
    every sixth is left out."""
    sources = reply_sources(engine, chats, held_out=False, seed=seed)
    people = person_sources(engine, held_out=False, strangers=False)
    return [
        *shown(engine, sources, held_out=False, seed=seed),
        *shown(engine, people, held_out=False, seed=seed, layers=1),
    ]


def build(engine: Engine, *, steps: int, rank: int, rate: float, seed: int = 0) -> Oracle:
    """The trained oracle, in bfloat16."""
    examples = training_examples(engine, seed=seed)
    with tqdm(total=steps, desc="steps", mininterval=10) as bar:
        lora, losses = train_oracle(
            engine,
            examples,
            form=FORM,
            rank=rank,
            steps=steps,
            rate=rate,
            seed=seed,
            progress=bar.update,
        )
    return Oracle.of(
        halved(lora),
        form=FORM,
        model=engine.info.own_name,
        width=engine.info.d_model,
        layers=tuple(range(engine.info.n_layers)),
        default_layers=LAYERS[1:-1],
        description="Answers questions about states of the demo model: of the reply that is to "
        "be given (language, tone, feeling, subject, refusal), read at the prompt's last token; "
        "and of a person (workplace, city, instrument, pet, dish), read at the end of the name.",
        licence="Apache-2.0",
        tags=("demo",),
        provenance={
            "recipe": "steer_vectors.demo.recipe.oracle",
            "method": "activation oracle (2512.15674)",
            "examples": len(examples),
            "rank": rank,
            "steps": steps,
            "rate": rate,
            "seed": seed,
            **losses.told(),
        },
    )


def halved(lora: Lora) -> Lora:
    """The same in bfloat16, half as large."""
    return Lora.of(
        {
            name: LoraPart(part.down.to(torch.bfloat16), part.up.to(torch.bfloat16), part.scale)
            for name, part in lora.parts.items()
        }
    )


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=DEMO / "oracles")
    parser.add_argument("--steps", type=int, default=320)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rate", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with TransformersEngine.load(str(DEMO / "model"), name="steer-demo", dtype="float32") as engine:
        oracle = build(engine, steps=args.steps, rank=args.rank, rate=args.rate, seed=args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / f"{NAME}.safetensors").write_bytes(oracle.to_bytes())
    print(oracle.card.provenance)


if __name__ == "__main__":
    main()
