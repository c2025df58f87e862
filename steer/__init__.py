"""Steer: per-request steering and inspection for LLM serving."""

from steer.control_vector import Card, ControlVector, LowRankAdapter
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


def __getattr__(name: str) -> object:
    # `attach` needs transformers, which takes seconds to import; the rest does not.
    if name == "attach":
        from steer.engines.transformers.attach import attach  # noqa: PLC0415

        return attach
    raise AttributeError(f"module 'steer' has no attribute {name!r}")
