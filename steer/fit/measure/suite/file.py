"""A suite as a file: the concepts, the prompts, and how far each way to steer is turned.

JSON, or JSON lines in which each line is {"concept": …}, {"prompt": …} or {"options": …}.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Annotated, Any

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StrictFloat,
    StrictInt,
    ValidationError,
    model_validator,
)

from steer.errors import FileFormatError, Problem, SpecError, pointer
from steer.fit.data.instruction import Placement
from steer.prompts import PromptParam
from steer.spec import StoredName

_MAX_BYTES = 16 << 20


class _SuitePart(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class SuiteConcept(_SuitePart):
    """A concept: what it is in words (for a judge), how to ask for it, and what shows it.

    `score` is a scorer as in `steer evaluate`; it is needed where there is no judge.
    """

    name: StoredName
    description: Annotated[str, Field(min_length=1, max_length=1024)]
    instruction: Annotated[str, Field(min_length=1, max_length=4096)]
    score: Annotated[str, Field(min_length=1, max_length=4096)] | None = None


class Suite(_SuitePart):
    """Concepts and prompts. `factors` multiply every way to steer as it stands; the best of them is
    chosen on every second prompt, from the first on, and rated on the others. `place` is where the
    instructions are told."""

    name: StoredName
    description: Annotated[str, Field(max_length=4096)] = ""
    concepts: Annotated[
        tuple[SuiteConcept, ...], Field(min_length=1, max_length=1024, fail_fast=True)
    ]
    prompts: Annotated[
        tuple[PromptParam, ...], Field(min_length=2, max_length=1024, fail_fast=True)
    ]
    factors: Annotated[
        tuple[Annotated[StrictFloat, Field(gt=0, allow_inf_nan=False)], ...],
        Field(min_length=1, max_length=64),
    ] = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0)
    max_tokens: Annotated[StrictInt, Field(ge=1, le=4096)] = 48
    place: Placement = "system"

    @model_validator(mode="after")
    def _distinct(self) -> Suite:
        names = [one.name for one in self.concepts]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"two concepts are named {twice[0]!r}")
        if len(set(self.factors)) < len(self.factors):
            raise ValueError("a factor is listed twice")
        return self

    @property
    def sha256(self) -> str:
        """The identity of what is asked: everything but the concepts."""
        asked = self.model_dump(mode="json", exclude={"name", "description", "concepts"})
        return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()


def read_suite(path: Path) -> Suite:
    """The suite in a file. Raises `FileFormatError` for what is no JSON, and `SpecError` with every
    problem of its fields, each with a pointer into the suite."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise FileFormatError(
            f"the suite {str(path)!r} cannot be read: {error.strerror or error}",
            code="no_such_file",
        ) from error
    if len(data) > _MAX_BYTES:
        raise FileFormatError(f"the suite {str(path)!r} has more than {_MAX_BYTES} bytes")
    return parse_suite(_value(data, path))


def parse_suite(value: Any) -> Suite:
    """The suite that `value` is; raises `SpecError`."""
    try:
        return Suite.model_validate(value)
    except ValidationError as error:
        problems = [
            Problem(
                f"the suite is wrong at {pointer(*item['loc']) or 'the whole'}: "
                f"{item['msg'].removeprefix('Value error, ')}; got {str(item['input'])[:60]!r}",
                "invalid_suite",
                pointer(*item["loc"]),
            )
            for item in error.errors(include_url=False)
        ]
        raise SpecError(problems[0].message, code="invalid_suite", problems=problems) from None


def _value(data: bytes, path: Path) -> Any:
    if path.suffix != ".jsonl":
        return _json(data, str(path))
    found: dict[str, Any] = {"name": path.stem, "concepts": [], "prompts": []}
    for number, line in enumerate(data.splitlines(), 1):
        if not line.strip():
            continue
        item = _json(line, f"{path}, line {number}")
        if not isinstance(item, dict) or len(item) != 1 or next(iter(item)) not in _LINES:
            raise FileFormatError(
                f"{path}, line {number} is not one of "
                + ", ".join(f'{{"{key}": …}}' for key in _LINES),
                code="invalid_suite",
            )
        [(key, content)] = item.items()
        if key == "options":
            found |= content if isinstance(content, dict) else {"options": content}
        else:
            found[f"{key}s"].append(content)
    return found


_LINES = ("concept", "prompt", "options")


def _json(data: bytes, where: str) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise FileFormatError(f"{where} is not JSON: {error}", code="invalid_json") from error
