"""Build the demo profiles: ``python -m steer_vectors.demo.recipe.profiles``.

A profile is a spec under a name; each shows one way to use the library, and its description says
what was measured on held-out prompts. Layers and values are chosen on the prompts that vectors were
fitted on. The vectors and the SAE must be there already.
"""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from steer_vectors.demo.recipe.library.bench import DEMO, Bench, add, load_engine, read_vector
from steer_vectors.demo.recipe.library.refusal import guarded, switches, unrefusing
from steer_vectors.demo.recipe.sae.effects import clamp_spec, effects_on
from steer_vectors.demo.recipe.scorers import both, scorer
from steer_vectors.demo.recipe.vectors import DESCRIPTIONS, KINDS
from tqdm import tqdm

from steer.artefacts.control_vector import ControlVector
from steer.artefacts.sae import SAE, load_directory
from steer.fit.data.pairs import Prompt, read_pairs

log = logging.getLogger(__name__)
COMPOSED = (("formal", "french"), ("terse", "german"))
CLAMPED = ("french", "casual")
SAE_NAME = "resid-3"


@dataclass(frozen=True)
class Shelf:
    """What profiles are made of: the model, its vectors by name, its SAE and its prompts."""

    bench: Bench
    vectors: dict[str, ControlVector]
    sae: SAE
    data: Path

    def fitted_on(self, attribute: str, side: str) -> list[Prompt]:
        """The prompts of one side of an attribute's pairs."""
        pairs = read_pairs(self.data / f"{attribute}.jsonl")
        return [getattr(pair, side) for pair in pairs.items]


def profile(name: str, spec: dict[str, Any], description: str) -> dict[str, Any]:
    """A profile as it is stored."""
    return {"name": name, "spec": spec, "description": description}


def of_attributes(shelf: Shelf) -> Iterator[dict[str, Any]]:
    """Each vector as its card says."""
    for kind, values in KINDS.items():
        for name in values if kind != "refusal" else ():
            found = shelf.vectors[name].card.provenance["held_out"]
            assert isinstance(found, dict)
            share = _percent(found["success_and_valid"])
            told = f"{DESCRIPTIONS[name]} Held out: {share} of answers do, in valid text."
            yield profile(name, {"interventions": [add(name)]}, told)


def compositions(shelf: Shelf) -> Iterator[dict[str, Any]]:
    """Two vectors at once, each as its card says."""
    for first, second in COMPOSED:
        spec = {"interventions": [add(first), add(second)]}
        plan = shelf.bench.compiled(spec, [*shelf.vectors.values()])
        prompts = shelf.bench.held_out(first)
        (found,) = shelf.bench.measure(prompts, [plan], both(first, second))
        told = (
            f"Composition: two vectors at once, {first} and {second} "
            f"({_percent(found.both)} of held-out prompts have both)."
        )
        yield profile(f"{first}-{second}", spec, told)


def clamps(shelf: Shelf) -> Iterator[dict[str, Any]]:
    """One latent of the SAE, held up at the last prompt token."""
    best = {one.attribute: one for one in effects_on(shelf.sae)}
    for attribute in CLAMPED:
        latent = best[attribute].latent
        spec = clamp_spec(latent, best[attribute].value, sae=shelf.sae.card.name)
        plan = shelf.bench.compiled(spec, [], [shelf.sae])
        (found,) = shelf.bench.measure(shelf.bench.held_out(attribute), [plan], scorer(attribute))
        told = (
            f"Clamping: latent {latent} of the SAE is held up, and answers "
            f"turn {attribute} ({_percent(found.both)} of held-out prompts)."
        )
        yield profile(f"clamped-{attribute}", spec, told)


def of_refusal(shelf: Shelf) -> Iterator[dict[str, Any]]:
    """Refusal switched off and on, ablated, and as a gate."""
    built = switches(shelf.bench, shelf.vectors, shelf.fitted_on)
    built.append(unrefusing(shelf.bench, shelf.vectors, shelf.fitted_on))
    built.append(guarded(shelf.bench, shelf.vectors))
    for name, spec, told in built:
        yield profile(name, spec, told)


PARTS: tuple[Callable[[Shelf], Iterator[dict[str, Any]]], ...] = (
    of_attributes,
    compositions,
    clamps,
    of_refusal,
)


def _percent(share: Any) -> str:
    return f"{share or 0.0:.0%}"


def write_profile(folder: Path, one: dict[str, Any]) -> None:
    """Writes ``<name>.json``."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(one, indent=2, ensure_ascii=False) + "\n"
    (folder / f"{one['name']}.json").write_text(text, "utf-8")


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description="Build the demo profiles.")
    parser.add_argument("--demo", type=Path, default=DEMO)
    parser.add_argument("--out", type=Path, help="folder to write to (default: DEMO/profiles)")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    vectors = {one.stem: read_vector(one) for one in args.demo.glob("vectors/*.safetensors")}
    folder = args.demo / "saes" / SAE_NAME
    sae = load_directory(folder)
    sae = replace(sae, card=sae.card.model_copy(update={"name": folder.name}))
    with load_engine(args.demo / "model") as engine:
        shelf = Shelf(Bench(engine, args.demo), vectors, sae, args.demo / "data")
        for part in tqdm(PARTS, desc="profiles"):
            for one in part(shelf):
                log.info("%s: %s", one["name"], one["description"])
                write_profile(args.out or args.demo / "profiles", one)


if __name__ == "__main__":
    main()
