"""The steering spec: what a request asks to have done to the model's activations.

One schema for the server, the command line and the library. A spec is frozen, refuses unknown
fields, and has a canonical `fingerprint()`: two specs that mean the same have the same one. This
package knows JSON and nothing else: no torch, no registry, no model.
"""

from __future__ import annotations

from steer.spec.artefacts import (
    AdapterRef,
    DetectorRef,
    InlineVector,
    SAERef,
    TokenVector,
    VectorRef,
)
from steer.spec.base import (
    MAX_FEATURES,
    MAX_INTEGER,
    SITES,
    Index,
    Layer,
    Layers,
    LayersOrAll,
    Name,
    Number,
    Site,
    StoredName,
    check_name,
    exactly_one,
)
from steer.spec.document import (
    MAX_INTERVENTIONS,
    MAX_TEXTS,
    SteeringSpec,
    parse_spec,
)
from steer.spec.gates import (
    GateScope,
    When,
    WhenDetected,
    WhenDirection,
)
from steer.spec.interventions import (
    KINDS,
    Ablate,
    Add,
    Affine,
    Clamp,
    Concept,
    Exchange,
    Intervention,
    LowRank,
    NormValue,
    Patch,
    Project,
    ReadWrite,
    Rotate,
    Swap,
    _Intervention,
)
from steer.spec.ramps import MAX_RAMP_POINTS, RampPoints
from steer.spec.selection import (
    ROLES,
    Mark,
    Phase,
    Role,
    Schedule,
    Where,
)
from steer.spec.strengths import (
    STRENGTH_UNITS,
    EffectStrength,
    KLStrength,
    NormStrength,
    Strength,
)

__all__ = [
    "KINDS",
    "MAX_FEATURES",
    "MAX_INTEGER",
    "MAX_INTERVENTIONS",
    "MAX_RAMP_POINTS",
    "MAX_TEXTS",
    "ROLES",
    "SITES",
    "STRENGTH_UNITS",
    "Ablate",
    "AdapterRef",
    "Add",
    "Affine",
    "Clamp",
    "Concept",
    "DetectorRef",
    "EffectStrength",
    "Exchange",
    "GateScope",
    "Index",
    "InlineVector",
    "Intervention",
    "KLStrength",
    "Layer",
    "Layers",
    "LayersOrAll",
    "LowRank",
    "Mark",
    "Name",
    "NormStrength",
    "NormValue",
    "Number",
    "Patch",
    "Phase",
    "Project",
    "RampPoints",
    "ReadWrite",
    "Role",
    "Rotate",
    "SAERef",
    "Schedule",
    "Site",
    "SteeringSpec",
    "StoredName",
    "Strength",
    "Swap",
    "TokenVector",
    "VectorRef",
    "When",
    "WhenDetected",
    "WhenDirection",
    "Where",
    "_Intervention",
    "check_name",
    "exactly_one",
    "parse_spec",
]
