"""Steer: per-request steering and inspection for LLM serving."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from steer.artefacts.control_vector import Card, ControlVector, LowRankAdapter
    from steer.engines.transformers.attach import attach
    from steer.errors import SteerError
    from steer.spec import SteeringSpec, parse_spec

__all__ = [
    "Card",
    "ControlVector",
    "LowRankAdapter",
    "SteerError",
    "SteeringSpec",
    "attach",
    "parse_spec",
]

_HOMES = {
    "Card": "steer.artefacts.control_vector",
    "ControlVector": "steer.artefacts.control_vector",
    "LowRankAdapter": "steer.artefacts.control_vector",
    "SteerError": "steer.errors",
    "SteeringSpec": "steer.spec",
    "attach": "steer.engines.transformers.attach",
    "parse_spec": "steer.spec",
}


def __getattr__(name: str) -> object:
    # Imported on first use: torch and transformers take seconds, and `steer --help` needs neither.
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'steer' has no attribute {name!r}")
