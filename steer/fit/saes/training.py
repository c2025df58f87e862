"""From folders of captured states to an SAE, with what it is worth."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from jaxtyping import Float
from torch import Tensor

from steer.artefacts.sae.base import SAE
from steer.fit.bulk.shards import CapturedStates
from steer.fit.data.prompt import positions_json
from steer.fit.saes.measures import SAEMeasures, measure
from steer.fit.saes.options import SAEOptions
from steer.fit.saes.rows import TrainingRows
from steer.fit.saes.trainer import Predictions, Trainer, units_of
from steer.fit.states import Progress

CHECKPOINT_STEPS = 100
MEASURED_ROWS = 1 << 14
CHECKPOINT = "training.safetensors"


@dataclass(frozen=True)
class TrainedSAE:
    """An SAE, its measures on a `sample` of states that were held out, and the curve of its
    training: rows of step, rows seen, unexplained share, active latents, dead latents, rate."""

    sae: SAE
    measures: SAEMeasures
    sample: Float[Tensor, "n d"]
    curve: Sequence[tuple[float, ...]]


def steps_of(captures: Sequence[CapturedStates], options: SAEOptions, held_out: float) -> int:
    """How many steps a training takes."""
    rows = TrainingRows.of(captures, held_out=held_out, seed=options.seed)
    return rows.steps(options.epochs, options.batch)


def train_sae(
    captures: Sequence[CapturedStates],
    options: SAEOptions,
    folder: Path,
    *,
    name: str,
    held_out: float = 0.05,
    text_labels: Sequence[Float[Tensor, "texts c"]] | None = None,
    predictions: Predictions | None = None,
    device: str | None = None,
    checkpoint_steps: int = CHECKPOINT_STEPS,
    progress: Progress | None = None,
    **card: Any,
) -> TrainedSAE:
    """Trains an SAE on `captures` of one hook point; `folder` holds the checkpoint from which one
    that was ended goes on. `progress` is told of steps; `device` is where the arithmetic is done
    (None: on the processor).

    `text_labels` of each capture's texts condition the first latents. Raises `SteerError`.
    """
    rows = TrainingRows.of(captures, held_out=held_out, seed=options.seed, text_labels=text_labels)
    units = units_of(rows, options.seed)
    trainer = Trainer(rows, units, options, predictions=predictions, device=device)
    key = _key(captures, options, held_out, text_labels)
    checkpoint = folder / CHECKPOINT
    trainer.restore(checkpoint, key)
    if progress is not None:
        progress(trainer.done)
    while trainer.done < trainer.steps:
        trainer.step()
        if trainer.done % checkpoint_steps == 0 or trainer.done == trainer.steps:
            trainer.save(checkpoint, key)
        if progress is not None:
            progress(1)
    measured = rows.sample(rows.held_out, MEASURED_ROWS, options.seed)
    found = measure(trainer.network.as_sae(units, captures[0].point), measured)
    provenance = {
        "method": f"sae-{options.architecture}",
        "rows": len(rows.trained),
        "captures": [one.card.data for one in captures],
        **_selected(captures),
        **asdict(options),
        "steps": trainer.steps,
        "held_out_share": held_out,
        "held_out": found.model_dump(),
    }
    fields = {"name": name, "model": captures[0].card.model, "provenance": provenance, **card}
    sae = trainer.network.as_sae(units, captures[0].point, **fields)
    return TrainedSAE(sae, found, measured, trainer.curve)


def _selected(captures: Sequence[CapturedStates]) -> dict[str, Any]:
    """Which tokens it was trained on, where these were selected."""
    if not any(one.card.where for one in captures):
        return {}
    return {"where": [positions_json(one.card.where) for one in captures]}


def _key(
    captures: Sequence[CapturedStates],
    options: SAEOptions,
    held_out: float,
    labels: Sequence[Tensor] | None,
) -> str:
    """What the training is of: one of other labels does not go on from its checkpoint."""
    what = [
        [one.card.data for one in captures],
        asdict(options),
        held_out,
        None if labels is None else [one.nan_to_num(-1.0).tolist() for one in labels],
    ]
    return hashlib.sha256(json.dumps(what).encode()).hexdigest()
