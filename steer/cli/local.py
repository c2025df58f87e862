"""What commands work on: a model run in this process, and a registry folder."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from steer.artefacts.library import Library
    from steer.engines.transformers.engine import TransformersEngine
    from steer.fit.bulk.kept import StatesEngine
    from steer.plan.cache import PlanCache
    from steer.registry.registry import Registry

DEMO_MODEL = "steer-demo"

ModelOption = Annotated[
    str,
    typer.Option(
        "--model", "-m", help="steer-demo, smollm2, a GGUF file, a model folder, or a hub name."
    ),
]
NamesOption = Annotated[
    str | None,
    typer.Option(
        "--model", "-m", help="Whose names are meant; by default the newest of all models."
    ),
]
RegistryOption = Annotated[
    str | None,
    typer.Option(
        "--registry",
        help="The registry's folder or URL; by default STEER_REGISTRY, or ~/.local/share/steer.",
    ),
]
DeviceOption = Annotated[
    str | None, typer.Option("--device", help="Such as cpu or cuda:0; by default a GPU if any.")
]
DtypeOption = Annotated[
    str | None,
    typer.Option("--dtype", help="Such as float32 or bfloat16; by default float32 on a CPU."),
]


def registry_folder(chosen: str | None) -> str:
    """The place to use: what was chosen, here or for all commands by STEER_REGISTRY, or else the
    user's own data directory."""
    place = chosen if chosen is not None else os.environ.get("STEER_REGISTRY")
    return place or str(Path.home() / ".local" / "share" / "steer")


@contextmanager
def running_engine(
    model: str, *, device: str | None = None, dtype: str | None = None, bulk: bool = False
) -> Iterator[TransformersEngine]:
    """The model in this process, started; stopped at the end. For work that comes in `bulk`, a
    CPU's processors are shared by two replicas."""
    quiet()
    import torch

    from steer.engines.transformers.checkpoints.placing import chosen_device
    from steer.engines.transformers.engine import TransformersEngine
    from steer.engines.transformers.replicas.engine import ReplicatedEngine

    device = chosen_device(device)
    shared = bulk and device == "cpu" and torch.get_num_threads() > 1
    kind = ReplicatedEngine if shared else TransformersEngine
    with kind.load(model, device=device, dtype=dtype) as engine:
        yield engine


def kept_states(folder: Path, model: str) -> StatesEngine:
    """The states of `model` in the folder of a capture, in place of the model. Raises
    `SteerError`."""
    quiet()
    from steer.engines.transformers.checkpoints.found import find_model
    from steer.engines.transformers.checkpoints.loading import load_tokenizer
    from steer.errors import SteerError
    from steer.fit.bulk.kept import StatesEngine

    found = find_model(model)
    kept = StatesEngine(folder, load_tokenizer(found.location))
    if not kept.info.is_called(found.own_name):
        raise SteerError(
            f"{str(folder)!r} holds states of {kept.info.name!r}, and --model is {model!r}: name "
            "the model that was captured",
            code="states_not_kept",
        )
    return kept


@contextmanager
def open_registry(chosen: str | None, model: str | None = None) -> Iterator[Registry]:
    """The registry in its place; for a `model` read for that one, with what is shipped for it."""
    from steer.registry.location import chosen_catalogue
    from steer.registry.registry import Registry

    catalogue = chosen_catalogue(os.environ)
    with Registry.open(registry_folder(chosen), catalogue=catalogue) as registry:
        if model is None:
            yield registry
            return
        from steer.engines.transformers.checkpoints.shipped import add_shipped, names_of

        add_shipped(registry, model)
        yield registry.for_model(*names_of(model))


def plans(engine: TransformersEngine, library: Library) -> PlanCache:
    """Compiles specs for `engine` with artefacts from `library`."""
    from steer.engines.plans import plans_of

    return plans_of(engine, library)


def quiet() -> None:
    """Keeps transformers' own bars and notices off the terminal; errors still show."""
    from transformers.utils import logging as notices

    notices.set_verbosity_error()  # type: ignore[no-untyped-call]
    notices.disable_progress_bar()  # type: ignore[no-untyped-call]
    logging.getLogger("steer").setLevel(logging.WARNING)
