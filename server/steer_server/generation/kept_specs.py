"""The specs of requests, parsed once: clients send the same few again and again.

A spec that is kept also keeps its fingerprint and its references, so that finding its plan costs a
look into a dictionary.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from steer.spec import SteeringSpec, parse_spec

_SPECS = 1024
_SHORT = 16_384
"""Characters of the longest spec that is kept: longer ones carry vectors of their own."""


def spec_of(content: Mapping[str, Any], *, at: str) -> SteeringSpec:
    """The spec that `content`, read from JSON, stands for.

    Raises `SpecError` that names every wrong field; `at` is the JSON pointer of the spec itself.
    """
    text = json.dumps(content)
    return _parsed(text, at) if len(text) <= _SHORT else parse_spec(content, at=at)


@lru_cache(_SPECS)
def _parsed(text: str, at: str) -> SteeringSpec:
    return parse_spec(json.loads(text), at=at)
