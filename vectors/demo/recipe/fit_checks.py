"""Proposed properties of fitting methods: ``python -m steer_vectors.demo.recipe.fit_checks``.

- *composition*: two vectors at once on one layer, as plain sums and with ``compose: "orthogonal"``.
  Does an attribute's rate move less when another vector is added?
- *nmf*: a dictionary of last-prompt-token states finds a concept for each language or register by
  itself; does ``swap`` from one concept to the other flip the answer's attribute?
- *refined*: is the answer's attribute more linear in the strength (R² of the dose-response) for
  vectors refined by the SAE than for plain ones?

Seeds draw the pairs that are fitted on (half of them). Intervals are 95 % t intervals over seeds.
"""

from __future__ import annotations

import argparse
import json
import logging
import random
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from steer_vectors import LIBRARY
from steer_vectors.demo.recipe.data import asked_of
from steer_vectors.demo.recipe.library.bench import LAST, Bench, where_json
from steer_vectors.demo.recipe.relations.comparison import interval
from steer_vectors.demo.recipe.scorers import scorer

from steer.artefacts.control_vector import ControlVector
from steer.artefacts.library import MemoryLibrary
from steer.artefacts.sae.saelens import load_directory
from steer.engines.transformers.engine import TransformersEngine
from steer.fit import Pair, PairSet, fit, fit_nmf, read_pairs
from steer.fit.data.pairs import Messages, Prompt
from steer.fit.methods.dictionaries.dictionary import Dictionary
from steer.fit.states import make_reading, read_rows

log = logging.getLogger(__name__)
DEMO = LIBRARY / "demo"
TOGETHER = (
    ("french", "formal", 2),
    ("french", "casual", 2),
    ("german", "formal", 2),
    ("german", "casual", 2),
    ("formal", "refusal", 5),
    ("casual", "refusal", 5),
    ("french", "german", 1),
)
"""Two attributes and a layer. The first four hardly overlap, the last three do."""
SWAPS = (("english", "french"), ("english", "german"), ("french", "german"), ("german", "french"))
STRENGTHS = (0.2, 0.35, 0.5, 0.75, 1.0, 1.5)
REFINED = ("french", "german", "formal", "casual", "refusal", "negative")
DOSES = tuple(n / 8 for n in range(13))


def half(attribute: str, seed: int) -> PairSet:
    """Half of an attribute's pairs."""
    pairs = list(read_pairs(DEMO / "data" / f"{attribute}.jsonl").items)
    random.Random(f"{seed}/{attribute}").shuffle(pairs)
    return PairSet.of(pairs[: len(pairs) // 2])


def composition(bench: Bench, seeds: Sequence[int], prompts: int) -> dict[str, Any]:
    """For each pair (A, B): how far A's rate under A + B is from its rate under A alone, and how
    many answers have both; the cosine of what is added."""
    rows: dict[str, dict[str, list[float]]] = {}
    for (first, second, layer), seed in product(TOGETHER, seeds):
        vectors = [
            fit(bench.engine, half(name, seed), name=name, layers=[layer])
            for name in (first, second)
        ]
        items = [
            {"kind": "add", "vector": name, "strength": 1.0, "where": where_json(LAST)}
            for name in (first, second)
        ]
        specs: dict[str, dict[str, Any]] = {
            "first": {"interventions": items[:1]},
            "second": {"interventions": items[1:]},
            "plain": {"interventions": items},
            "orthogonal": {"interventions": items, "compose": "orthogonal"},
        }
        plans = [bench.compiled(spec, vectors) for spec in specs.values()]
        asked = bench.held_out(first)[:prompts]
        rates = {
            name: [one.score for one in bench.measure(asked, plans, scorer(name))]
            for name in (first, second)
        }
        row = rows.setdefault(f"{first}+{second}", {})
        row.setdefault("cosine", []).append(abs(vectors[0].cosine(vectors[1])[layer]))
        for way, place in (("plain", 2), ("orthogonal", 3)):
            moved = abs(rates[first][place] - rates[first][0])
            moved += abs(rates[second][place] - rates[second][1])
            row.setdefault(f"moved, {way}", []).append(moved / 2)
            row.setdefault(f"rate, {way}", []).append(
                (rates[first][place] + rates[second][place]) / 2
            )
    overall = {
        key: interval([mean(row[key][n] for row in rows.values()) for n in range(len(seeds))])
        for key in next(iter(rows.values()))
    }
    by_pair = {pair: {key: mean(v) for key, v in row.items()} for pair, row in rows.items()}
    return {"overall": overall, "by pair": by_pair}


def language_prompts(seed: int) -> dict[str, list[Prompt]]:
    """Prompts that ask for each language, and plain ones: what the dictionary reads."""
    found: dict[str, list[Prompt]] = {}
    for name in ("french", "german"):
        pairs: Sequence[Pair] = half(name, seed).items
        found[name] = [pair.positive for pair in pairs]
        found.setdefault("english", []).extend(pair.negative for pair in pairs[::2])
    return found


def concepts(
    bench: Bench, dictionary: Dictionary, prompts: dict[str, list[Prompt]], layer: int
) -> dict[str, ControlVector]:
    """The component that names each language: the one whose projection on its prompts exceeds that
    on the others most. Labels are used here alone, not to find the dictionary."""
    reading = make_reading(bench.engine, layers=[layer])
    means = {
        name: read_rows(bench.engine, given, reading)[layer].mean(0)
        for name, given in prompts.items()
    }
    found = {}
    for name in prompts:
        rest = torch.stack([means[other] for other in prompts if other != name]).mean(0)
        best = int((dictionary.components @ (means[name] - rest)).argmax())
        found[name] = dictionary.vector(best, name=name)
    return found


def nmf(bench: Bench, seeds: Sequence[int], prompts: int) -> dict[str, Any]:
    """For each swap, the share of held-out answers that have the target's attribute.

    Prompts ask for the language that is removed; layer and strength are chosen, over all swaps, on
    the prompts that were fitted on.
    """
    flips: dict[str, list[float]] = {f"{a} → {b}": [] for a, b in SWAPS}
    chosen = []
    for seed in seeds:
        given = language_prompts(seed)
        tried: dict[tuple[int, float], float] = {}
        named: dict[int, dict[str, ControlVector]] = {}
        for layer in (1, 2, 3):
            read = [prompt for group in given.values() for prompt in group]
            dictionary = fit_nmf(bench.engine, read, layer=layer, components=6, seed=seed)
            named[layer] = concepts(bench, dictionary, given, layer)
            for strength in STRENGTHS:
                tried[layer, strength] = mean(
                    flip(bench, named[layer], swap, strength, given[swap[0]][:16]) for swap in SWAPS
                )
        layer, strength = max(tried, key=tried.__getitem__)
        chosen.append({"layer": layer, "strength": strength, "fitted": tried[layer, strength]})
        for a, b in SWAPS:
            asked = instructed(bench, a)[:prompts]
            flips[f"{a} → {b}"].append(flip(bench, named[layer], (a, b), strength, asked))
    by_seed = [mean(values[n] for values in flips.values()) for n in range(len(seeds))]
    shares = {name: mean(values) for name, values in flips.items()}
    return {"flips": shares, "mean": interval(by_seed), "chosen": chosen}


def instructed(bench: Bench, language: str) -> list[Messages]:
    """Held-out questions that ask for `language`; plain ones for English."""
    plain = bench.held_out("french")
    if language == "english":
        return plain
    asks = {"french": "Answer in French.", "german": "Answer in German."}
    return [[{"role": "system", "content": asks[language]}, *prompt] for prompt in plain]


def flip(
    bench: Bench,
    named: dict[str, ControlVector],
    swap: tuple[str, str],
    strength: float,
    prompts: Sequence[Prompt],
) -> float:
    """The share of valid answers in the target's language after the swap."""
    item = {
        "kind": "swap",
        "remove": swap[0],
        "add": swap[1],
        "strength": strength,
        "where": where_json(LAST),
    }
    plan = bench.compiled({"interventions": [item]}, list(named.values()))
    (found,) = bench.measure(prompts, [plan], scorer(swap[1]))
    return found.both or 0.0


def r_squared(x: Sequence[float], y: Sequence[float]) -> float | None:
    """Of a line through y over x; None where y does not vary."""
    a, b = (torch.tensor(v, dtype=torch.float64) - mean(v) for v in (x, y))
    return None if not bool(b.any()) else float((a @ b) ** 2 / ((a @ a) * (b @ b)))


def refined(bench: Bench, seeds: Sequence[int], prompts: int) -> dict[str, Any]:
    """R² of the rate over the strength, plain and refined, on the SAE's layer."""
    sae = load_directory(DEMO / "saes" / "resid-3")
    library = MemoryLibrary(saes={"sae": sae})
    rows = []
    for attribute, seed in product(REFINED, seeds):
        pairs = half(attribute, seed)
        asked = bench.held_out(asked_of(attribute))[:prompts]
        row: dict[str, Any] = {"attribute": attribute, "seed": seed}
        for way, options in (
            ("plain", {"layers": [sae.layer]}),
            ("refined", {"refine": {"sae": "sae"}, "library": library}),
        ):
            vector = fit(bench.engine, pairs, name="v", method="pca", **options)
            item = {"kind": "add", "vector": "v", "where": where_json(LAST)}
            plans = [bench.plan(vector, {**item, "strength": dose}) for dose in DOSES]
            rates = [one.score for one in bench.measure(asked, plans, scorer(attribute))]
            row[way] = r_squared(DOSES, rates)
            row[f"{way}, highest rate"] = max(rates)
        rows.append(row)
    decided = [r for r in rows if r["plain"] is not None and r["refined"] is not None]
    at_least = mean(float(r["refined"] >= r["plain"]) for r in decided) if decided else None
    return {"refined at least as linear": at_least, "of": len(decided), "rows": rows}


PARTS = {"composition": composition, "nmf": nmf, "refined": refined}


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description="Measure proposed properties of fitting methods.")
    parser.add_argument("--only", choices=[*PARTS], nargs="+", default=[*PARTS])
    parser.add_argument("--seeds", type=int, default=3, choices=range(2, 9))
    parser.add_argument("--prompts", type=int, default=48, help="held-out prompts of each figure")
    parser.add_argument("--json", type=Path, help="write every figure here")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    report = {}
    with TransformersEngine.load(DEMO / "model", name="steer-demo", rows=128) as engine:
        bench = Bench(engine)
        for part in args.only:
            report[part] = PARTS[part](bench, range(args.seeds), args.prompts)
            print(json.dumps({part: report[part]}, indent=1), flush=True)
    if args.json:
        args.json.write_text(json.dumps(report, indent=2) + "\n", "utf-8")


if __name__ == "__main__":
    main()
