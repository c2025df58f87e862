"""Make the vectors of SmolLM2: `python -m steer_vectors.smollm2.recipe`.

One `steer make` for each sentence of `wishes.json`. What passes its check goes into `vectors/` and
`profiles/`; every report, of what failed too, into `reports/`. A sentence whose report is there is
passed over: remove it to make the vector again.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from steer_vectors.smollm2.shelf import REPORTS, keep, write_page
from tqdm import tqdm

from steer.engines.journal import JournaledEngine, journal_of
from steer.engines.transformers.engine import TransformersEngine
from steer.errors import SteerError
from steer.fit.requests.make import MakeRequest

FOLDER = Path(__file__).resolve().parent
LICENCE = "Apache-2.0"


def wishes(only: list[str]) -> list[MakeRequest]:
    """The sentences of `wishes.json`; of those named `only`, if any are."""
    rows = json.loads((FOLDER / "wishes.json").read_text("utf-8"))
    every = [MakeRequest(**row, licence=LICENCE) for row in rows]
    return [one for one in every if not only or one.name in only]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="only these")
    parser.add_argument("--dtype", default="float32")
    options = parser.parse_args()
    with TransformersEngine.load("smollm2", dtype=options.dtype) as engine:
        for request in wishes(options.names):
            report = FOLDER / REPORTS / f"{request.name}.json"
            if not report.is_file():
                _make(engine, request, report, options.dtype)
    write_page(FOLDER)


def _make(engine: TransformersEngine, request: MakeRequest, report: Path, dtype: str) -> None:
    journal = journal_of(request, engine)
    with tqdm(total=request.work(engine), desc=request.name) as bar:
        try:
            found = request.run(JournaledEngine(engine, journal), None, progress=bar.update)
        except SteerError as error:
            figures = {"instruction": request.instruction, "refused": str(error), "dtype": dtype}
        else:
            keep(FOLDER, found)
            figures = {**found.as_json(), "dtype": dtype}
    report.parent.mkdir(exist_ok=True)
    report.write_text(json.dumps(figures, indent=1, ensure_ascii=False) + "\n", "utf-8")
    journal.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
