"""The groups of measures, and the demo model they are run on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from steer_vectors.demo.recipe.evaluation.ceilings import ceilings
from steer_vectors.demo.recipe.evaluation.checks import Check
from steer_vectors.demo.recipe.evaluation.demo import Demo
from steer_vectors.demo.recipe.evaluation.dictionary import dictionary
from steer_vectors.demo.recipe.evaluation.extraction import extraction
from steer_vectors.demo.recipe.evaluation.lens import lens
from steer_vectors.demo.recipe.evaluation.patchscopes import patchscopes
from steer_vectors.demo.recipe.evaluation.recall import facts
from steer_vectors.demo.recipe.evaluation.refusal import refusal
from steer_vectors.demo.recipe.evaluation.relational import relational
from steer_vectors.demo.recipe.evaluation.steering import doses, vectors
from steer_vectors.demo.recipe.evaluation.text import text
from steer_vectors.demo.recipe.library.bench import load_engine

GROUPS: Mapping[str, tuple[Callable[[Demo], Iterable[Check]], ...]] = {
    "facts": (facts,),
    "ceilings": (ceilings,),
    "text": (text,),
    "vectors": (vectors,),
    "doses": (doses,),
    "refusal": (refusal,),
    "sae": (dictionary,),
    "relations": (relational,),
    "lens": (lens,),
    "patchscope": (patchscopes, extraction),
}


@contextmanager
def opened(folder: Path, count: int) -> Iterator[Demo]:
    """The demo model in a folder, loaded."""
    with load_engine(folder / "model") as engine:
        yield Demo(engine, folder, count)
