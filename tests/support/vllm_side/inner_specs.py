"""Specs at the sites inside attention and MLP of the demo model, with the artefacts they name."""

from __future__ import annotations

from typing import Any

import demo_specs
from artefacts import (
    random_adapter,
    random_map,
    random_sae,
    random_transcoder,
    random_vector,
    rectified_adapter,
)

from steer.artefacts.library import MemoryLibrary
from steer.model import INNER_SITES, Capabilities, ModelInfo
from steer.plan.cache import PlanCache
from steer.plan.plan import SteeringPlan
from steer.registry.registry import Registry
from steer.spec import Site, parse_spec

WIDTHS: dict[Site, int] = dict.fromkeys(INNER_SITES, demo_specs.WIDTH) | {"mlp_act": 512}

VECTORS = {
    f"{site}-{n}": random_vector(20 + n, *range(demo_specs.LAYERS), width=width, site=site)
    for site, width in WIDTHS.items()
    for n in range(2)
}
SAES = {
    f"{site}-{kind}": random_sae(kind, seed=50, width=width, layer=2, site=site)
    for site, width in WIDTHS.items()
    for kind in ("jumprelu", "topk")
}
SAES |= {
    f"transcoder-{kind}": random_transcoder(kind, seed=51, width=demo_specs.WIDTH, layer=2)
    for kind in ("jumprelu", "topk", "groupmax-centred")
}
SAES["mlp_in-pursuit"] = random_sae(
    "matching_pursuit", seed=52, width=demo_specs.WIDTH, layer=3, site="mlp_in"
)
LOW_RANKS = {
    name: adapter
    for site, width in WIDTHS.items()
    for name, adapter in (
        (f"{site}-reft", random_adapter(27, 0, 4, width=width, site=site)),
        (f"{site}-rectified", rectified_adapter(28, 2, width=width, site=site)),
    )
}
MAPS = {
    f"{site}-map": random_map(29, 0, 3, width=width, site=site) for site, width in WIDTHS.items()
}
LIBRARY = MemoryLibrary(
    {**demo_specs.VECTORS, **VECTORS},
    {**demo_specs.SAES, **SAES},
    LOW_RANKS,
    maps=MAPS,
    detectors=demo_specs.DETECTORS,
)


def _specs(site: Site) -> dict[str, dict[str, Any]]:
    """Every way to edit, at `site`."""
    one = demo_specs.one
    vector, other = f"{site}-0", f"{site}-1"
    add = {"kind": "add", "vector": vector, "layers": [0, 3], "strength": 0.4}
    ablate = {"kind": "ablate", "vector": other, "layers": [1, 4]}
    return {
        "add": one(add),
        "add to the norm": one({**add, "strength": {"norm": 0.5}}),
        "ablate": one(ablate),
        "norm preserved": one({**add, "strength": 2}, norm="preserve"),
        "on what is generated": {
            "interventions": [add, ablate],
            "where": {"phases": ["generation"]},
        },
        "project": one({"kind": "project", "vector": vector, "value": 1.0, "layers": [2]}),
        "rotate to an angle": one(
            {"kind": "rotate", "vector": vector, "toward": other, "degrees": 30, "mode": "to"}
            | {"only": "positive", "layers": [0, 4]}
        ),
        "read a cosine": one(
            {"kind": "read_write", "read": vector, "write": other, "measure": "cosine"}
            | {"threshold": 0.02, "strength": {"norm": 0.9}, "layers": [2, 4]}
        ),
        "a clamp": one(
            {"kind": "clamp", "sae": f"{site}-jumprelu", "features": [1, 5, 9], "value": 4.0}
        ),
        "a clamp that competes": one(
            {"kind": "clamp", "sae": f"{site}-topk", "features": [2, 7], "value": 3.0}
        ),
        "low rank": one({"kind": "low_rank", "adapter": f"{site}-reft"}),
        "low rank of a ReLU": one(
            {"kind": "low_rank", "adapter": f"{site}-rectified", "strength": 0.05}
        ),
        "channels": one({"kind": "affine", "map": f"{site}-map", "strength": 0.3}),
        "patch": one(
            {"kind": "patch", "vector": vector, "layers": [2], "where": {"positions": [[1, 2]]}}
        ),
        "a gate that reads it": one(
            demo_specs.add("v1", layers=[2]),
            when={"vector": vector, "above": 0.0, "layer": 1, "scope": "prompt"},
        ),
        "beside the stream": {"interventions": [add, demo_specs.add("v2")]},
    }


def _clamps_of_an_mlp() -> dict[str, dict[str, Any]]:
    """Clamps that read what an MLP reads: of transcoders, whose output is that of the MLP, and of
    an SAE whose features are found one after another."""
    item = {"kind": "clamp", "features": [2, 7, 30], "value": 3.0}
    where = {"positions": [[1, None]]}
    return {
        "a transcoder": demo_specs.one({**item, "sae": "transcoder-jumprelu"}),
        "a transcoder that competes": demo_specs.one(
            {**item, "sae": "transcoder-topk", "mode": "at_least"}, where=where
        ),
        "a transcoder of groups": demo_specs.one(
            {**item, "sae": "transcoder-groupmax-centred", "only_if_active": True}
        ),
        "a transcoder beside the stream": {
            "interventions": [
                demo_specs.add("v1", layers=[2]),
                {**item, "sae": "transcoder-jumprelu", "value": 0.0},
                {"kind": "ablate", "vector": "mlp_in-0", "layers": [2]},
            ]
        },
        "a pursuit": demo_specs.one({**item, "sae": "mlp_in-pursuit", "k": 4}),
    }


SPECS = {f"{name} at {site}": spec for site in INNER_SITES for name, spec in _specs(site).items()}
SPECS |= {f"{name} at mlp_in": spec for name, spec in _clamps_of_an_mlp().items()}


def register(registry: Registry) -> None:
    """Puts the artefacts that the specs name into a registry."""
    for found in (VECTORS, SAES, LOW_RANKS, MAPS):
        for name, artefact in found.items():
            registry.add(name, artefact)


def compiled(model: ModelInfo, able: Capabilities) -> dict[str, SteeringPlan | None]:
    """Every spec at a site that the model was told to open, as a plan."""
    plans = PlanCache(LIBRARY, model, able)
    closed = tuple(f" at {site}" for site in INNER_SITES if site not in model.sites)
    open_ones = {name: spec for name, spec in SPECS.items() if not name.endswith(closed)}
    return {name: plans.plan(parse_spec(spec)) for name, spec in open_ones.items()}
