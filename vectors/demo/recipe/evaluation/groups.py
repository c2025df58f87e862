"""The groups of measures, and the demo model they are run on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from steer_vectors.demo.recipe.bench import load_engine

from .ceilings import ceilings
from .checks import Check
from .demo import Demo
from .dictionary import dictionary
from .extraction import extraction
from .lens import lens
from .patchscopes import patchscopes
from .recall import facts
from .refusal import refusal
from .relational import relational
from .steering import doses, vectors
from .text import text

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
