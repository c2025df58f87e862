"""Pictures of the demo: ``python -m steer_vectors.demo.recipe.figures --out docs/images``.

``demo-dose-response.png`` shows what strength does, ``demo-where.png`` at which layers and tokens
steering works. ``--json FILE`` keeps the figures' data, ``--redraw FILE`` draws it again without a
model. Prompts are the first of the held-out file and decoding is greedy: nothing is drawn at
random.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from matplotlib.figure import Figure
from pydantic import BaseModel, ConfigDict
from steer_vectors.demo.recipe.figures.dose import STEPS, DosePanel, draw_dose, measure_dose
from steer_vectors.demo.recipe.figures.where import (
    WhereMap,
    answers_asked,
    draw_where,
    measure_where,
)
from steer_vectors.demo.recipe.library.bench import DEMO, Bench, load_engine, read_vector
from steer_vectors.demo.recipe.vectors import DESCRIPTIONS
from tqdm import tqdm

from steer.artefacts.control_vector import ControlVector
from steer.fit import read_pairs

ATTRIBUTES = tuple(DESCRIPTIONS)
ONE_OF_EACH_KIND = ("french", "formal", "negative", "food", "terse", "refusal")
PROMPTS = 48
DPI = 100


class Figures(BaseModel):
    """The data of both pictures."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    dose: tuple[DosePanel, ...]
    where: tuple[WhereMap, ...]


def measure_figures(prompts: int) -> Figures:
    """Both pictures' data, from the shipped model, vectors and prompts."""
    with load_engine() as engine:
        bench = Bench(engine)
        total = len(ATTRIBUTES) * (STEPS + 1) * prompts
        with tqdm(total=total, desc="dose and response", unit=" answers") as bar:
            dose = [measure_dose(bench, shipped(a), prompts, bar.update) for a in ATTRIBUTES]
        total = len(ONE_OF_EACH_KIND) * answers_asked(engine.info.n_layers, prompts)
        where = []
        with tqdm(total=total, desc="layers and positions", unit=" answers") as bar:
            for attribute in ONE_OF_EACH_KIND:
                pairs = read_pairs(DEMO / "data" / f"{attribute}.jsonl")
                development = [pair.negative for pair in pairs.items]
                where.append(
                    measure_where(bench, shipped(attribute), development, prompts, bar.update)
                )
    return Figures(dose=tuple(dose), where=tuple(where))


def shipped(attribute: str) -> ControlVector:
    """The demo's vector of that name."""
    return read_vector(DEMO / "vectors" / f"{attribute}.safetensors")


def write_figures(figures: Figures, out: Path) -> list[Path]:
    """Draws both pictures into the folder `out` and returns their paths."""
    out.mkdir(parents=True, exist_ok=True)
    drawn = {
        "demo-dose-response.png": draw_dose(figures.dose),
        "demo-where.png": draw_where(figures.where),
    }
    for name, figure in drawn.items():
        write_png(figure, out / name)
    return [out / name for name in drawn]


def write_png(figure: Figure, path: Path) -> None:
    """Without the version of the library that drew it: the same data gives the same bytes."""
    figure.savefig(path, dpi=DPI, metadata={"Software": None}, pil_kwargs={"optimize": True})


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description="Draw what steers the demo model, and where.")
    parser.add_argument("--out", type=Path, default=Path("docs/images"))
    parser.add_argument("--prompts", type=int, default=PROMPTS, help="held-out prompts per cell")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--json", type=Path, help="also write the figures' data here")
    source.add_argument("--redraw", type=Path, help="draw this data; measure nothing")
    args = parser.parse_args()
    if args.prompts < 1:
        parser.error(f"--prompts ({args.prompts}) must be at least 1")
    if args.redraw is not None:
        figures = Figures.model_validate_json(args.redraw.read_text("utf-8"))
    else:
        figures = measure_figures(args.prompts)
    if args.json is not None:
        args.json.write_text(figures.model_dump_json(indent=1) + "\n", "utf-8")
    for path in write_figures(figures, args.out):
        print(path)
