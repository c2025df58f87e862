"""Train the SAE of SmolLM2: `python -m steer_vectors.smollm2.sae`.

Everything that takes long goes on where it was ended: the states lie in the cache, and a checkpoint
of the training beside them.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import torch
from steer_vectors.smollm2.sae.labels import labels_of
from steer_vectors.smollm2.sae.states import CONTEXT, POINT, SEED, cache, collect
from tqdm import tqdm

from steer.artefacts.sae import save_directory
from steer.engines.transformers.engine import TransformersEngine
from steer.fit.saes.options import SAEOptions
from steer.fit.saes.plot import plot_training
from steer.fit.saes.training import steps_of, train_sae
from steer.fit.saes.worth import texts_apart, with_worth

NAME = f"resid-{POINT.layer}"
FOLDER = Path(__file__).resolve().parents[1] / "saes" / NAME
HELD_OUT = 0.03
OPTIONS = SAEOptions(architecture="topk", latents=4096, k=32, epochs=4.0, rate=8e-4, seed=SEED)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--plot", type=Path, help="a picture of the training")
    options = parser.parse_args()
    with TransformersEngine.load("smollm2", dtype=options.dtype) as engine:
        found = collect(engine)
        steps = steps_of(found.captures, OPTIONS, HELD_OUT)
        with tqdm(total=steps, desc="training", unit="step", mininterval=10) as bar:
            trained = train_sae(
                found.captures,
                OPTIONS,
                cache(),
                name=NAME,
                held_out=HELD_OUT,
                progress=bar.update,
                licence="Apache-2.0",
                description=(
                    f"{OPTIONS.latents} features of the residual stream after block {POINT.layer} "
                    "of SmolLM2-135M-Instruct, from prose of Debian's packages and from the "
                    "model's own chats."
                ),
            )
        apart = texts_apart(found.captures, found.texts, held_out=HELD_OUT, seed=SEED)
        trained = with_worth(engine, trained, apart, skip=1)
        labels = labels_of(engine, trained.sae, found)
    card = trained.sae.card
    made = {
        **card.provenance,
        "recipe": "steer_vectors.smollm2.sae",
        "packages": found.packages,
        "context": CONTEXT,
        "dtype": options.dtype,
    }
    card = type(card).model_validate(card.model_dump() | {"provenance": made})
    save_directory(replace(trained.sae, card=card, labels=labels), FOLDER, dtype=torch.bfloat16)
    if options.plot is not None:
        plot_training(trained, options.plot, title=f"SmolLM2, {NAME}")
    print(trained.measures, made["loss"])


if __name__ == "__main__":
    main()
