"""Specs and plans that must keep their names: fingerprints and files, to the letter.

Receipts, logs, profiles and the plan store of other processes hold these names. The artefacts are
made of whole numbers, and each row's norm is 8, so that the files' bytes are the same on every
machine. A profile that is tuned anew gets new lines:
`PYTHONPATH=tests/support python tests/unit/plan/test_golden.py`.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from artefacts import EVERYTHING, calibration, shape_of
from demo_specs import LAYERS, SPECS, VOCABULARY, WIDTH, add, one
from torch import Tensor

from steer.artefacts.adapter_parts import EditRows
from steer.artefacts.affine import AffineMap, Channels
from steer.artefacts.control_vector import ControlVector, LayerMeasure, LowRankAdapter
from steer.artefacts.detection import Detection
from steer.artefacts.detector import Detector
from steer.artefacts.library import MemoryLibrary
from steer.artefacts.sae.base import SAE
from steer.model import HookPoint
from steer.plan.cache import PlanCache
from steer.plan.file import dump_plan
from steer.spec import Where, parse_spec

PROFILES = Path(__file__).parents[3] / "vectors" / "demo" / "profiles"
GOLDEN = Path(__file__).with_name("golden_plans.json")
LATENTS = 1024


def row(seed: str) -> Tensor:
    """`[192]`: 64 ones with signs drawn from `seed`, the rest zero."""
    drawn = hashlib.sha256(seed.encode()).digest()
    found = torch.zeros(WIDTH)
    for n in range(WIDTH // 3):
        found[3 * n + drawn[-1] % 3] = 1.0 if drawn[n // 8] >> n % 8 & 1 else -1.0
    return found


def vector(name: str, **card: Any) -> ControlVector:
    rows = {layer: row(f"{name} {layer}") for layer in range(LAYERS)}
    measures = {layer: LayerMeasure(positive=1.5, negative=-0.5) for layer in rows}
    return ControlVector.of(rows, name=name, measures=measures, **card)


def pattern(*shape: int) -> Tensor:
    """Whole numbers from -2 to 2."""
    count = torch.Size(shape).numel()
    return (torch.arange(count) * 7 % 11 % 5 - 2).float().reshape(shape)


def sae(architecture: str) -> SAE:
    return SAE.of(
        architecture,
        W_enc=pattern(WIDTH, LATENTS),
        b_enc=pattern(LATENTS),
        W_dec=pattern(LATENTS, WIDTH),
        b_dec=pattern(WIDTH),
        threshold=pattern(LATENTS).abs() if architecture == "jumprelu" else None,
        k=8 if architecture == "topk" else None,
        layer=2,
        default_where=Where(phases=("generation",)) if architecture == "standard" else None,
    )


def adapter() -> LowRankAdapter:
    parts = {n: (torch.eye(3, WIDTH), pattern(3, WIDTH), pattern(3)) for n in (1, 4)}
    return LowRankAdapter.of(parts, default_where=Where(positions=((1, None),)))


def rectified() -> LowRankAdapter:
    part = EditRows(pattern(2, WIDTH), pattern(2, WIDTH), pattern(2), torch.zeros(2))
    return LowRankAdapter.of({2: part})


def channels() -> AffineMap:
    row = pattern(WIDTH)
    return AffineMap.of({n: Channels(row, row, row - 1, row + 1) for n in (1, 3)})


def calibrated() -> ControlVector:
    last = Where(phases=("prompt",), positions=((-1, None),))
    found = vector("calibrated", default_layers=(1,), default_where=last)
    card = found.card.model_copy(update={"calibration": calibration(where=last)})
    return ControlVector(found.directions, card)


NAMES = (
    "v0 v1 v2 v3 casual food formal french german music negative positive refusal sports terse "
    "verbose weather"
)
LIBRARY = MemoryLibrary(
    {
        **{name: vector(name, default_layers=(3, 4)) for name in NAMES.split()},
        "quiet": vector("quiet", default_strength=0.25, default_where=Where(tokens=(3, 9))),
        "calibrated": calibrated(),
    },
    {**{name: sae(name) for name in ("standard", "jumprelu", "topk")}, "resid-3": sae("topk")},
    {"reft": adapter(), "rectified": rectified()},
    maps={"map": channels()},
    detectors={
        f"d{n}": Detector.of(pattern(WIDTH), layer=n % 2, bias=0.5, threshold=2.0, detection=how)
        for n, how in enumerate(
            (None, None, Detection(last=3), Detection(pooling="mean", last=4)),
        )
    },
)
INLINE = {"data": base64.b64encode(vector("").to_bytes()).decode(), "layer": 1}
MORE: dict[str, dict[str, Any]] = {
    "a card's strength and tokens": one({"kind": "add", "vector": "quiet"}),
    "a concept": one({"kind": "concept", "sae": "topk", "text": "sea", "contrast": "land"}),
    "a strength by its divergence": one(
        {"kind": "add", "vector": "calibrated", "strength": {"kl": 0.1}}
    ),
    "the calibrated strength": one({"kind": "add", "vector": "calibrated", "strength": "auto"}),
    "a vector in the request": one(
        {"kind": "add", "vector": INLINE, "layers": [1]},
        when={"vector": INLINE, "above": 0.1, "layer": 0},
    ),
    "a class mean": one(
        {"kind": "project", "vector": "refusal", "value": "negative", "layers": [2]}
    ),
    "nothing": one(add("v0", strength=0)),
    "two gates": {
        "interventions": [
            add("v0", when={"vector": "v1", "above": 0.0, "layer": 0}),
            {"kind": "clamp", "sae": "standard", "features": [2], "value": 1.0},
        ],
        "when": {"vector": "v2", "below": 0.2, "layer": 0, "scope": "token"},
        "norm": "preserve",
    },
}


def encode_text(text: str, point: HookPoint) -> Tensor:
    return pattern(2, WIDTH) + len(text)


def every_spec() -> dict[str, dict[str, Any]]:
    profiles = {
        f"profile {path.stem}": json.loads(path.read_text())["spec"]
        for path in sorted(PROFILES.glob("*.json"))
    }
    return {name: spec for name, spec in (SPECS | MORE | profiles).items() if spec is not None}


@functools.cache
def plans() -> PlanCache:
    shape = replace(shape_of(WIDTH, LAYERS), vocab_size=VOCABULARY)
    return PlanCache(LIBRARY, shape, EVERYTHING, encode_text=encode_text)


def names_of(given: dict[str, Any]) -> dict[str, str]:
    spec = parse_spec(given)
    plan = plans().plan(spec)
    file = hashlib.sha256(dump_plan(plan)).hexdigest()
    return {"spec": spec.fingerprint(), "plan": plan.fingerprint, "file": file}


@functools.cache
def golden() -> dict[str, dict[str, str]]:
    found: dict[str, dict[str, str]] = json.loads(GOLDEN.read_text())
    return found


def test_every_spec_is_held() -> None:
    assert golden().keys() == every_spec().keys()


@pytest.mark.parametrize("name", every_spec())
def test_a_plan_keeps_its_names(name: str) -> None:
    assert names_of(every_spec()[name]) == golden()[name]


if __name__ == "__main__":
    found = {name: names_of(spec) for name, spec in every_spec().items()}
    GOLDEN.write_text(json.dumps(found, indent=1) + "\n")
